"""q, k and v in 8 bits for the Hopper kernel: keys smoothed, one scale for each block of queries and of keys, one for
each channel of the values (SageAttention2, sections 3.2 and 3.3; SageAttention2++ for values in 8 bits).

Queries and keys are turned first, by a Hadamard matrix with signs: their products stay, and what stands out in a few
channels is spread over all, so that a block's one scale serves them all (FlashAttention-3, section 3.3).
Blocks lie padded one after another in their heads' orders, and values transposed, as the matrix units want them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from diffsparse.entry import NUMERICS
from diffsparse.kernels.backends.gluon_sm90.prepare import head_kinds
from diffsparse.kernels.backends.triton.codes import (
    COLUMNS,
    IN_FP8,
    SKIP_COLUMN,
    TAIL_CENTROIDS,
    TAIL_COLUMN,
    TAIL_NONE,
)
from diffsparse.kernels.call import AttentionCall

__all__ = ["Quantized", "empty_quantized", "quantize", "rotation", "value_order"]

#: Largest value of float8 e4m3.
FP8_MAX = tl.constexpr(448.0)
#: 1.5 * 2^23: from here on fp32 has the integers, and nothing between them.
INTEGERS = tl.constexpr(12582912.0)
#: How the first pass runs: tokens that one program adds up, of which so many at a time, and how many times as many are
#: under way.
_FIRST = {"CHUNK": 1024, "ROWS": 8, "STAGES": 3, "num_warps": 4}
#: How the second pass runs: blocks that one program rounds, and how many it has under way. So few registers that two
#: programs share a multiprocessor.
_SECOND = {"RUN": 16, "STAGES": 3, "num_warps": 8, "maxnreg": 128}


@dataclass(frozen=True)
class Quantized:
    """``B`` items, ``H`` heads, ``N`` blocks of ``block`` positions, ``D`` channels; ``M`` blocks of keys and values,
    ``N`` and, where heads have tails, as many more as their summaries take.

    q, k: int8 or float8 e4m3 ``[B, N * block, H, D]`` and ``[B, M * block, H, D]`` (views; heads lie apart), zeros
        where a block is short.
    v: float8 e4m3 ``[B, D * M, H, block]`` (a view): of every block its values transposed, columns as
        :func:`value_order` has them.
    q_scale, k_scale: fp32 ``[B, H, N]`` and ``[B, H, M]``, v_scale: fp32 ``[B, H, D]``: ``x = x8 * scale``, of queries
        and keys turned by :func:`rotation`.
    k_mean, v_mean: fp32 ``[B, H, D]``, what was taken off before. turned_mean: ``k_mean``, turned.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_scale: torch.Tensor
    k_scale: torch.Tensor
    v_scale: torch.Tensor
    k_mean: torch.Tensor
    v_mean: torch.Tensor
    turned_mean: torch.Tensor


