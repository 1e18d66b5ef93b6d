"""The lists of a packed layout, made on the GPU for one call: what is kept between calls is a bit a block pair."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from diffsparse.blocks import BlockIndex
from diffsparse.tokens import TokenLayout

__all__ = ["unpack_lists"]


@triton.jit
def _kept(bit_row, start_row, j, num_blocks, text_before, visual_end, BLOCK: tl.constexpr):
    """Of every block 16 times its kind, and 1 at that bit where it is kept, else 0.

    Kinds are text before the video, its full blocks, its short ones, text after it: as in ``TokenLayout.kinds``.
    """
    exists = j < num_blocks
    start = tl.load(start_row + j, mask=exists, other=0)
    end = tl.load(start_row + j + 1, mask=exists, other=0)
    kind = tl.where(end - start < BLOCK, 2, 1)
    kind = tl.where(start < text_before, 0, kind)
    kind = tl.where(start >= visual_end, 3, kind)
    byte = tl.load(bit_row + j // 8, mask=exists, other=0).to(tl.int32)
    shift = (16 * kind).to(tl.int64)
    return shift, ((byte >> (j % 8)) & 1).to(tl.int64) << shift


@triton.jit
def _unpack_kernel(
    bits,
    row_ptr,
    col_idx,
    block_start,
    head_order,
    num_blocks,
    row_bytes,
    text_before,
    visual_end,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0)
    at = tl.load(row_ptr + row)
    if tl.load(row_ptr + row + 1) == at:
        return
    start_row = block_start + tl.load(head_order + row // num_blocks) * (num_blocks + 1)
    bit_row = bits + row.to(tl.int64) * row_bytes
    # What is before the blocks of each kind in the list, 16 bits each.
    total = tl.zeros([], tl.int64)
    for first in range(0, num_blocks, WIDTH):
        j = first + tl.arange(0, WIDTH)
        _, one = _kept(bit_row, start_row, j, num_blocks, text_before, visual_end, BLOCK)
        total += tl.sum(one, 0)
    before = (total << 16) + (total << 32) + (total << 48)
    for first in range(0, num_blocks, WIDTH):
        j = first + tl.arange(0, WIDTH)
        shift, one = _kept(bit_row, start_row, j, num_blocks, text_before, visual_end, BLOCK)
        place = ((before + tl.cumsum(one, 0) - one) >> shift) & 0xFFFF
        tl.store(col_idx + at + place.to(tl.int32), j, mask=one != 0)
        before += tl.sum(one, 0)


def unpack_lists(packed: BlockIndex, tokens: TokenLayout, width: int = 1024, warmup: bool = False) -> Any:
    """``col_idx`` of a packed index that serves all items: int32, longer than its lists are.

    How long they are is known on the GPU alone, and asking would make it wait. ``width``: blocks looked at at once.
    """
    bits, row_ptr = packed.col_idx[0], packed.row_ptr[0]
    rows, row_bytes = bits.shape
    n = packed.num_blocks
    if n >= 1 << 16:
        raise ValueError(
            f"packed layouts hold up to 65,535 blocks a head, got {n:,}; take larger blocks or a smaller grid"
        )
    col_idx = torch.empty(rows * n, dtype=torch.int32, device=bits.device)
    args = [bits, row_ptr, col_idx, tokens.block_start, tokens.head_order, n, row_bytes]
    args += [tokens.text_before, tokens.text_before + tokens.num_visual]
    constants = dict(BLOCK=tokens.block_size, WIDTH=width, num_warps=4)
    if warmup:
        return _unpack_kernel.warmup(*args, grid=(rows,), **constants)
    _unpack_kernel[(rows,)](*args, **constants)
    return col_idx
