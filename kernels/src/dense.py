"""Dense attention as it is found on a machine: each kernel under a name, the question whether it can run, and a race.

The operator ``diffsparse::dense_attention`` runs one of them by name, so that compiled code can use whichever won.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F

from diffsparse.entry import HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.kernels.api import sparse_attention
from diffsparse.kernels.backends import CallFacts, backend_names, candidates, find_backend, last_resort
from diffsparse.kernels.clock import samples_ms, timing
from diffsparse.kernels.inputs import either
from diffsparse.layout import BlockLayout, build_layout

__all__ = ["DENSE_KERNELS", "OWN_WAY", "DenseRace", "cannot_run_dense", "dense_attention", "dense_heads_", "race_dense"]

logger = logging.getLogger(__name__)

#: Kernels of torch's own attention, and its name for each.
_SDPA = {
    "cudnn_sdpa": "CUDNN_ATTENTION",
    "flash_sdpa": "FLASH_ATTENTION",
    "efficient_sdpa": "EFFICIENT_ATTENTION",
}
#: Packages with a kernel of their own: the module that has it, and how to get it.
_PACKAGES = {
    "flash_attention_3": ("flash_attn_interface", "build FlashAttention-3 from flash-attention's folder hopper/"),
    "flash_attention_4": ("flash_attn.cute", "pip install --pre flash-attn-4"),
    "xformers": ("xformers.ops", "pip install xformers"),
}
#: Backends of block-sparse attention with every block kept, registered ones too: the numerics that they run in.
_OWN = {"diffsparse": "auto", "diffsparse_int8": "int8", "diffsparse_fp8": "fp8"}

#: Every dense kernel that is known here.
DENSE_KERNELS = (*_SDPA, *_PACKAGES, *_OWN)

#: The name in a race of the way in which a caller computes attention without it.
OWN_WAY = "model"

# Relative distance from torch's attention, both in the inputs' precision, beyond which a kernel is not used.
_CLOSE = 2e-2
_OWN_BLOCK = 128
_HALF = (torch.float16, torch.bfloat16)


@lru_cache(maxsize=16)
def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it is missing, or is one of the same name without it
        return False


def cannot_run_dense(name: str, q: torch.Tensor, masked: bool = False) -> str | None:
    """Why a dense kernel cannot run on tensors like ``q`` ``[B, S, H, D]``, or None. Reads shapes and types only.

    ``masked``: with a mask over keys. torch's own kernels may still refuse when they are called.
    """
    if name not in DENSE_KERNELS:
        return f"unknown dense kernel {name!r}; there are {', '.join(DENSE_KERNELS)}"
    if name in _SDPA:
        if not q.is_cuda and name != "flash_sdpa":
            return f"it runs on a GPU, q is on {q.device}"
        if masked and q.is_cuda and name == "flash_sdpa":
            return "it takes no mask over keys"
        return None
    if name in _PACKAGES:
        module, how = _PACKAGES[name]
        if not _found(module):
            return f"{module} is not installed ({how})"
        if not q.is_cuda:
            return f"it runs on a GPU, q is on {q.device}"
        if q.dtype not in _HALF:
            return f"it takes float16 or bfloat16, q is {q.dtype}"
        if masked:
            return "it takes no mask over keys"
        return None
    if masked:
        return "it masks text tokens only, which a dense call does not tell apart"
    return _own_backend(_OWN[name], q)[1]


def _own_backend(numerics: str, q: torch.Tensor) -> tuple[str, str | None]:
    """The best backend that runs a dense call on tensors like ``q`` in these numerics, and why none does, or None."""
    if numerics == "auto":
        tried = [backend for backend in candidates(q.device.type) if backend is not last_resort()]
    else:
        known = [backend for name in backend_names() if (backend := find_backend(name)) is not None]
        tried = [backend for backend in known if numerics in backend.numerics]
    reason: str | None = f"no backend has numerics {numerics!r}"
    for backend in tried:
        reason = backend.cannot_run(CallFacts.of(q))
        if reason is None and numerics != "auto" and q.shape[3] not in (dims := backend.numerics[numerics]):
            reason = f"numerics {numerics!r} takes head_dim {either(dims)}, got {q.shape[3]}"
        if reason is None:
            return backend.name, None
    return "", reason


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    kernel: str,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention over all keys by one of :data:`DENSE_KERNELS`.

    Args:
        q, k, v: ``[batch, seq, heads, head_dim]`` of one shape, dtype and device.
        kernel: which; it runs, or its error is raised.
        scale: factor of the logits; ``head_dim ** -0.5`` where None.
        key_mask: bool ``[batch, seq]``, False where a key takes no part.

    Returns:
        ``[batch, seq, heads, head_dim]``, contiguous, in q's dtype.

    Raises:
        ValueError: the kernel cannot run such inputs, with the reason.
    """
    factor = float(q.shape[-1] ** -0.5 if scale is None else scale)
    return _dense_op(q, k, v, key_mask, factor, kernel)


