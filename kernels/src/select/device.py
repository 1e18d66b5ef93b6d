"""The kernels: statistics of blocks of tokens, and what is kept of rows of scores. Numbers are compared, not sorted."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["best_kernel", "parts_kernel", "parts_score_kernel", "prefix_kernel", "reach_kernel"]

#: The key of what may not be kept: below that of every number.
_LOWEST = tl.constexpr(-(2**31))


@triton.jit
def parts_kernel(
    x_ptr, gather_ptr, start_ptr, order_ptr, mean_ptr, least_ptr, largest_ptr, seq, blocks,
    stride_b, stride_s, stride_h,
    HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
    UNIT: tl.constexpr, BOUNDS: tl.constexpr,
):  # fmt: skip
    """The mean rows of a block's ``PARTS`` runs; with ``BOUNDS`` its least and largest numbers, channel by channel.

    Writes fp32 ``[B, H, N, PARTS, D]``; 0 of a part without tokens. With ``UNIT`` every row is brought to length 1.
    """
    n = tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    order = tl.load(order_ptr + h).to(tl.int64)
    start = tl.load(start_ptr + order * (blocks + 1) + n)
    length = tl.load(start_ptr + order * (blocks + 1) + n + 1) - start
    place = tl.arange(0, WIDTH)
    channel = tl.arange(0, BLOCK_D)
    there = channel < D
    live = place < length
    token = tl.load(gather_ptr + order * seq + start + place, mask=live, other=0).to(tl.int64)
    inside = live[:, None] & there[None, :]
    at = x_ptr + b * stride_b + h.to(tl.int64) * stride_h + token[:, None] * stride_s + channel[None, :]
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    to = (b * HEADS + h) * blocks + n
    if BOUNDS:
        none = length == 0
        least = tl.min(tl.where(live[:, None], x, float("inf")), 0)
        largest = tl.max(tl.where(live[:, None], x, float("-inf")), 0)
        tl.store(least_ptr + to * D + channel, tl.where(none, 0.0, least), mask=there)
        tl.store(largest_ptr + to * D + channel, tl.where(none, 0.0, largest), mask=there)
    if UNIT:
        x = x / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1.1754943508222875e-38)[:, None]
    part = place * PARTS // tl.maximum(length, 1)
    for p in range(PARTS):
        mine = live & (part == p)
        count = tl.maximum(tl.sum(mine.to(tl.int32), 0), 1)
        mean = tl.sum(tl.where(mine[:, None], x, 0.0), 0) / count
        tl.store(mean_ptr + (to * PARTS + p) * D + channel, mean, mask=there)


@triton.jit
def _keys(x):
    """int32 that are ordered as these fp32 are."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # there is a negative zero
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _row(scores_ptr, candidates_ptr, row, n, BLOCK: tl.constexpr):
    """The keys of a row's scores, and which may be kept."""
    place = tl.arange(0, BLOCK)
    live = place < n
    may = tl.load(candidates_ptr + row * n + place, mask=live, other=0) != 0
    scores = tl.load(scores_ptr + row * n + place, mask=live, other=0.0)
    return tl.where(may, _keys(scores), _LOWEST), may, place


@triton.jit
def best_kernel(scores_ptr, candidates_ptr, wanted_ptr, mask_ptr, n, BLOCK: tl.constexpr):
    """The ``wanted`` largest candidates of a row, of equal ones the first. Scores are finite."""
    row = tl.program_id(0).to(tl.int64)
    keys, may, place = _row(scores_ptr, candidates_ptr, row, n, BLOCK)
    wanted = tl.load(wanted_ptr + row)
    # The largest threshold that so many reach, bit by bit; the sign first, which counts backwards.
    least = tl.where(tl.sum((keys >= 0).to(tl.int32), 0) >= wanted, 0, _LOWEST)
    for i in range(31):
        candidate = least + (1 << (30 - i))
        least = tl.where(tl.sum((keys >= candidate).to(tl.int32), 0) >= wanted, candidate, least)
    above = keys > least
    equal = (keys == least) & may
    rank = tl.cumsum(equal.to(tl.int32), 0)
    kept = above | (equal & (rank <= wanted - tl.sum(above.to(tl.int32), 0)))
    tl.store(mask_ptr + row * n + place, kept.to(tl.uint8), mask=place < n)