@lru_cache(maxsize=16)
def rotation(dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A Hadamard matrix whose rows have signs: ``[D, D]`` of +1 and -1; over ``sqrt(D)`` it turns vectors.

    ``D`` is a power of two. The signs, always the same, keep channels that stand out in a regular pattern apart.
    """
    matrix = torch.ones(1, 1)
    while len(matrix) < dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = torch.randint(0, 2, (dim, 1), generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
    return (signs * matrix).to(device, dtype)


def value_order(block: int) -> torch.Tensor:
    """Which position of a block stands in each column of its values: int64 ``[block]``.

    A thread gets 8-bit operands four neighbours at a time, but has sums two at a time, so that of every 16 columns its
    own are made neighbours. The order of keys does not matter to a sum.
    """
    k = torch.arange(block)
    group, lane, pair, low = k // 16, k // 4 % 4, k // 2 % 2, k % 2
    return group * 16 + pair * 8 + lane * 2 + low


@triton.jit
def _part_kernel(
    k_ptr,
    v_ptr,
    part,
    seq,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Of ``CHUNK`` tokens: sum of the keys, sum, largest and smallest of the values, channel by channel."""
    chunk = tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, D)
    k_row = k_ptr + b * stride_kb + h.to(tl.int64) * stride_kh + channel[None, :]
    v_row = v_ptr + b * stride_vb + h.to(tl.int64) * stride_vh + channel[None, :]
    k_sum = tl.zeros([ROWS, D], tl.float32)
    v_sum = tl.zeros([ROWS, D], tl.float32)
    high = tl.full([ROWS, D], float("-inf"), tl.float32)
    low = tl.full([ROWS, D], float("inf"), tl.float32)
    for n in tl.range(0, CHUNK, ROWS, num_stages=STAGES):
        token = (chunk * CHUNK + n + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        live = token < seq
        k_sum += tl.load(k_row + token * stride_ks, mask=live, other=0.0).to(tl.float32)
        v = tl.load(v_row + token * stride_vs, mask=live, other=0.0).to(tl.float32)
        v_sum += v
        high = tl.maximum(high, tl.where(live, v, float("-inf")))
        low = tl.minimum(low, tl.where(live, v, float("inf")))
    to = part + ((b * HEADS + h) * tl.num_programs(0) + chunk) * 4 * D + channel
    tl.store(to, tl.sum(k_sum, 0))
    tl.store(to + D, tl.sum(v_sum, 0))
    tl.store(to + 2 * D, tl.max(high, 0))
    tl.store(to + 3 * D, tl.min(low, 0))


@triton.jit
def _whole_kernel(part, turn, k_mean, turned_mean, v_mean, v_scale, seq, chunks, D: tl.constexpr, ROWS: tl.constexpr):
    """From the parts of all tokens: mean key, as it is and turned; mean and scale of the values."""
    bh = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, D)
    k_sum = tl.zeros([ROWS, D], tl.float32)
    v_sum = tl.zeros([ROWS, D], tl.float32)
    high = tl.full([ROWS, D], float("-inf"), tl.float32)
    low = tl.full([ROWS, D], float("inf"), tl.float32)
    for n in range(0, chunks, ROWS):
        chunk = n + tl.arange(0, ROWS)[:, None]
        live = chunk < chunks
        at = part + (bh * chunks + chunk) * 4 * D + channel[None, :]
        k_sum += tl.load(at, mask=live, other=0.0)
        v_sum += tl.load(at + D, mask=live, other=0.0)
        high = tl.maximum(high, tl.load(at + 2 * D, mask=live, other=float("-inf")))
        low = tl.minimum(low, tl.load(at + 3 * D, mask=live, other=float("inf")))
    mean = tl.sum(k_sum, 0) / seq
    tl.store(k_mean + bh * D + channel, mean)
    turned = tl.sum(mean[:, None] * tl.load(turn + channel[:, None] * D + channel[None, :]).to(tl.float32), 0)
    tl.store(turned_mean + bh * D + channel, turned)
    mean = tl.sum(v_sum, 0) / seq
    tl.store(v_mean + bh * D + channel, mean)
    widest = tl.maximum(tl.max(high, 0) - mean, mean - tl.min(low, 0))
    tl.store(v_scale + bh * D + channel, tl.maximum(widest, 1e-12) / FP8_MAX)


@triton.jit
def _rows(source, stride, starts, tokens, i, n, channel):
    """Rows of one block in its head's order, and which of them it has."""
    start = tl.load(starts + i)
    live = n < tl.load(starts + i + 1) - start
    token = tl.load(tokens + start + n, mask=live, other=0).to(tl.int64)
    rows = tl.load(source + token[:, None] * stride + channel[None, :], mask=live[:, None], other=0.0)
    return rows, live[:, None]


@triton.jit
def _turned(x, inside, matrix, mean):
    """Rows of queries or keys times the rotation, less ``mean``; zeros where there is none."""
    return tl.where(inside, tl.dot(x, matrix, input_precision="ieee") - mean[None, :], 0.0)


@triton.jit
def _store_eight(x, x8, at, scale_at, D: tl.constexpr, FP8: tl.constexpr):
    """Rows of one block with a scale of their own; of a rotation that makes vectors ``sqrt(D)`` times as long."""
    largest = FP8_MAX if FP8 else 127.0
    scale = tl.maximum(tl.max(tl.abs(x)), 1e-12) / largest
    tl.store(scale_at, scale / D**0.5)
    x = x * (1.0 / scale)
    if FP8:
        tl.store(x8 + at, x.to(x8.dtype.element_ty))
    else:
        # The sum is rounded to a whole number, which stands in its low bits: a conversion would take 8 times as long.
        tl.store(x8 + at, (x + INTEGERS).to(tl.int32, bitcast=True).to(tl.int8))


