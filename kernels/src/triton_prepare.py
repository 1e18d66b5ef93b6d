"""What the Triton kernel needs beside q, k and v where heads have tails: block summaries, and lists as bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from diffsparse.kernels.call import AttentionCall

__all__ = ["kept_bits", "summaries", "variance_dtype"]


@triton.jit
def _summary_kernel(
    k_ptr,
    v_ptr,
    mean_k,
    mean_v,
    var_k,
    gather_ptr,
    block_start,
    head_order,
    head_mode,
    seq,
    num_blocks,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    GATHER: tl.constexpr,
):
    i = tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    if tl.load(head_mode + h * 4 + 1) == 0:
        return
    order = tl.load(head_order + h)
    start = tl.load(block_start + order * (num_blocks + 1) + i)
    length = tl.load(block_start + order * (num_blocks + 1) + i + 1) - start
    offs_n = tl.arange(0, BLOCK)
    offs_d = tl.arange(0, BLOCK_D)
    live = offs_n < length
    token = (start + offs_n).to(tl.int64)
    if GATHER:
        token = tl.load(gather_ptr + order.to(tl.int64) * seq + token, mask=live, other=0).to(tl.int64)
    inside = live[:, None] & (offs_d[None, :] < D)
    h64 = h.to(tl.int64)
    count = tl.maximum(length, 1).to(tl.float32)
    at = ((b * HEADS + h) * num_blocks + i) * D + offs_d

    k_at = k_ptr + b * stride_kb + h64 * stride_kh + token[:, None] * stride_ks + offs_d[None, :]
    k = tl.load(k_at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(k, 0) / count
    tl.store(mean_k + at, mean.to(mean_k.dtype.element_ty), mask=offs_d < D)
    # Two passes: the mean of squares less the square of the mean cancels where a block's keys are nearly equal.
    spread = tl.where(live[:, None], k - mean[None, :], 0.0)
    tl.store(var_k + at, (tl.sum(spread * spread, 0) / count).to(var_k.dtype.element_ty), mask=offs_d < D)
    v_at = v_ptr + b * stride_vb + h64 * stride_vh + token[:, None] * stride_vs + offs_d[None, :]
    v = tl.load(v_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(mean_v + at, (tl.sum(v, 0) / count).to(mean_v.dtype.element_ty), mask=offs_d < D)


@triton.jit
def _bits_kernel(bits, row_ptr, col_idx, words, WORDS: tl.constexpr, CHUNK: tl.constexpr):
    row = tl.program_id(0)
    out = bits + row.to(tl.int64) * words
    offs_w = tl.arange(0, WORDS)
    tl.store(out + offs_w, tl.zeros([WORDS], tl.int32), mask=offs_w < words)
    tl.debug_barrier()
    first = tl.load(row_ptr + row)
    end = tl.load(row_ptr + row + 1)
    for at in range(first, end, CHUNK):
        entry = at + tl.arange(0, CHUNK)
        j = tl.load(col_idx + entry, mask=entry < end, other=0)
        tl.atomic_or(out + j // 32, tl.full([CHUNK], 1, tl.int32) << (j % 32), mask=entry < end)


def variance_dtype(dtype: torch.dtype) -> torch.dtype:
    """What variances are kept in beside inputs of ``dtype``: fp16 would overflow where keys are large."""
    return torch.float32 if dtype == torch.float32 else torch.bfloat16


def summaries(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean key, mean value and variance of keys of every block, ``[B, H, N, D]`` each, worked out in fp32.

    Means are rounded to the inputs' dtype, as the keys and values they stand for have been: so the tail runs on the
    same matrix units, and a block of equal keys and values stays exact. Heads without a tail are left unwritten, and
    never read.
    """
    k, v = call.k, call.v
    batch, seq, heads, dim = k.shape
    shape = (batch, heads, call.num_blocks, dim)
    mean_k, mean_v = (torch.empty(shape, dtype=k.dtype, device=k.device) for _ in range(2))
    var_k = torch.empty(shape, dtype=variance_dtype(k.dtype), device=k.device)
    _summary_kernel[(call.num_blocks, heads, batch)](
        k,
        v,
        mean_k,
        mean_v,
        var_k,
        call.gather,
        call.block_start,
        call.head_order,
        call.head_mode,
        seq,
        call.num_blocks,
        *(k.stride(0), k.stride(1), k.stride(2)),
        *(v.stride(0), v.stride(1), v.stride(2)),
        HEADS=heads,
        D=dim,
        BLOCK_D=triton.next_power_of_2(dim),
        BLOCK=call.block_size,
        GATHER=call.needs_gather,
        num_warps=4,
    )
    return mean_k, mean_v, var_k


def kept_bits(call: AttentionCall) -> torch.Tensor:
    """The kept blocks of every row as bits, int32 ``[H * N, ceil(N / 32)]``: bit ``j % 32`` of word ``j // 32``."""
    words = -(-call.num_blocks // 32)
    rows = call.row_ptr.shape[0] - 1
    bits = torch.empty(rows, words, dtype=torch.int32, device=call.col_idx.device)
    _bits_kernel[(rows,)](
        bits, call.row_ptr, call.col_idx, words, WORDS=triton.next_power_of_2(words), CHUNK=64, num_warps=1
    )
    return bits
