"""One folder a backend, with everything that is true of it, and the registry of all of them.

``protocol`` says what a backend tells of itself; :func:`register_backend` adds one from outside this package. A
backend's folder imports its kernels only when it runs, so that importing this package loads no optional dependency.
"""

from diffsparse.kernels.backends.protocol import Backend, CallFacts, KernelBackend, unknown_tail
from diffsparse.kernels.backends.registry import (
    BACKENDS,
    about_way,
    backend_names,
    candidates,
    find_backend,
    last_resort,
    register_backend,
    way_of,
)

__all__ = [
    "BACKENDS",
    "Backend",
    "CallFacts",
    "KernelBackend",
    "about_way",
    "backend_names",
    "candidates",
    "find_backend",
    "last_resort",
    "register_backend",
    "unknown_tail",
    "way_of",
]