@triton.jit
def _store_values(v, inside, v8, row, mean, inverse, D: tl.constexpr, BLOCK: tl.constexpr):
    """The values of one block, transposed."""
    channel = tl.arange(0, D)
    v = tl.where(inside, (v.to(tl.float32) - mean[None, :]) * inverse[None, :], 0.0)
    to = (row * D + channel)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(v8 + to, tl.trans(v).to(v8.dtype.element_ty))


@triton.jit
def _value_order(n):
    """As :func:`value_order`."""
    return n // 16 * 16 + n // 2 % 2 * 8 + n // 4 % 4 * 2 + n % 2


@triton.jit
def _quantize_means_kernel(
    mean_k,
    mean_v,
    k8,
    v8,
    k_scale,
    v_scale,
    turned_mean,
    v_mean,
    turn,
    head_mode,
    head_kind,
    num_blocks,
    blocks,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
):
    """Means of blocks, as blocks behind those of the keys."""
    i = tl.program_id(0)
    h = tl.program_id(1)
    tail = tl.load(head_mode + h * COLUMNS + TAIL_COLUMN)
    if (tail == TAIL_NONE) | (tl.load(head_mode + h * COLUMNS + SKIP_COLUMN) != 0) | (tl.load(head_kind + h) != KIND):
        return
    bh = tl.program_id(2).to(tl.int64) * HEADS + h
    row = bh * blocks + num_blocks + i
    n = tl.arange(0, BLOCK)
    channel = tl.arange(0, D)
    count = tl.where(tail == TAIL_CENTROIDS, 2 * num_blocks, num_blocks)
    inside = (i * BLOCK + n < count)[:, None]
    at = (bh * 2 * num_blocks + i * BLOCK + n)[:, None] * D + channel[None, :]
    matrix = tl.load(turn + channel[:, None] * D + channel[None, :])
    mean = tl.load(turned_mean + bh * D + channel)
    k = _turned(tl.load(mean_k + at, mask=inside, other=0.0), inside, matrix, mean)
    _store_eight(k, k8, (row * BLOCK + n)[:, None] * D + channel[None, :], k_scale + row, D, KIND == IN_FP8)
    n = _value_order(n)
    inside = (i * BLOCK + n < count)[:, None]
    at = (bh * 2 * num_blocks + i * BLOCK + n)[:, None] * D + channel[None, :]
    v = tl.load(mean_v + at, mask=inside, other=0.0)
    mean = tl.load(v_mean + bh * D + channel)
    inverse = 1.0 / tl.load(v_scale + bh * D + channel)
    _store_values(v, inside, v8, row, mean, inverse, D, BLOCK)


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
    turned_mean,
    v_mean,
    turn,
    gather_ptr,
    block_start,
    head_order,
    head_kind,
    seq,
    num_blocks,
    blocks,
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
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    RUN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``RUN`` blocks of the queries, of the keys or of the values, the next fetched while one is worked on."""
    h = tl.program_id(1)
    if tl.load(head_kind + h) != KIND:
        return
    which = tl.program_id(2) % 3
    b = (tl.program_id(2) // 3).to(tl.int64)
    h64 = h.to(tl.int64)
    bh = b * HEADS + h
    order = tl.load(head_order + h)
    starts = block_start + order * (num_blocks + 1)
    tokens = gather_ptr + order.to(tl.int64) * seq
    first = tl.program_id(0) * RUN
    end = tl.minimum(first + RUN, num_blocks)
    n = tl.arange(0, BLOCK)
    channel = tl.arange(0, D)
    at = n[:, None] * D + channel[None, :]
    matrix = tl.load(turn + channel[:, None] * D + channel[None, :])
    if which == 0:
        source = q_ptr + b * stride_qb + h64 * stride_qh
        for i in tl.range(first, end, num_stages=STAGES):
            q, inside = _rows(source, stride_qs, starts, tokens, i, n, channel)
            q = _turned(q, inside, matrix, tl.zeros([D], tl.float32))
            row = bh * num_blocks + i
            _store_eight(q, q8, row * BLOCK * D + at, q_scale + row, D, KIND == IN_FP8)
    elif which == 1:
        source = k_ptr + b * stride_kb + h64 * stride_kh
        mean = tl.load(turned_mean + bh * D + channel)
        for i in tl.range(first, end, num_stages=STAGES):
            k, inside = _rows(source, stride_ks, starts, tokens, i, n, channel)
            k = _turned(k, inside, matrix, mean)
            row = bh * blocks + i
            _store_eight(k, k8, row * BLOCK * D + at, k_scale + row, D, KIND == IN_FP8)
    else:
        source = v_ptr + b * stride_vb + h64 * stride_vh
        n = _value_order(n)
        mean = tl.load(v_mean + bh * D + channel)
        inverse = 1.0 / tl.load(v_scale + bh * D + channel)
        for i in tl.range(first, end, num_stages=STAGES):
            v, inside = _rows(source, stride_vs, starts, tokens, i, n, channel)
            _store_values(v, inside, v8, bh * blocks + i, mean, inverse, D, BLOCK)


def empty_quantized(call: AttentionCall, numerics: str) -> Quantized:
    """Room for a call's inputs in 8 bits."""
    batch, _, heads, dim = call.q.shape
    n, block, device = call.num_blocks, call.block_size, call.q.device
    m = n + (-(-2 * n // block) if call.has_tail else 0)
    kind = torch.float8_e4m3fn if numerics == "fp8" else torch.int8
    q8, k8 = (torch.empty((batch, heads, rows * block, dim), dtype=kind, device=device) for rows in (n, m))
    v8 = torch.empty((batch, heads, m * dim, block), dtype=torch.float8_e4m3fn, device=device)
    scales = (torch.empty((batch, heads, blocks), dtype=torch.float32, device=device) for blocks in (n, m))
    whole = (torch.empty((batch, heads, dim), dtype=torch.float32, device=device) for _ in range(4))
    return Quantized(*(x.transpose(1, 2) for x in (q8, k8, v8)), *scales, *whole)


def quantize(
    call: AttentionCall, numerics: str, means: tuple[torch.Tensor, torch.Tensor] | None = None, warmup: bool = False
) -> Any:
    """q, k and v of the heads that run in ``numerics``, in their heads' orders, in one pass after that for the means.

    ``means``: of keys and of values, of every block or its halves, ``[B, H, 2, N, D]``, where heads have tails. With
    ``warmup`` only compile, and return the kernels.
    """
    q, k, v, tokens = call.q, call.k, call.v, call.tokens
    batch, seq, heads, dim = q.shape
    out = empty_quantized(call, numerics)
    kinds, blocks = head_kinds(call), out.k_scale.shape[2]
    turn = rotation(dim, q.dtype, q.device)
    chunks = -(-seq // _FIRST["CHUNK"])
    part = torch.empty((batch, heads, chunks, 4, dim), dtype=torch.float32, device=q.device)
    shape = dict(HEADS=heads, D=dim)
    warps = _SECOND["num_warps"] // (2 if call.block_size * dim <= 8192 else 1)
    of_blocks = dict(shape, BLOCK=call.block_size, KIND=NUMERICS.index(numerics), num_warps=warps)
    launches: list[tuple[Any, tuple[int, ...], list[Any], dict[str, Any]]] = [
        (
            _part_kernel, (chunks, heads, batch), [k, v, part, seq, *k.stride()[:3], *v.stride()[:3]],
            dict(shape, **_FIRST),
        ),
        (
            _whole_kernel, (batch * heads,),
            [part, turn, out.k_mean, out.turned_mean, out.v_mean, out.v_scale, seq, chunks],
            dict(D=dim, ROWS=32, num_warps=8),
        ),
        (
            _quantize_kernel, (-(-call.num_blocks // _SECOND["RUN"]), heads, 3 * batch),
            [
                q, k, v, out.q, out.k, out.v, out.q_scale, out.k_scale, out.v_scale, out.turned_mean, out.v_mean, turn,
                tokens.gather, tokens.block_start, tokens.head_order, kinds, seq, call.num_blocks, blocks,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            ],
            {**_SECOND, **of_blocks},
        ),
    ]  # fmt: skip
    if means is not None:
        args: list[Any] = [*means, out.k, out.v, out.k_scale, out.v_scale, out.turned_mean, out.v_mean, turn]
        args += [call.heads.table, kinds, call.num_blocks, blocks]
        launches.append((_quantize_means_kernel, (blocks - call.num_blocks, heads, batch), args, of_blocks))
    if warmup:
        return [kernel.warmup(*args, grid=grid, **constants) for kernel, grid, args, constants in launches]
    for kernel, grid, args, constants in launches:
        kernel[grid](*args, **constants)
    return out
