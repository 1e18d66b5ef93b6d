"""The repair on a GPU: a tile of an output is read, multiplied by its head's map, added to, and written back."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["repair_kernel"]


@triton.jit
def repair_kernel(
    out_ptr,
    weight_ptr,
    bias_ptr,
    used_ptr,
    first,
    count,
    stride_b,
    stride_s,
    stride_h,
    item_maps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``TILES`` tiles of ``BLOCK_M`` tokens of one head and item, of tokens ``first`` to ``first + count``.

    weight ``[H, D, D]`` and bias ``[H, D]`` are contiguous. Those of the next item are ``item_maps`` maps on, 0 where
    all items have the same. With ``BLOCK_K`` below ``BLOCK_D`` products are taken in parts of so many
    channels: for large heads, and for fp32, whose operands fill registers.
    """
    h = tl.program_id(1).to(tl.int64)
    if tl.load(used_ptr + h) == 0:
        return
    offs_d = tl.arange(0, BLOCK_D)
    there = offs_d < D
    dtype = out_ptr.dtype.element_ty
    b = tl.program_id(2).to(tl.int64)
    base = out_ptr + b * stride_b + h * stride_h
    place = b * item_maps + h
    weight = weight_ptr + place * D * D
    bias = tl.load(bias_ptr + place * D + offs_d, mask=there, other=0.0).to(tl.float32)
    if BLOCK_K == BLOCK_D:
        w = tl.load(weight + offs_d[:, None] * D + offs_d[None, :], mask=there[:, None] & there[None, :], other=0.0)
        w = w.to(dtype)
    for t in range(0, TILES):
        row = (tl.program_id(0) * TILES + t) * BLOCK_M + tl.arange(0, BLOCK_M)
        live = row < count
        token = base + (first + row).to(tl.int64)[:, None] * stride_s
        inside = live[:, None] & there[None, :]
        if BLOCK_K == BLOCK_D:
            x = tl.load(token + offs_d[None, :], mask=inside, other=0.0)
            change = tl.dot(x, w, input_precision=PRECISION)
        else:
            change = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            for k0 in range(0, BLOCK_D, BLOCK_K):
                offs_k = k0 + tl.arange(0, BLOCK_K)
                part = offs_k < D
                x_part = tl.load(token + offs_k[None, :], mask=live[:, None] & part[None, :], other=0.0)
                w_at = weight + offs_k[:, None] * D + offs_d[None, :]
                w_part = tl.load(w_at, mask=part[:, None] & there[None, :], other=0.0).to(dtype)
                change = tl.dot(x_part, w_part, change, input_precision=PRECISION)
            # No thread writes before all have read.
            tl.debug_barrier()
            x = tl.load(token + offs_d[None, :], mask=inside, other=0.0)
        mended = x.to(tl.float32) + (change + bias[None, :])
        tl.store(token + offs_d[None, :], mended.to(dtype), mask=inside)