@triton.jit
def prefix_kernel(scores_ptr, candidates_ptr, weights_ptr, count_ptr, n, target, BLOCK: tl.constexpr):
    """How many of a row's best weigh ``target`` together: all, where they weigh less."""
    row = tl.program_id(0).to(tl.int64)
    keys, may, place = _row(scores_ptr, candidates_ptr, row, n, BLOCK)
    weights = tl.load(weights_ptr + row * n + place, mask=place < n, other=0.0)
    least = tl.where(tl.sum(tl.where(keys >= 0, weights, 0.0), 0) >= target, 0, _LOWEST)
    for i in range(31):
        candidate = least + (1 << (30 - i))
        least = tl.where(tl.sum(tl.where(keys >= candidate, weights, 0.0), 0) >= target, candidate, least)
    above = keys > least
    equal = (keys == least) & may
    missing = target - tl.sum(tl.where(above, weights, 0.0), 0)
    each = tl.max(tl.where(equal, weights, 0.0), 0)
    more = tl.where((each > 0) & (missing > 0), tl.ceil(missing / tl.where(each > 0, each, 1.0)), 0.0)
    number = tl.sum(equal.to(tl.int32), 0)
    more = tl.minimum(more, number.to(tl.float32)).to(tl.int32)  # the quotient may be larger than an integer
    tl.store(count_ptr + row, tl.sum(above.to(tl.int32), 0) + more)


@triton.jit
def reach_kernel(
    values_ptr, least_ptr, count_ptr, sum_ptr, n, rows, TRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How many values of a row reach each of its group's ``TRIES`` thresholds, and what those above 0 sum to."""
    row = tl.program_id(0).to(tl.int64)
    group = row // rows
    place = tl.arange(0, BLOCK)
    values = tl.load(values_ptr + row * n + place, mask=place < n, other=0.0)
    keys = tl.where(place < n, _keys(values), _LOWEST)
    for t in range(TRIES):
        # The lowest threshold is reached by all, and is the key of what stands behind a row's end.
        reached = (keys >= tl.load(least_ptr + group * TRIES + t)) & (place < n)
        tl.store(count_ptr + row * TRIES + t, tl.sum(reached.to(tl.int32), 0))
        tl.store(sum_ptr + row * TRIES + t, tl.sum(tl.where(reached, tl.maximum(values, 0.0), 0.0), 0))


@triton.jit
def parts_score_kernel(
    q_ptr, k_ptr, asking_ptr, asked_ptr, out_ptr, blocks, scale, item_counts,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``log sum exp(scale * q_a . k_b)`` over the parts ``a`` and ``b`` of a tile of pairs of blocks.

    q, k: fp32 ``[B, H, N, PARTS, D]``, contiguous. asking, asked: int64 ``[H or 1, N, PARTS]``, tokens of each part; a
    part without any takes no part. ``item_counts``: from a head's counts to the next one's.
    Writes fp32 ``[B, H, N, N]``.
    """
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    tiles = tl.cdiv(blocks, TILE)
    i = (tl.program_id(0) // tiles) * TILE + tl.arange(0, TILE)
    j = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)
    base = (b * HEADS + h) * blocks
    top = tl.full([TILE, TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE, TILE], tl.float32)
    for a in range(PARTS):
        real = tl.load(asking_ptr + h * item_counts + i * PARTS + a, mask=i < blocks, other=0) > 0
        for c in range(PARTS):
            exists = tl.load(asked_ptr + h * item_counts + j * PARTS + c, mask=j < blocks, other=0) > 0
            logits = tl.zeros([TILE, TILE], tl.float32)
            for d0 in range(0, D, BLOCK_D):
                channel = d0 + tl.arange(0, BLOCK_D)
                row = ((base + i) * PARTS + a)[:, None] * D + channel[None, :]
                q = tl.load(q_ptr + row, mask=(i < blocks)[:, None] & (channel < D)[None, :], other=0.0)
                row = ((base + j) * PARTS + c)[:, None] * D + channel[None, :]
                k = tl.load(k_ptr + row, mask=(j < blocks)[:, None] & (channel < D)[None, :], other=0.0)
                logits = tl.dot(q, tl.trans(k), logits, input_precision=PRECISION)
            logits *= scale
            logits = tl.where(real[:, None] & exists[None, :], logits, float("-inf"))
            larger = tl.maximum(top, logits)
            shift = tl.where(larger == float("-inf"), 0.0, larger)  # -inf - -inf is NaN
            total = total * tl.exp(top - shift) + tl.exp(logits - shift)
            top = larger
    score = tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))
    to = (base + i)[:, None] * blocks + j[None, :]
    tl.store(out_ptr + to, score, mask=(i < blocks)[:, None] & (j < blocks)[None, :])
