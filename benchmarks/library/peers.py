"""Other people's block-sparse attention, each fed from one of our layouts. For measuring side by side.

A mask form that all of them know: blocks of one size in the sequence's own order (the last one may be short), a list of
kept key blocks for every query block, no tails. :func:`block_lists` says why where a layout is not of that form.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from diffsparse.layout import BlockLayout

__all__ = ["PEERS", "BlockLists", "Inputs", "Peer", "Prepared", "block_lists", "cannot_express", "cannot_run_peer"]


@dataclass(frozen=True)
class BlockLists:
    """Kept key blocks of every query block. ``G`` is the number of heads, or 1 where all heads have the same lists.

    count: int32 ``[G, N]``. index: int32 ``[G, N, N]``, kept blocks first and ascending, then zeros.
    sizes: int32 ``[N]``, tokens of each block.
    """

    count: torch.Tensor
    index: torch.Tensor
    sizes: torch.Tensor
    block_size: int

    def each_head(self, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``count`` and ``index`` with one list per head, in memory."""
        return tuple(x.expand(heads, *x.shape[1:]).contiguous() for x in (self.count, self.index))  # type: ignore[return-value]


def cannot_express(layout: BlockLayout) -> str | None:
    """Why no peer's mask form can hold a layout, or None."""
    if layout.tokens.needs_gather:
        return "heads with an order of their own"
    if layout.heads.has_tail:
        return "tails"
    if bool((layout.heads.table[:, 0] != 0).any()):
        return "skipped heads"
    sizes = layout.tokens.block_start[0].diff()
    if bool((sizes[:-1] != layout.block_size).any()):
        return "short blocks inside the sequence (text segments)"
    return None


def block_lists(layout: BlockLayout) -> BlockLists:
    """A layout in the form that peers know. Raises ValueError where it has none."""
    if (reason := cannot_express(layout)) is not None:
        raise ValueError(f"peers' masks cannot express {reason}")
    heads, n = layout.num_heads, layout.num_blocks
    count = layout.index.row_ptr[0].diff().view(heads, n)
    place = torch.arange(n, device=count.device)
    index = torch.zeros(heads, n, n, dtype=torch.int32, device=count.device)
    index[place < count[..., None]] = layout.index.col_idx
    if bool((count == count[:1]).all()) and bool((index == index[:1]).all()):
        count, index = count[:1], index[:1]
    sizes = layout.tokens.block_start[layout.tokens.head_order[0].long()].diff()
    return BlockLists(count.contiguous(), index.contiguous(), sizes.contiguous(), layout.block_size)


