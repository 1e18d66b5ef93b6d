"""What is wrong with a call's arguments, whichever backend runs them. Asked once, at the boundary.

Every function but ``either`` returns None, or one line that says what is in the way.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

import torch

from diffsparse.entry import NUMERICS
from diffsparse.kernels.backends import backend_names, find_backend
from diffsparse.layout import BlockLayout
from diffsparse.repair import HeadRepair

__all__ = ["either", "input_error", "kv_len_error"]


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
    lists = layout.index.batch
    if lists != 1 and lists != batch:  # not `in`, which finds no number among what Dynamo takes for variables
        return f"the layout has block lists for {layout.index.batch} items, q has a batch of {batch}"
    if layout.device != q.device:
        return f"q is on {q.device}, the layout on {layout.device}: use layout.to({str(q.device)!r})"
    repair = layout.heads.repair
    if isinstance(repair, HeadRepair) and repair.weight.shape != (heads, q.shape[3], q.shape[3]):
        return f"q has heads of {q.shape[3]}, the layout's repair is for heads of {repair.weight.shape[2]}"
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
            return f"numerics {numerics!r} needs backend={either(map(repr, having))}, got {backend!r:.60}"
        if q.shape[3] not in having[backend]:
            return f"numerics {numerics!r} takes head_dim {either(having[backend])}, got {q.shape[3]}"
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


def _having(numerics: str) -> dict[str, Collection[int]]:
    """Backends that have these numerics, each with the head_dims that take them."""
    found = {name: find_backend(name) for name in backend_names()}
    return {name: one.numerics[numerics] for name, one in found.items() if one is not None and numerics in one.numerics}


def either(choices: Iterable[object]) -> str:
    return " or ".join(map(str, choices))
