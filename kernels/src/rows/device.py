"""The kernels: dense attention of a few queries, whose keys programs share, and what blocks of keys are worth."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["attend_kernel", "combine_kernel", "error_kernel"]

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend_kernel(
    q_ptr, k_ptr, v_ptr, rows_ptr, mask_ptr, acc_ptr, top_ptr, sum_ptr,
    seq, count, chunk, splits, scale,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    HEADS: tl.constexpr, HAS_MASK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of queries against a run of ``chunk`` keys, by the running softmax.

    Writes the sums of values, the largest logit (to base 2) and the sum of weights: fp32 ``[B, H, splits, count, D]``
    and ``[B, H, splits, count]``.
    """
    split = tl.program_id(0) % splits
    row = (tl.program_id(0) // splits) * BLOCK_M + tl.arange(0, BLOCK_M)
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    there = channel < D
    live = row < count
    token = tl.load(rows_ptr + row, mask=live, other=0)
    inside = live[:, None] & there[None, :]
    q_at = q_ptr + b * stride_qb + h * stride_qh + token[:, None] * stride_qs + channel[None, :]
    q = tl.load(q_at, mask=inside, other=0.0)
    factor = scale * _LOG2E
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    end = tl.minimum(seq, (split + 1) * chunk)
    for n0 in range(split * chunk, end, BLOCK_N):
        key = n0 + tl.arange(0, BLOCK_N)
        exists = key < end
        some = exists[:, None] & there[None, :]
        at = key.to(tl.int64)[:, None]
        k = tl.load(k_ptr + b * stride_kb + h * stride_kh + at * stride_ks + channel[None, :], mask=some, other=0.0)
        logits = tl.dot(q, tl.trans(k)) * factor
        if HAS_MASK:
            exists = exists & (tl.load(mask_ptr + b * seq + key, mask=exists, other=0) != 0)
        logits = tl.where(exists[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        # Nothing attended yet: -inf - -inf is NaN.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(logits - shift[:, None])
        keep = tl.exp2(top - shift)
        total = total * keep + tl.sum(p, 1)
        v = tl.load(v_ptr + b * stride_vb + h * stride_vh + at * stride_vs + channel[None, :], mask=some, other=0.0)
        acc = acc * keep[:, None] + tl.dot(p.to(v.dtype), v)
        top = new_top
    to = ((b * HEADS + h) * splits + split) * count + row
    tl.store(acc_ptr + to[:, None] * D + channel[None, :], acc, mask=inside)
    tl.store(top_ptr + to, top, mask=live)
    tl.store(sum_ptr + to, total, mask=live)


@triton.jit
def combine_kernel(
    acc_ptr, top_ptr, sum_ptr, out_ptr, lse_ptr, count, splits,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Join the parts of a tile's queries: outputs ``[B, count, H, D]`` and log-sum-exps ``[B, count, H]``."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    live = row < count
    inside = live[:, None] & (channel < D)[None, :]
    base = (b * HEADS + h) * splits * count + row
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for s in range(0, splits):
        top = tl.maximum(top, tl.load(top_ptr + base + s * count, mask=live, other=float("-inf")))
    shift = tl.where(top == float("-inf"), 0.0, top)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for s in range(0, splits):
        at = base + s * count
        share = tl.exp2(tl.load(top_ptr + at, mask=live, other=float("-inf")) - shift)
        total += share * tl.load(sum_ptr + at, mask=live, other=0.0)
        acc += share[:, None] * tl.load(acc_ptr + at[:, None] * D + channel[None, :], mask=inside, other=0.0)
    to = (b * count + row) * HEADS + h
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out_ptr + to[:, None] * D + channel[None, :], out, mask=inside)
    tl.store(lse_ptr + to, (shift + tl.log2(total)) / _LOG2E, mask=live)


@triton.jit
def error_kernel(
    q_ptr, k_ptr, v_ptr, length_ptr, out_ptr, lse_ptr, weights_ptr, means_ptr, along_ptr, squares_ptr, error_ptr,
    mass_ptr, rows, blocks, each, every, of_part, of_square, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of queries and ``each`` blocks of keys: mass, and the squared error of leaving each block out, by tail.

    With ``r`` what is left out and ``o`` the output, each a query's distance: a summary's value ``m`` of weight ``w``
    leaves ``|w (m - o) - r|^2``, which takes ``r.r``, ``r.o``, ``r.m``, and what is known without the keys.

    All arrays are contiguous: q, out, lse, k, v, ``weights [4, H, blocks, rows]``, ``means [3, H, blocks, D]`` and the
    results as in ``plain.block_errors``, ``along [3, H, blocks, rows]`` the products ``m.o``, and ``squares
    [4, H, blocks]`` those of ``m`` with itself, the last of both halves with each other. The next kind of weights,
    products or errors is ``every`` elements on, that of means ``of_part``, that of squares ``of_square``.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    h = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    there = channel < D
    live = row < rows
    inside = live[:, None] & there[None, :]
    at_row = h * rows + row
    q = tl.load(q_ptr + at_row[:, None] * D + channel[None, :], mask=inside, other=0.0)
    out = tl.load(out_ptr + at_row[:, None] * D + channel[None, :], mask=inside, other=0.0)
    lse = tl.load(lse_ptr + at_row, mask=live, other=0.0) * _LOG2E
    oo = tl.sum(out * out, 1)
    factor = scale * _LOG2E
    offs_n = tl.arange(0, BLOCK_N)
    first = tl.program_id(2) * each
    for j in range(first, tl.minimum(first + each, blocks)):
        block = h * blocks + j
        exists = offs_n < tl.load(length_ptr + j)
        at_key = (block * WIDTH + offs_n)[:, None] * D + channel[None, :]
        if WIDTH == BLOCK_N and D == BLOCK_D:
            k = tl.load(k_ptr + at_key)
            v = tl.load(v_ptr + at_key)
        else:
            some = (offs_n < WIDTH)[:, None] & there[None, :]
            k = tl.load(k_ptr + at_key, mask=some, other=0.0)
            v = tl.load(v_ptr + at_key, mask=some, other=0.0)
        logits = tl.dot(q, tl.trans(k)) * factor
        p = tl.where(exists[None, :], tl.exp2(logits - lse[:, None]), 0.0)
        z = tl.sum(p, 1)
        # What lies behind a block's length has no weight, and is finite.
        left_out = tl.dot(p.to(v.dtype), v) - z[:, None] * out
        rr = tl.sum(left_out * left_out, 1)
        ro = tl.sum(left_out * out, 1)
        at = block * rows + row
        tl.store(mass_ptr + at, z, mask=live)
        tl.store(error_ptr + at, rr, mask=live)
        value_at = means_ptr + block * D + channel
        whole = tl.load(value_at, mask=there, other=0.0)
        across = oo - 2 * tl.load(along_ptr + at, mask=live, other=0.0) + tl.load(squares_ptr + block)
        toward = tl.sum(left_out * whole[None, :], 1) - ro
        weight = tl.load(weights_ptr + at, mask=live, other=0.0)
        tl.store(error_ptr + every + at, tl.maximum(weight * (weight * across - 2 * toward) + rr, 0.0), mask=live)
        weight = tl.load(weights_ptr + every + at, mask=live, other=0.0)
        tl.store(error_ptr + 2 * every + at, tl.maximum(weight * (weight * across - 2 * toward) + rr, 0.0), mask=live)
        low = tl.load(weights_ptr + 2 * every + at, mask=live, other=0.0)
        high = tl.load(weights_ptr + 3 * every + at, mask=live, other=0.0)
        along_low = tl.load(along_ptr + every + at, mask=live, other=0.0)
        along_high = tl.load(along_ptr + 2 * every + at, mask=live, other=0.0)
        first_half = tl.load(value_at + of_part, mask=there, other=0.0)
        second_half = tl.load(value_at + 2 * of_part, mask=there, other=0.0)
        toward_low = tl.sum(left_out * first_half[None, :], 1) - ro
        toward_high = tl.sum(left_out * second_half[None, :], 1) - ro
        both = oo - along_low - along_high + tl.load(squares_ptr + 3 * of_square + block)
        low_across = oo - 2 * along_low + tl.load(squares_ptr + of_square + block)
        high_across = oo - 2 * along_high + tl.load(squares_ptr + 2 * of_square + block)
        error = low * (low * low_across - 2 * toward_low) + high * (high * high_across - 2 * toward_high)
        tl.store(error_ptr + 3 * every + at, tl.maximum(error + 2 * low * high * both + rr, 0.0), mask=live)