class Inputs:
    """q, k and v ``[B, S, H, D]``, and the copies that peers need, made once for all of them."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self.q, self.k, self.v = q, k, v
        self.scale = float(q.shape[-1] ** -0.5)

    @cached_property
    def heads_first(self) -> tuple[torch.Tensor, ...]:
        """``[B, H, S, D]``, contiguous."""
        return tuple(x.transpose(1, 2).contiguous() for x in (self.q, self.k, self.v))

    def padded(self, multiple: int) -> tuple[torch.Tensor, ...]:
        """:attr:`heads_first` with zeros up to a multiple of tokens."""
        extra = -self.q.shape[1] % multiple
        return tuple(F.pad(x, (0, 0, 0, extra)) if extra else x for x in self.heads_first)


@dataclass(frozen=True)
class Prepared:
    """What is timed, and how its result becomes ``[B, S, H, D]``, which is not."""

    run: Callable[[], Any]
    finish: Callable[[Any], torch.Tensor]


@dataclass(frozen=True)
class Peer:
    """module: what has to be importable; distribution: its name on PyPI. block_sizes: that it takes.

    devices, head_dims (None: any): where it runs.
    """

    module: str
    distribution: str
    block_sizes: tuple[int, ...]
    prepare: Callable[[Inputs, BlockLists], Prepared]
    devices: tuple[str, ...] = ("cuda",)
    head_dims: tuple[int, ...] | None = None
    capability: tuple[int, int] | None = None


@lru_cache(maxsize=1)
def _compiled_flex(*what: Any) -> Callable[..., torch.Tensor]:
    """FlexAttention compiled afresh for another shape: there is a limit to how many graphs one function may have."""
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    return torch.compile(flex_attention, dynamic=False)  # type: ignore[return-value]


def _flex(inputs: Inputs, lists: BlockLists) -> Prepared:
    from torch.nn.attention.flex_attention import BlockMask

    none = torch.zeros_like(lists.count)
    mask = BlockMask.from_kv_blocks(
        none[None],
        torch.zeros_like(lists.index)[None],
        lists.count[None],
        lists.index[None],
        BLOCK_SIZE=lists.block_size,
        seq_lengths=(inputs.q.shape[1], inputs.q.shape[1]),
    )
    attend = _compiled_flex(inputs.q.shape, inputs.q.dtype, inputs.q.device, lists.index.shape, lists.block_size)
    q, k, v = inputs.heads_first

    def run() -> torch.Tensor:
        return attend(q, k, v, block_mask=mask, scale=inputs.scale)

    return Prepared(run, lambda out: out.transpose(1, 2))


def _flash_attention_4(inputs: Inputs, lists: BlockLists) -> Prepared:
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch  # type: ignore[import-not-found]
    from flash_attn.cute.interface import _flash_attn_fwd  # type: ignore[import-not-found]

    count, index = lists.count[None], lists.index[None]
    tensors = BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(count),
        mask_block_idx=torch.zeros_like(index),
        full_block_cnt=count,
        full_block_idx=index,
        block_size=(lists.block_size, lists.block_size),
    )

    def run() -> Any:
        return _flash_attn_fwd(inputs.q, inputs.k, inputs.v, softmax_scale=inputs.scale, block_sparse_tensors=tensors)

    return Prepared(run, lambda out: out[0])


def _fastvideo(name: str) -> Callable[[Inputs, BlockLists], Prepared]:
    def prepare(inputs: Inputs, lists: BlockLists) -> Prepared:
        from fastvideo_kernel.block_sparse_attn import (  # type: ignore[import-not-found]
            block_sparse_attn_sm90,
            block_sparse_attn_triton,
        )

        attend = {"sm90": block_sparse_attn_sm90, "triton": block_sparse_attn_triton}[name]
        batch, seq, heads, _ = inputs.q.shape
        count, index = (x.expand(batch, *x.shape).contiguous() for x in lists.each_head(heads))
        q, k, v = inputs.padded(lists.block_size)

        def run() -> Any:
            return attend(q, k, v, index, count, lists.sizes)

        return Prepared(run, lambda out: out[0][:, :, :seq].transpose(1, 2))

    return prepare


#: Peers by name. xformers' ``memory_efficient_attention`` takes no block lists: it is among the dense kernels.
PEERS: dict[str, Peer] = {
    "flash_attention_4": Peer(
        "flash_attn.cute", "flash-attn-4", (128,), _flash_attention_4, capability=(9, 0), head_dims=(64, 96, 128)
    ),
    "flex_attention": Peer("torch.nn.attention.flex_attention", "torch", (128,), _flex, devices=("cuda", "cpu")),
    "fastvideo_vsa": Peer(
        "fastvideo_kernel", "fastvideo-kernel", (64,), _fastvideo("sm90"), capability=(9, 0), head_dims=(64, 128)
    ),
    "fastvideo_triton": Peer("fastvideo_kernel", "fastvideo-kernel", (64,), _fastvideo("triton"), head_dims=(64, 128)),
}


def cannot_run_peer(name: str, q: torch.Tensor) -> str | None:
    """Why a peer cannot run tensors like ``q`` ``[B, S, H, D]`` on this machine, or None."""
    if name not in PEERS:
        return f"unknown peer {name!r}; there are {', '.join(PEERS)}"
    peer = PEERS[name]
    try:
        found = importlib.util.find_spec(peer.module) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        return f"not installed (pip install {peer.distribution})"
    if q.device.type not in peer.devices:
        return f"it runs on {' or '.join(peer.devices)}, q is on {q.device}"
    if q.device.type == "cpu" and shutil.which("g++") is None:
        return "torch.compile on the CPU needs g++"
    if peer.capability is not None and torch.cuda.get_device_capability(q.device) < peer.capability:
        return f"it needs compute capability {peer.capability[0]}.{peer.capability[1]} or more"
    if peer.head_dims is not None and q.shape[3] not in peer.head_dims:
        return f"it takes head_dim {', '.join(map(str, peer.head_dims))}, got {q.shape[3]}"
    if peer.devices == ("cuda",) and q.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 or bfloat16, got {q.dtype}"
    return None
