"""Block-sparse attention kernels: ``(q, k, v, layout) -> output``. Knows only the vocabulary in ``diffsparse/``.

Importing this package registers the operator ``diffsparse::sparse_attention`` and loads no optional dependency.
"""

from diffsparse.kernels.api import available_backends, backend_ways, sparse_attention
from diffsparse.kernels.backends import BACKENDS, Backend, CallFacts, KernelBackend, register_backend
from diffsparse.kernels.backends.reference.forward import reference_attention
from diffsparse.kernels.checks import check
from diffsparse.kernels.merge import merge_attention
from diffsparse.kernels.select import Selector, Signal, register_selector, register_signal, select_blocks, selectors
from diffsparse.kernels.tails import Tail, register_tail

__all__ = [
    "BACKENDS",
    "Backend",
    "CallFacts",
    "KernelBackend",
    "Selector",
    "Signal",
    "Tail",
    "available_backends",
    "backend_ways",
    "check",
    "merge_attention",
    "reference_attention",
    "register_backend",
    "register_selector",
    "register_signal",
    "select_blocks",
    "selectors",
    "register_tail",
    "sparse_attention",
]