@torch.library.custom_op(
    "diffsparse::dense_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? key_mask, float scale, str kernel) -> Tensor",
)
def _dense_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None, scale: float, kernel: str
) -> torch.Tensor:
    if (reason := cannot_run_dense(kernel, q, key_mask is not None)) is not None:
        raise ValueError(f"dense attention by {kernel}: {reason}")
    if kernel in _SDPA:
        out = _sdpa(q, k, v, key_mask, scale, kernel)
    elif kernel in _PACKAGES:
        out = _PACKAGE_CALLS[kernel](q, k, v, scale)
    else:
        layout = _full_layout(q.shape[1], q.shape[2], _OWN_BLOCK, str(q.device))
        numerics = _OWN[kernel]
        backend, _ = _own_backend(numerics, q)
        return sparse_attention(q, k, v, layout, scale=scale, numerics=numerics, backend=backend)
    return out.contiguous()


@_dense_op.register_fake
def _(q: torch.Tensor, *args: Any) -> torch.Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def dense_heads_(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: torch.Tensor,
    *,
    kernel: str,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
) -> None:
    """Overwrite some heads of ``out`` ``[batch, seq, heads, head_dim]`` with :func:`dense_attention` of them alone.

    heads: bool ``[heads]`` on the CPU, where reading it makes no device wait; True for those to write.
    """
    factor = float(q.shape[-1] ** -0.5 if scale is None else scale)
    _dense_heads_op(out, q, k, v, heads, key_mask, factor, kernel)


@torch.library.custom_op(
    "diffsparse::dense_heads_",
    mutates_args=("out",),
    schema=(
        "(Tensor(a!) out, Tensor q, Tensor k, Tensor v, Tensor heads, Tensor? key_mask, float scale, str kernel) -> ()"
    ),
)
def _dense_heads_op(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: torch.Tensor,
    key_mask: torch.Tensor | None,
    scale: float,
    kernel: str,
) -> None:
    # One call for each run of neighbours: views need neither copies nor indices on the device, which could not be
    # brought there while a CUDA graph is captured.
    position = 0
    for chosen, run in groupby(heads.tolist()):
        begin, position = position, position + len(list(run))
        if chosen:
            part = slice(begin, position)
            out[:, :, part] = _dense_op(q[:, :, part], k[:, :, part], v[:, :, part], key_mask, scale, kernel)


@_dense_heads_op.register_fake
def _(*args: Any) -> None:
    return None


def _sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None, scale: float, kernel: str
) -> torch.Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
    mask = None if key_mask is None else key_mask[:, None, None, :]
    with sdpa_kernel(getattr(SDPBackend, _SDPA[kernel])):
        return F.scaled_dot_product_attention(qt, kt, vt, attn_mask=mask, scale=scale).transpose(1, 2)


