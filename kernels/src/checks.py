"""Whether a call is valid, and whether a backend can run it: one answer for "raise" and for "choose".

Every function returns None, or one line that says what is in the way.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from collections.abc import Callable
from functools import lru_cache

import torch

from diffsparse.entry import NUMERICS
from diffsparse.kernels.call import BACKENDS
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

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_HEAD_DIM = 256
_DIMS_8_BITS = (64, 128)


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
        if backend != "gluon_sm90":
            return f"numerics {numerics!r} needs backend='gluon_sm90', got {backend!r}"
        if q.shape[3] not in _DIMS_8_BITS:
            return f"numerics {numerics!r} takes head_dim 64 or 128, got {q.shape[3]}"
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


def _reference(q: torch.Tensor | None) -> str | None:
    return None


def _cpu(q: torch.Tensor | None) -> str | None:
    if q is None:
        return None
    if q.device.type != "cpu":
        return f"the cpu backend runs tensors on the CPU, got {q.device}"
    if q.dtype not in _DTYPES:
        return f"the cpu backend takes float32, float16 or bfloat16, got {q.dtype}"
    return None


def interpreting() -> bool:
    """True where Triton kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@lru_cache(maxsize=1)
def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    return None


def _triton(q: torch.Tensor | None) -> str | None:
    if (missing := _triton_missing()) is not None:
        return missing
    if q is None:
        if interpreting() or torch.cuda.is_available():
            return None
        return "triton needs a GPU (or TRITON_INTERPRET=1), and torch sees none"
    if q.device.type == "mps":
        return f"the triton backend runs tensors on a GPU that Triton knows, got {q.device}"
    if q.device.type == "cpu" and not interpreting():
        return "the triton backend runs tensors on a GPU, got cpu (TRITON_INTERPRET=1 runs it in Triton's interpreter)"
    if q.dtype not in _DTYPES:
        return f"the triton backend takes float32, float16 or bfloat16, got {q.dtype}"
    if not 16 <= q.shape[3] <= _MAX_HEAD_DIM or q.shape[3] % 8:
        return f"the triton backend takes head_dim 16 to {_MAX_HEAD_DIM} in multiples of 8, got {q.shape[3]}"
    return None


@lru_cache(maxsize=1)
def _gluon_missing() -> str | None:
    if (missing := _triton_missing()) is not None:
        return missing
    if importlib.util.find_spec("triton.experimental.gluon.language.nvidia.hopper") is None:
        return "this triton has no Gluon for Hopper (pip install 'triton>=3.6')"
    return None


def _gluon_sm90(q: torch.Tensor | None) -> str | None:
    if (missing := _gluon_missing()) is not None:
        return missing
    if q is not None and q.device.type != "cuda":
        return f"the gluon_sm90 backend runs tensors on a Hopper GPU, got {q.device}"
    if not torch.cuda.is_available() or torch.version.hip:
        return "gluon_sm90 needs a Hopper GPU, and torch sees none"
    capability = torch.cuda.get_device_capability(None if q is None else q.device)
    if capability != (9, 0):
        return f"gluon_sm90 needs a GPU of compute capability 9.0, got {capability[0]}.{capability[1]}"
    if q is None:
        return None
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"the gluon_sm90 backend takes float16 or bfloat16, got {q.dtype}"
    if not 64 <= q.shape[3] <= 128 or q.shape[3] % 8:
        return f"the gluon_sm90 backend takes head_dim 64 to 128 in multiples of 8, got {q.shape[3]}"
    return None


_CHECKS: dict[str, Callable[[torch.Tensor | None], str | None]] = {
    "reference": _reference,
    "cpu": _cpu,
    "triton": _triton,
    "gluon_sm90": _gluon_sm90,
}

# What "auto" tries, best first.
_AUTO = {"cpu": ("cpu", "reference"), "cuda": ("gluon_sm90", "triton", "reference")}


def cannot_run(backend: str, q: torch.Tensor | None = None) -> str | None:
    """Why a backend cannot run tensors like ``q`` (None: like any), or None where it can."""
    if backend not in _CHECKS:
        return f"unknown backend {backend!r}; allowed: auto, {', '.join(BACKENDS)}"
    return _CHECKS[backend](q)


@lru_cache(maxsize=256)
def _log_once(message: str) -> None:
    logger.info(message)


def choose_backend(backend: str, q: torch.Tensor) -> str:
    """The backend that runs tensors like ``q``.

    Asked for by name it is that one, or ValueError with the reason. Under ``"auto"`` backends of the tensors' device
    are tried best first, and each one passed over is logged once with its reason.
    """
    if backend != "auto":
        if (reason := cannot_run(backend, q)) is not None:
            raise ValueError(reason)
        return backend
    for name in _AUTO["cpu" if q.device.type == "cpu" else "cuda"]:
        if (reason := cannot_run(name, q)) is None:
            return name
        _log_once(f"backend {name} passed over: {reason}")
    raise AssertionError("the reference backend runs everything")


def no_kernel(q: torch.Tensor) -> str | None:
    """Why ``"auto"`` has only the reference for tensors like ``q``, which is slower than dense attention; else None."""
    if choose_backend("auto", q) != "reference":
        return None
    on_cpu = q.device.type == "cpu"
    tried = [cannot_run(name, q) for name in BACKENDS if name != "reference" and (name == "cpu") == on_cpu]
    return "; ".join(dict.fromkeys(reason for reason in tried if reason is not None))


def possible_numerics(backend: str, head_dim: int, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """What heads' own numerics come to on a backend: where it has no 8 bits, the precision of q, k and v for all."""
    if wanted == ("auto",):
        return wanted
    if backend != "gluon_sm90":
        why = f"the backend {backend} has no 8 bits"
    elif head_dim not in _DIMS_8_BITS:
        why = f"8 bits take head_dim 64 or 128, these have {head_dim}"
    else:
        return wanted
    _log_once(f"heads with numerics {', '.join(n for n in wanted if n != 'auto')} run in 16 bits or more: {why}")
    return ("auto",)


def has_8_bits(device: torch.device, head_dim: int) -> bool:
    """Whether heads of that size may run in 8 bits on a device."""
    probe = torch.empty(1, 1, 1, head_dim, dtype=torch.bfloat16, device=device)
    return head_dim in _DIMS_8_BITS and cannot_run("gluon_sm90", probe) is None


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
        reason = cannot_run(backend, q)
    if reason is not None and raise_error:
        raise ValueError(reason)
    return reason
