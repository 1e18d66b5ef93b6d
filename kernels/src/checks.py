"""Whether a call is valid, and whether a backend can run it: one answer for "raise" and for "choose".

Every function returns None, or one line that says what is in the way.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable
from functools import lru_cache

import torch

from diffsparse.entry import NUMERICS
from diffsparse.kernels.backends import CallFacts, backend_names, candidates, find_backend
from diffsparse.layout import BlockLayout

__all__ = [
    "cannot_run",
    "check",
    "choose_backend",
    "has_8_bits",
    "input_error",
    "kv_len_error",
    "no_kernel",
    "possible_numerics",
]

logger = logging.getLogger(__name__)


def input_error(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = None,
    kv_len: torch.Tensor | None = None,
    numerics: str = "auto",
    backend: str = "auto",
) -> str | None:
    """What is wrong with the arguments, whichever backend runs them. Reads shapes and types, never values."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            return f"{name} must be [batch, seq, heads, head_dim], got shape {tuple(x.shape)}"
        if x.shape != q.shape:
            return f"q, k and v must have one shape; q is {tuple(q.shape)}, {name} is {tuple(x.shape)}"
        if x.dtype != q.dtype:
            return f"q, k and v must have one dtype; q is {q.dtype}, {name} is {x.dtype}"
        if x.device != q.device:
            return f"q, k and v must be on one device; q is on {q.device}, {name} on {x.device}"
        if x.shape[3] > 1 and x.stride(3) != 1:
            return f"the last axis of {name} must be contiguous, got strides {tuple(x.stride())}"
    batch, seq, heads, _ = q.shape
    if not q.dtype.is_floating_point:
        return f"q, k and v must be floating point, got {q.dtype}"
    if seq != layout.seq_len:
        return f"q has {seq} tokens, the layout is for {layout.seq_len} (grid {layout.grid})"
    if heads != layout.num_heads:
        return f"q has {heads} heads, the layout has {layout.num_heads}"
    if layout.index.batch not in (1, batch):
        return f"the layout has block lists for {layout.index.batch} items, q has a batch of {batch}"
    if layout.device != q.device:
        return f"q is on {q.device}, the layout on {layout.device}: use layout.to({str(q.device)!r})"
    if scale is not None and not 0 < scale < math.inf:
        return f"scale must be positive and finite, got {scale}"
    if kv_len is not None:
        if kv_len.device != q.device:
            return f"kv_len must be on the device of q, {q.device}, got {kv_len.device}"
        want = (batch, seq) if kv_len.dtype == torch.bool else (batch,)
        if kv_len.dtype not in (torch.bool, torch.int32, torch.int64) or tuple(kv_len.shape) != want:
            return (
                f"kv_len must be int32 [batch] or bool [batch, seq], here [{batch}] or [{batch}, {seq}]; "
                f"got {kv_len.dtype} {list(kv_len.shape)}"
            )
    if numerics not in NUMERICS:
        return f"numerics must be one of {', '.join(map(repr, NUMERICS))}, got {numerics!r}"
    if numerics != "auto":
        having = _having(numerics)
        if backend not in having:
            return f"numerics {numerics!r} needs backend={_either(map(repr, having))}, got {backend!r:.60}"
        if q.shape[3] not in having[backend]:
            return f"numerics {numerics!r} takes head_dim {_either(having[backend])}, got {q.shape[3]}"
    return None


def kv_len_error(kv_len: torch.Tensor | None, seq: int, text_before: int, num_visual: int) -> str | None:
    """What is wrong with the values of ``kv_len``. Reads them, so it is for CPU tensors only."""
    if kv_len is None or kv_len.device.type != "cpu":
        return None
    visual_end = text_before + num_visual
    if kv_len.dtype == torch.bool:
        if not bool(kv_len[:, text_before:visual_end].all()):
            return "the key mask masks out visual tokens; only text tokens may be masked"
        return None
    low, high = int(kv_len.min()), int(kv_len.max())
    if high > seq:
        return f"kv_len goes up to {high}, the sequence has {seq} tokens"
    if low < visual_end:
        return f"kv_len goes down to {low}, but visual tokens end at {visual_end}; only text may be masked out"
    return None


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
    for one in candidates(q.device.type):
        if (reason := one.cannot_run(CallFacts.of(q, tails))) is None:
            return one.name
        _log_once(f"backend {one.name} passed over: {reason}")
    raise AssertionError("the reference backend runs everything")


def no_kernel(q: torch.Tensor) -> str | None:
    """Why ``"auto"`` has only the reference for tensors like ``q``, which is slower than dense attention; else None."""
    if choose_backend("auto", q) != "reference":
        return None
    facts = CallFacts.of(q)
    tried = [one.cannot_run(facts) for one in candidates(q.device.type)]
    return "; ".join(dict.fromkeys(reason for reason in tried if reason is not None))


def possible_numerics(backend: str, head_dim: int, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """What heads' own numerics come to on a backend: where it has no 8 bits, the precision of q, k and v for all."""
    eight = [n for n in wanted if n != "auto"]
    found = find_backend(backend)
    having = {} if found is None else found.numerics
    if not eight or all(head_dim in having.get(n, ()) for n in eight):
        return wanted
    if not all(having.get(n) for n in eight):
        why = f"the backend {backend} has no 8 bits"
    else:
        why = f"8 bits take head_dim {_either(having[eight[0]])}, these have {head_dim}"
    _log_once(f"heads with numerics {', '.join(eight)} run in 16 bits or more: {why}")
    return ("auto",)


def has_8_bits(device: torch.device, head_dim: int) -> bool:
    """Whether heads of that size may run in 8 bits on a device."""
    facts = CallFacts(device, torch.bfloat16, head_dim)
    return any(
        head_dim in dims and backend.cannot_run(facts) is None
        for backend in candidates(device.type)
        for dims in backend.numerics.values()
    )


def _having(numerics: str) -> dict[str, Collection[int]]:
    """Backends that have these numerics, each with the head_dims that take them."""
    found = {name: find_backend(name) for name in backend_names()}
    return {name: one.numerics[numerics] for name, one in found.items() if one is not None and numerics in one.numerics}


def _either(choices: Iterable[object]) -> str:
    return " or ".join(map(str, choices))


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
        reason = cannot_run(backend, q, layout.heads.own_tails)
    if reason is not None and raise_error:
        raise ValueError(reason)
    return reason