def _first(found: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Versions of these packages differ in whether the log-sum-exp comes with the output."""
    return found[0] if isinstance(found, (tuple, list)) else found


def _flash_attention_3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    from flash_attn_interface import flash_attn_func  # type: ignore[import-not-found]

    return _first(flash_attn_func(q, k, v, softmax_scale=scale))


def _flash_attention_4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    from flash_attn.cute import flash_attn_func  # type: ignore[import-not-found]

    return _first(flash_attn_func(q, k, v, softmax_scale=scale))


def _xformers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q, k, v, scale=scale)


_PACKAGE_CALLS: dict[str, Callable[..., torch.Tensor]] = {
    "flash_attention_3": _flash_attention_3,
    "flash_attention_4": _flash_attention_4,
    "xformers": _xformers,
}


@lru_cache(maxsize=2)
def _full_layout(seq: int, heads: int, block_size: int, device: str) -> BlockLayout:
    """Every block kept. Two are remembered: at 118,800 tokens and 24 heads one takes 83 MB."""
    return build_layout(TokenGrid(1, 1, seq), [HeadEntry()] * heads, block_size).to(device)


@dataclass(frozen=True)
class DenseRace:
    """What was measured for one shape.

    ms: the median time of each kernel that ran and was right. excluded: the others, with the reason. fastest: the
    first in time.
    """

    fastest: str
    ms: dict[str, float]
    excluded: dict[str, str]

    def __str__(self) -> str:
        ran = ", ".join(f"{name} {ms:.3g} ms" for name, ms in sorted(self.ms.items(), key=lambda item: item[1]))
        return f"{self.fastest} ({ran})"


@torch.no_grad()
def race_dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
    own: Callable[[], torch.Tensor] | None = None,
    kernels: Sequence[str] = DENSE_KERNELS,
    budget_ms: float = 100.0,
) -> DenseRace:
    """Time the dense kernels that can run this call, and name the fastest.

    Each one's output is first compared with ``own``'s, or where there is none with that of torch's attention (relative
    error at most 2e-2); one that is further off is not timed. Kernels in 8 bits take no part: their errors are larger
    and depend on the data, so they run only where they are asked for by name.

    Args:
        q, k, v, key_mask, scale: as in :func:`dense_attention`.
        own: gives the call's output in another way, which takes part as :data:`OWN_WAY`.
        kernels: that take part.
        budget_ms: for each one's timing, after a call to warm up; three calls at least.

    Raises:
        RuntimeError: none of them can run, with each one's reason.
    """
    masked = key_mask is not None

    def torch_chooses() -> torch.Tensor:
        qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
        mask = None if key_mask is None else key_mask[:, None, None, :]
        return F.scaled_dot_product_attention(qt, kt, vt, attn_mask=mask, scale=scale).transpose(1, 2)

    want = (own or torch_chooses)()
    ms: dict[str, float] = {}
    excluded: dict[str, str] = {}
    if own is not None:
        ms[OWN_WAY] = timing(samples_ms(own, q.device, budget_ms, least=3)).ms
    for name in kernels:
        reason = cannot_run_dense(name, q, masked)
        if reason is None and _OWN.get(name, "auto") != "auto":
            reason = "it multiplies in 8 bits, which changes the output, so it runs only where it is asked for by name"
        if reason is not None:
            excluded[name] = reason
            continue
        call = partial(dense_attention, q, k, v, kernel=name, scale=scale, key_mask=key_mask)
        try:
            error = _distance(call(), want)
            if not error <= _CLOSE:
                excluded[name] = f"its output is off by {error:.2g} (relative), at most {_CLOSE:g} is taken"
                continue
            ms[name] = timing(samples_ms(call, q.device, budget_ms, least=3)).ms
        except Exception as failure:  # other people's kernels: whatever stops one is its reason
            excluded[name] = f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}"
    if not ms:
        raise RuntimeError("no dense attention runs here: " + "; ".join(f"{n}: {why}" for n, why in excluded.items()))
    return DenseRace(min(ms, key=lambda name: ms[name]), ms, excluded)


def _distance(out: torch.Tensor, want: torch.Tensor) -> float:
    """``||out - want|| / ||want||``, head by head, so that no second copy of all of it is made in fp32."""
    off = size = 0.0
    for h in range(want.shape[2]):
        target = want[:, :, h].float()
        off += float((out[:, :, h].float() - target).square().sum())
        size += float(target.square().sum())
    return (off / size) ** 0.5 if size else float("nan")
