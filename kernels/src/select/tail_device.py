"""The kernels of the rule ``tail_error``: a mean query's sum over all keys, and what blocks add beyond their means."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["excess_kernel", "sum_kernel"]


@triton.jit
def sum_kernel(
    q_ptr, k_ptr, count_ptr, lse_ptr, blocks, item_counts,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``log sum n_i e^{q . k_i}`` over the parts of all blocks, which have ``n_i`` tokens: fp32 ``[B, H, N]``.

    q: fp32 ``[B, H, N, D]``, scaled. k: ``[B, H, N * PARTS, D]``. count: int64 ``[H or 1, N * PARTS]``;
    ``item_counts``: from a head's counts to the next one's.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    h = tl.program_id(1)
    base = (tl.program_id(2).to(tl.int64) * HEADS + h) * blocks
    channel = tl.arange(0, BLOCK_D)
    there = channel < D
    at = q_ptr + (base + row)[:, None] * D + channel[None, :]
    q = tl.load(at, mask=(row < blocks)[:, None] & there[None, :], other=0.0).to(k_ptr.dtype.element_ty)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    keys = blocks * PARTS
    for n0 in range(0, keys, BLOCK_N):
        key = n0 + tl.arange(0, BLOCK_N)
        number = tl.load(count_ptr + h * item_counts + key, mask=key < keys, other=0).to(tl.float32)
        keys_at = k_ptr + (base * PARTS + key)[:, None] * D + channel[None, :]
        k = tl.load(keys_at, mask=(key < keys)[:, None] & there[None, :], other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        logits = tl.where((number > 0)[None, :], logits, float("-inf"))
        larger = tl.maximum(top, tl.max(logits, 1))
        shift = tl.where(larger == float("-inf"), 0.0, larger)  # -inf - -inf is NaN
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(logits - shift[:, None]) * number[None, :], 1)
        top = larger
    lse = tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))
    tl.store(lse_ptr + base + row, lse, mask=row < blocks)


@triton.jit
def excess_kernel(
    q_ptr, k_ptr, count_ptr, products_ptr, lse_ptr, out_ptr, blocks, each, item_counts,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``log |sum_i n_i (e^{s_i} - e^{s}) v_i|^2`` of ``each`` blocks of keys: fp32 ``[B, H, N, N]``.

    ``s_i`` are a mean query's logits with the parts of a block less the log-sum-exp over all keys, and ``s`` is their
    mean, which is the logit of the block's mean key. products: fp32 ``[B, H, N, PARTS, PARTS]``, of the parts' values
    with each other. Other arguments as of :func:`sum_kernel`.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    item = tl.program_id(2) // HEADS
    h = tl.program_id(2) % HEADS
    base = (item.to(tl.int64) * HEADS + h) * blocks
    channel = tl.arange(0, BLOCK_D)
    there = channel < D
    part = tl.arange(0, BLOCK_P)
    some = part < PARTS
    at = q_ptr + (base + row)[:, None] * D + channel[None, :]
    q = tl.load(at, mask=(row < blocks)[:, None] & there[None, :], other=0.0).to(k_ptr.dtype.element_ty)
    lse = tl.load(lse_ptr + base + row, mask=row < blocks, other=0.0)
    first = tl.program_id(1) * each
    for j in range(first, tl.minimum(first + each, blocks)):
        number = tl.load(count_ptr + h * item_counts + j * PARTS + part, mask=some, other=0).to(tl.float32)
        keys_at = k_ptr + ((base + j) * PARTS + part)[:, None] * D + channel[None, :]
        k = tl.load(keys_at, mask=some[:, None] & there[None, :], other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) - lse[:, None]
        mean = tl.sum(logits * number[None, :], 1) / tl.maximum(tl.sum(number, 0), 1.0)
        excess = (tl.exp(logits) - tl.exp(mean)[:, None]) * number[None, :]
        excess = tl.where((number > 0)[None, :], excess, 0.0)
        products_at = products_ptr + ((base + j) * PARTS + part)[:, None] * PARTS + part[None, :]
        products = tl.load(products_at, mask=some[:, None] & some[None, :], other=0.0)
        error = tl.sum(tl.dot(excess, products, input_precision="ieee") * excess, 1)
        score = tl.where(error > 0, tl.log(tl.where(error > 0, error, 1.0)), float("-inf"))
        tl.store(out_ptr + (base + row) * blocks + j, score, mask=row < blocks)
