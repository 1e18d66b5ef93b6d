"""What the Triton kernel needs beside q, k and v where heads have tails: block summaries, and lists as bits."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from diffsparse.kernels.backends.triton.codes import (
    COLUMNS,
    GATHERED_COLUMN,
    IN_AUTO,
    TAIL_CENTROIDS,
    TAIL_COLUMN,
    TAIL_NONE,
)
from diffsparse.kernels.call import AttentionCall
from diffsparse.kernels.summaries import AXIS_STEPS

__all__ = ["kept_bits", "store_summary", "summaries", "summary_warps", "tokens_of", "variance_dtype"]

#: Blocks that one program sums up.
_RUN = 8


@triton.jit
def tokens_of(gather_ptr, block_start, order, i, seq, num_blocks, offs_n, GATHER: tl.constexpr):
    """Tokens of block ``i`` in an order, the first of them, and how many there are. A short block goes on with its
    first token."""
    start = tl.load(block_start + order * (num_blocks + 1) + i)
    length = tl.load(block_start + order * (num_blocks + 1) + i + 1) - start
    first = start.to(tl.int64)
    token = first + tl.where(offs_n < length, offs_n, 0)
    if GATHER:
        at = gather_ptr + order.to(tl.int64) * seq
        token = tl.load(at + token, mask=length > 0, other=0).to(tl.int64)
        first = tl.load(at + first, mask=length > 0, other=0).to(tl.int64)
    return token, first, length


@triton.jit
def store_summary(
    x,
    first_at,
    length,
    there,
    mean_to,
    variance_to,
    bh,
    i,
    num_blocks,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VARIANCE: tl.constexpr,
):
    """The mean of a block's ``length`` rows and, of keys, their variance.

    ``x``: the rows ``[BLOCK, BLOCK_D]``, then the first of them, which stands at ``first_at``, over again.
    """
    offs_d = tl.arange(0, BLOCK_D)
    # In one pass, relative to a row of the block: the squares then cancel by a factor of at most its length, however
    # far from zero, and near each other, the rows are. And those that repeat the first add nothing.
    first = tl.load(first_at, mask=there & (length > 0), other=0.0).to(tl.float32)
    x = x.to(tl.float32) - first[None, :]
    count = tl.maximum(length, 1).to(tl.float32)
    total = tl.sum(x, 0)
    at = mean_to + (bh * 2 * num_blocks + i) * D + offs_d
    tl.store(at, (first + total / count).to(mean_to.dtype.element_ty), mask=there)
    # Fetched in boxes, so that what lies behind the first means is multiplied too, with weights of 0.
    tl.store(at + num_blocks * D, tl.zeros([BLOCK_D], mean_to.dtype.element_ty), mask=there)
    if VARIANCE:
        variance = tl.maximum(tl.sum(x * x, 0) - total * total / count, 0.0) / count
        at = variance_to + (bh * num_blocks + i) * D + offs_d
        tl.store(at, variance.to(variance_to.dtype.element_ty), mask=there)


@triton.jit
def _sum_up(
    source, stride, mean_to, variance_to, gather_ptr, block_start, order, i, seq, num_blocks, bh,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, GATHER: tl.constexpr, VARIANCE: tl.constexpr,
):  # fmt: skip
    """Fetch block ``i`` of a head's keys or values, and store its summary."""
    there = tl.arange(0, BLOCK_D) < D
    offs_n = tl.arange(0, BLOCK)
    token, first, length = tokens_of(gather_ptr, block_start, order, i, seq, num_blocks, offs_n, GATHER)
    inside = there & (length > 0)
    x = tl.load(source[None, :] + token[:, None] * stride, mask=inside[None, :], other=0.0)
    first_at = source + first * stride
    store_summary(x, first_at, length, there, mean_to, variance_to, bh, i, num_blocks, D, BLOCK_D, VARIANCE)


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
    head_kind,
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
    RUN: tl.constexpr,
    CENTROIDS: tl.constexpr,
    STEPS: tl.constexpr,
    MOVED: tl.constexpr,
):
    """Summaries of ``RUN`` blocks of one head: two means of keys and values (``CENTROIDS``; heads with that tail), or
    means and variances, of keys or of values, each its own program (heads with other tails). Not of those that another
    pass puts in order and sums up (``MOVED``)."""
    h = tl.program_id(1)
    tail = tl.load(head_mode + h * COLUMNS + TAIL_COLUMN)
    if (tail == TAIL_NONE) | ((tail == TAIL_CENTROIDS) != CENTROIDS):
        return
    if (
        MOVED
        & (tail != TAIL_CENTROIDS)
        & (tl.load(head_mode + h * COLUMNS + GATHERED_COLUMN) != 0)
        & (tl.load(head_kind + h) == IN_AUTO)
    ):
        return
    part = tl.program_id(2)
    b = (part if CENTROIDS else part // 2).to(tl.int64)
    order = tl.load(head_order + h)
    offs_n = tl.arange(0, BLOCK)
    offs_d = tl.arange(0, BLOCK_D)
    there = offs_d < D
    h64 = h.to(tl.int64)
    begin = tl.program_id(0) * RUN
    end = tl.minimum(begin + RUN, num_blocks)
    if CENTROIDS:
        for i in range(begin, end):
            token, _first, length = tokens_of(gather_ptr, block_start, order, i, seq, num_blocks, offs_n, GATHER)
            live = offs_n < length
            inside = live[:, None] & there[None, :]
            # Two rows of summaries for each block: all first ones, then all second ones.
            at = ((b * HEADS + h) * 2 * num_blocks + i) * D + offs_d

            k_at = k_ptr + b * stride_kb + h64 * stride_kh + token[:, None] * stride_ks + offs_d[None, :]
            k = tl.load(k_at, mask=inside, other=0.0).to(tl.float32)
            v_at = v_ptr + b * stride_vb + h64 * stride_vh + token[:, None] * stride_vs + offs_d[None, :]
            v = tl.load(v_at, mask=inside, other=0.0).to(tl.float32)
            mean = tl.sum(k, 0) / tl.maximum(length, 1).to(tl.float32)
            spread = tl.where(live[:, None], k - mean[None, :], 0.0)
            # As summaries.in_first_half: rank the keys along the principal axis, cut at the median.
            far = tl.argmax(tl.sum(spread * spread, 1), 0)
            axis = tl.sum(tl.where((offs_n == far)[:, None], spread, 0.0), 0)
            for _ in tl.static_range(STEPS):
                axis = axis / tl.maximum(tl.sqrt(tl.sum(axis * axis, 0)), 1e-30)
                axis = tl.sum(spread * tl.sum(spread * axis[None, :], 1)[:, None], 0)
            along = tl.where(live, tl.sum(spread * axis[None, :], 1), float("inf"))
            smaller = along[None, :] < along[:, None]
            tie = (along[None, :] == along[:, None]) & (offs_n[None, :] < offs_n[:, None])
            half = length // 2
            first = tl.sum((smaller | tie).to(tl.int32), 1) < half
            count = tl.maximum(half, 1).to(tl.float32)
            low_k = tl.sum(tl.where(first[:, None], k, 0.0), 0)
            low_v = tl.sum(tl.where(first[:, None], v, 0.0), 0)
            tl.store(mean_k + at, (low_k / count).to(mean_k.dtype.element_ty), mask=there)
            tl.store(mean_v + at, (low_v / count).to(mean_v.dtype.element_ty), mask=there)
            count = tl.maximum(length - half, 1).to(tl.float32)
            high = num_blocks * D
            high_k = tl.sum(tl.where(first[:, None], 0.0, k), 0)
            high_v = tl.sum(tl.where(first[:, None], 0.0, v), 0)
            tl.store(mean_k + at + high, (high_k / count).to(mean_k.dtype.element_ty), mask=there)
            tl.store(mean_v + at + high, (high_v / count).to(mean_v.dtype.element_ty), mask=there)
    elif part % 2 == 0:
        source = k_ptr + b * stride_kb + h64 * stride_kh + offs_d
        for i in range(begin, end):
            _sum_up(
                source, stride_ks, mean_k, var_k, gather_ptr, block_start, order, i, seq, num_blocks, b * HEADS + h,
                D, BLOCK_D, BLOCK, GATHER, True,
            )  # fmt: skip
    else:
        source = v_ptr + b * stride_vb + h64 * stride_vh + offs_d
        for i in range(begin, end):
            _sum_up(
                source, stride_vs, mean_v, var_k, gather_ptr, block_start, order, i, seq, num_blocks, b * HEADS + h,
                D, BLOCK_D, BLOCK, GATHER, False,
            )  # fmt: skip


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


def summary_warps(block: int, columns: int, item_bytes: int) -> int:
    """Of a program that sums up whole blocks: so few that each thread adds up many rows itself (512 bytes, of which it
    asks for all at once), for what costs time is adding up the threads' sums."""
    return max(1, min(8, block * columns * item_bytes // 16384))


def summaries(call: AttentionCall, head_kinds: torch.Tensor | None = None, warmup: bool = False) -> Any:
    """Means of keys and values ``[B, H, 2, N, D]`` and variances of keys ``[B, H, N, D]``, worked out in fp32.

    Blocks of a head with the tail ``centroids`` have two means, those of other heads one, which comes first.
    Means are rounded to the inputs' dtype, as the keys and values they stand for have been: so the tail runs on the
    same matrix units, and a block of equal keys and values stays exact. Heads without a tail are left unwritten, and
    never read; second means of blocks that have one are 0. So are heads that ``gluon_sm90.prepare.reorder`` sums up,
    where the call is given with its ``head_kinds``. With ``warmup`` only compile, and return the kernels.
    """
    k, v = call.k, call.v
    batch, seq, heads, dim = k.shape
    shape = (batch, heads, 2, call.num_blocks, dim)
    mean_k, mean_v = (torch.empty(shape, dtype=k.dtype, device=k.device) for _ in range(2))
    var_k = torch.empty((batch, heads, call.num_blocks, dim), dtype=variance_dtype(k.dtype), device=k.device)
    args: list[Any] = [
        k,
        v,
        mean_k,
        mean_v,
        var_k,
        call.tokens.gather,
        call.tokens.block_start,
        call.tokens.head_order,
        call.heads.table,
    ]
    # Without kinds something stands in that decides nothing.
    args += [call.tokens.head_order if head_kinds is None else head_kinds, seq]
    args += [call.num_blocks, *k.stride()[:3], *v.stride()[:3]]
    columns = triton.next_power_of_2(dim)
    constants = dict(
        HEADS=heads,
        D=dim,
        BLOCK_D=columns,
        BLOCK=call.block_size,
        GATHER=call.tokens.needs_gather,
        RUN=_RUN,
        STEPS=AXIS_STEPS,
        MOVED=head_kinds is not None,
    )
    warps = summary_warps(call.block_size, columns, k.element_size())
    runs = -(-call.num_blocks // _RUN)
    # Each leaves the other's heads alone: the host does not know which there are.
    launches: list[tuple[tuple[int, ...], dict[str, Any]]] = [
        ((runs, heads, 2 * batch), {**constants, "CENTROIDS": False, "num_warps": warps}),
        (
            (runs, heads, batch),
            {**constants, "CENTROIDS": True, "num_warps": 4 if call.block_size * dim <= 8192 else 8},
        ),
    ]
    if warmup:
        return [_summary_kernel.warmup(*args, grid=grid, **options) for grid, options in launches]
    for grid, options in launches:
        _summary_kernel[grid](*args, **options)
    return mean_k, mean_v, var_k


def kept_bits(call: AttentionCall) -> torch.Tensor:
    """The kept blocks of every row as bits, int32 ``[H * N, ceil(N / 32)]``: bit ``j % 32`` of word ``j // 32``."""
    words = -(-call.num_blocks // 32)
    rows = call.index.num_heads * call.num_blocks
    bits = torch.empty(rows, words, dtype=torch.int32, device=call.index.col_idx.device)
    _bits_kernel[(rows,)](
        bits, call.index.row_ptr, call.index.col_idx, words, WORDS=triton.next_power_of_2(words), CHUNK=64, num_warps=1
    )
    return bits
