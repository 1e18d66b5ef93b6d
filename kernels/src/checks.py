"""Whether a call is valid, and whether a backend can run it: one answer for "raise" and for "choose".

Every function returns None, or one line that says what is in the way.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from functools import lru_cache

import torch

from diffsparse.kernels.backends import CallFacts, backend_names, candidates, find_backend, last_resort
from diffsparse.kernels.inputs import either, input_error, kv_len_error
from diffsparse.layout import BlockLayout

__all__ = [
    "cannot_run",
    "check",
    "choose_backend",
    "no_kernel",
    "numerics_of",
    "possible_numerics",
]

logger = logging.getLogger(__name__)


def cannot_run(backend: str, q: torch.Tensor | None = None, tails: Collection[str] = ()) -> str | None:
    """Why a backend cannot run tensors like ``q`` (None: like any) with such tails, or None where it can."""
    found = find_backend(backend)
    if found is None:
        return f"unknown backend {backend!r:.60}; allowed: auto, {', '.join(backend_names())}"
    return found.cannot_run(None if q is None else CallFacts.of(q, tails))


@lru_cache(maxsize=256)
def _log_once(message: str) -> None:
    logger.info(message)


def choose_backend(backend: str, q: torch.Tensor, tails: Collection[str] = ()) -> str:
    """The backend that runs tensors like ``q``, with heads that have such ``tails``.

    Asked for by name it is that one, or ValueError with the reason. Under ``"auto"`` backends of the tensors' device
    are tried best first, and each one passed over is logged once with its reason.
    """
    if backend != "auto":
        if (reason := cannot_run(backend, q, tails)) is not None:
            raise ValueError(reason)
        return backend
    facts = CallFacts.of(q, tails)
    for one in candidates(q.device.type):
        if (reason := one.cannot_run(facts)) is None:
            return one.name
        _log_once(f"backend {one.name} passed over: {reason}")
    raise AssertionError("the last of them runs everything")


def no_kernel(q: torch.Tensor, tails: Collection[str] = ()) -> str | None:
    """Why ``"auto"`` has only its last resort for such a call, which is slower than dense attention; else None."""
    if choose_backend("auto", q, tails) != last_resort().name:
        return None
    facts = CallFacts.of(q, tails)
    tried = [one.cannot_run(facts) for one in candidates(q.device.type)]
    return "; ".join(dict.fromkeys(reason for reason in tried if reason is not None))


def possible_numerics(backend: str, head_dim: int, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """What heads' own numerics come to on a backend: where it has no 8 bits, the precision of q, k and v for all."""
    eight = [n for n in wanted if n != "auto"]
    if not eight or set(eight) <= set(numerics_of(backend, head_dim)):
        return wanted
    found = find_backend(backend)
    having = {} if found is None else found.numerics
    if not all(having.get(n) for n in eight):
        why = f"the backend {backend} has no 8 bits"
    else:
        why = f"8 bits take head_dim {either(having[eight[0]])}, these have {head_dim}"
    _log_once(f"heads with numerics {', '.join(eight)} run in 16 bits or more: {why}")
    return ("auto",)


def numerics_of(backend: str, head_dim: int) -> tuple[str, ...]:
    """What a backend has beside the precision of q, k and v for heads of that size."""
    found = find_backend(backend)
    return () if found is None else tuple(name for name, dims in found.numerics.items() if head_dim in dims)


def check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = None,
    kv_len: torch.Tensor | None = None,
    numerics: str = "auto",
    backend: str = "auto",
    raise_error: bool = False,
) -> str | None:
    """Why ``sparse_attention`` would refuse these arguments, or None.

    With ``raise_error`` the reason is raised as a ValueError instead of being returned.
    """
    reason = input_error(q, k, v, layout, scale=scale, kv_len=kv_len, numerics=numerics, backend=backend)
    if reason is None:
        reason = kv_len_error(kv_len, layout.seq_len, layout.grid.text_before, layout.grid.num_visual)
    if reason is None and backend != "auto":
        reason = cannot_run(backend, q, layout.heads.tails)
    if reason is not None and raise_error:
        raise ValueError(reason)
    return reason
