"""q, k and v in 8 bits for the Hopper kernel: keys smoothed, one scale for each block of queries and of keys, one for
each channel of the values (SageAttention2, sections 3.2 and 3.3; SageAttention2++ for values in 8 bits).

Blocks lie padded one after another in their heads' orders, and values transposed, as the matrix units want them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from diffsparse.kernels.call import AttentionCall

__all__ = ["Quantized", "empty_quantized", "quantize", "smoothing", "value_order"]

#: Largest values of int8 (kept symmetric) and of float8 e4m3.
INT8_MAX, FP8_MAX = 127.0, 448.0


@dataclass(frozen=True)
class Quantized:
    """``B`` items, ``H`` heads, ``N`` blocks of ``block`` positions, ``D`` channels.

    q, k: int8 or float8 e4m3 ``[B, N * block, H, D]`` (a view; heads lie apart), zeros where a block is short.
    v: float8 e4m3 ``[B, D * N, H, block]`` (a view): of every block its values transposed, columns as
        :func:`value_order` has them.
    q_scale, k_scale: fp32 ``[B, H, N]``, v_scale: fp32 ``[B, H, D]``: ``x = x8 * scale``.
    k_mean, v_mean: fp32 ``[B, H, D]``, what was taken off before.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_scale: torch.Tensor
    k_scale: torch.Tensor
    v_scale: torch.Tensor
    k_mean: torch.Tensor
    v_mean: torch.Tensor


def value_order(block: int) -> torch.Tensor:
    """Which position of a block stands in each column of its values: int64 ``[block]``.

    A thread gets 8-bit operands four neighbours at a time, but has sums two at a time, so that of every 16 columns its
    own are made neighbours. The order of keys does not matter to a sum.
    """
    k = torch.arange(block)
    group, lane, pair, low = k // 16, k // 4 % 4, k // 2 % 2, k % 2
    return group * 16 + pair * 8 + lane * 2 + low


@triton.jit
def _quantize_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    q8,
    k8,
    v8,
    q_scale,
    k_scale,
    v_scale,
    k_mean,
    v_mean,
    gather_ptr,
    block_start,
    head_order,
    seq,
    num_blocks,
    stride_qb,
    stride_qs,
    stride_qh,
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
    FP8: tl.constexpr,
):
    i = tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    h64 = h.to(tl.int64)
    order = tl.load(head_order + h)
    start = tl.load(block_start + order * (num_blocks + 1) + i)
    length = tl.load(block_start + order * (num_blocks + 1) + i + 1) - start
    n = tl.arange(0, BLOCK)
    channel = tl.arange(0, BLOCK_D)
    there = channel < D
    bh = b * HEADS + h
    row = bh * num_blocks + i
    gather_row = gather_ptr + order.to(tl.int64) * seq
    token = tl.load(gather_row + start + n, mask=n < length, other=0).to(tl.int64)
    inside = (n < length)[:, None] & there[None, :]
    largest = 448.0 if FP8 else 127.0
    to = (row * BLOCK + n)[:, None] * D + channel[None, :]

    at = token[:, None] * stride_qs + channel[None, :]
    q = tl.load(q_ptr + b * stride_qb + h64 * stride_qh + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(q)), 1e-12) / largest
    tl.store(q_scale + row, scale)
    q = q / scale
    if not FP8:
        q = tl.where(q >= 0, q + 0.5, q - 0.5)
    tl.store(q8 + to, q.to(q8.dtype.element_ty), mask=there[None, :])

    at = token[:, None] * stride_ks + channel[None, :]
    k = tl.load(k_ptr + b * stride_kb + h64 * stride_kh + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(k_mean + bh * D + channel, mask=there, other=0.0)
    k = tl.where(inside, k - mean[None, :], 0.0)
    scale = tl.maximum(tl.max(tl.abs(k)), 1e-12) / largest
    tl.store(k_scale + row, scale)
    k = k / scale
    if not FP8:
        k = tl.where(k >= 0, k + 0.5, k - 0.5)
    tl.store(k8 + to, k.to(k8.dtype.element_ty), mask=there[None, :])

    # As value_order.
    n = n // 16 * 16 + n // 2 % 2 * 8 + n // 4 % 4 * 2 + n % 2
    token = tl.load(gather_row + start + n, mask=n < length, other=0).to(tl.int64)
    inside = (n < length)[:, None] & there[None, :]
    at = token[:, None] * stride_vs + channel[None, :]
    v = tl.load(v_ptr + b * stride_vb + h64 * stride_vh + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(v_mean + bh * D + channel, mask=there, other=0.0)
    scale = tl.load(v_scale + bh * D + channel, mask=there, other=1.0)
    v = tl.where(inside, (v - mean[None, :]) / scale[None, :], 0.0)
    to = (row * D + channel)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(v8 + to, tl.trans(v).to(v8.dtype.element_ty), mask=there[:, None])


def smoothing(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean key, mean value, and the values' scale in fp8, over all tokens: fp32 ``[B, H, D]`` each."""
    k_mean, v_mean = (x.mean(1, dtype=torch.float32).contiguous() for x in (k, v))
    high, low = v.amax(1).float(), v.amin(1).float()
    v_scale = torch.maximum(high - v_mean, v_mean - low).clamp_min(1e-12) / FP8_MAX
    return k_mean, v_mean, v_scale.contiguous()


def empty_quantized(call: AttentionCall) -> Quantized:
    """Room for a call's inputs in 8 bits; means and the values' scale are not worked out."""
    batch, _, heads, dim = call.q.shape
    n, block, device = call.num_blocks, call.block_size, call.q.device
    kind = torch.float8_e4m3fn if call.numerics == "fp8" else torch.int8
    q8, k8 = (torch.empty((batch, heads, n * block, dim), dtype=kind, device=device) for _ in range(2))
    v8 = torch.empty((batch, heads, n * dim, block), dtype=torch.float8_e4m3fn, device=device)
    q_scale, k_scale = (torch.empty((batch, heads, n), dtype=torch.float32, device=device) for _ in range(2))
    v_scale, k_mean, v_mean = (torch.empty((batch, heads, dim), dtype=torch.float32, device=device) for _ in range(3))
    q8, k8, v8 = (x.transpose(1, 2) for x in (q8, k8, v8))
    return Quantized(q8, k8, v8, q_scale, k_scale, v_scale, k_mean, v_mean)


def quantize(call: AttentionCall) -> Quantized:
    """All heads' q, k and v in 8 bits, in their heads' orders, in one pass after the means."""
    q, k, v = call.q, call.k, call.v
    batch, seq, heads, dim = q.shape
    k_mean, v_mean, v_scale = smoothing(k, v)
    out = replace(empty_quantized(call), k_mean=k_mean, v_mean=v_mean, v_scale=v_scale)
    _quantize_kernel[(call.num_blocks, heads, batch)](
        q, k, v, out.q, out.k, out.v, out.q_scale, out.k_scale, v_scale, k_mean, v_mean,
        call.gather, call.block_start, call.head_order, seq, call.num_blocks,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        HEADS=heads, D=dim, BLOCK_D=triton.next_power_of_2(dim), BLOCK=call.block_size, FP8=call.numerics == "fp8",
        num_warps=4 if call.block_size * dim <= 8192 else 8,
    )  # fmt: skip
    return out
