"""The lists of a packed layout, made on the GPU for one call: what is kept between calls is a bit a block pair."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from diffsparse.kernels.call import AttentionCall

__all__ = ["unpack_lists"]


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
    # Text before the video, its full blocks, its short ones, text after it: as in ``layout.block_kinds``.
    for kind in range(4):
        for first in range(0, num_blocks, WIDTH):
            j = first + tl.arange(0, WIDTH)
            exists = j < num_blocks
            start = tl.load(start_row + j, mask=exists, other=0)
            end = tl.load(start_row + j + 1, mask=exists, other=0)
            own = tl.where(end - start < BLOCK, 2, 1)
            own = tl.where(start < text_before, 0, own)
            own = tl.where(start >= visual_end, 3, own)
            byte = tl.load(bit_row + j // 8, mask=exists, other=0).to(tl.int32)
            kept = ((byte >> (j % 8)) & 1) * (own == kind).to(tl.int32)
            tl.store(col_idx + at + tl.cumsum(kept, 0) - 1, j, mask=kept != 0)
            at += tl.sum(kept, 0)


def unpack_lists(call: AttentionCall, bits: torch.Tensor, width: int = 1024, warmup: bool = False) -> Any:
    """``col_idx`` of a call from the bits ``[H * N, ceil(N / 8)]`` of its layout: int32, longer than its lists are.

    How long they are is known on the GPU alone, and asking would make it wait. ``width``: blocks looked at at once.
    """
    rows, row_bytes = bits.shape
    n = call.num_blocks
    col_idx = torch.empty(rows * n, dtype=torch.int32, device=bits.device)
    args = [bits, call.row_ptr, col_idx, call.block_start, call.head_order, n, row_bytes]
    args += [call.text_before, call.text_before + call.num_visual]
    constants = dict(BLOCK=call.block_size, WIDTH=width, num_warps=4)
    if warmup:
        return _unpack_kernel.warmup(*args, grid=(rows,), **constants)
    _unpack_kernel[(rows,)](*args, **constants)
    return col_idx
