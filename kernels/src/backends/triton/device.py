"""The Triton kernel: what runs on the device, any GPU that Triton supports. ``host`` launches it.

A program takes one tile of queries of one head through the head's list of kept key blocks and then, where the head has
a tail, through the summaries of the blocks that the list leaves out, all in one running softmax. Heads that read the
sequence in another order than the model's gather their keys by index in a launch of their own, so that the others pay
nothing for it; on sm90 and newer those others are fed by the tensor memory accelerator (TMA).
"""

from __future__ import annotations

import triton
import triton.language as tl

from diffsparse.kernels.backends.triton.codes import (
    COLUMNS,
    GATHERED_COLUMN,
    RAGGED,
    SKIP_COLUMN,
    TAIL_CENTROIDS,
    TAIL_COLUMN,
    TAIL_MEAN,
    TAIL_MOMENTS,
)

__all__ = ["forward_kernel"]


@triton.jit
def _softmax_step(acc, total, top, logits, factor, v, PRECISION: tl.constexpr, MASKED: tl.constexpr):
    """Take one tile of logits and values into the running softmax. ``logits * factor`` is to base 2; factor > 0."""
    new_top = tl.maximum(top, tl.max(logits, 1) * factor)
    if MASKED:
        # Nothing attended yet: -inf - -inf is NaN.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    else:
        shift = new_top
    # One fused multiply-add for each element.
    p = tl.math.exp2(logits * factor - shift[:, None])
    keep = tl.math.exp2(top - shift)
    total = total * keep + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision=PRECISION)
    return acc, total, new_top


@triton.jit
def _kept_blocks(
    acc,
    total,
    top,
    q,
    k_base,
    v_base,
    k_desc,
    v_desc,
    gather_row,
    start_row,
    mask_row,
    col_idx,
    first,
    jump_at,
    jump,
    count,
    b,
    h,
    stride_ks,
    stride_vs,
    factor,
    text_before,
    visual_end,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    GATHER: tl.constexpr,
    TMA: tl.constexpr,
):
    """Attend ``count`` listed blocks from entry ``first`` on, where entries from ``jump_at`` lie ``jump`` further on.

    Without ``MASKED`` every position of every block is taken to be attended.
    """
    SUB: tl.constexpr = BLOCK // BLOCK_N
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    for t in range(0, count * SUB):
        entry = t // SUB
        if MASKED:
            entry = tl.where(entry < jump_at, entry, entry + jump)
        j = tl.load(col_idx + first + entry)
        start = tl.load(start_row + j)
        row = start + (t % SUB) * BLOCK_N
        position = row + offs_n
        if MASKED:
            end = tl.load(start_row + j + 1)
            live = position < end
        if TMA:
            k = k_desc.load([b, h, row, 0]).reshape(BLOCK_N, BLOCK_D)
            v = v_desc.load([b, h, row, 0]).reshape(BLOCK_N, BLOCK_D)
        else:
            if GATHER:
                if MASKED:
                    token = tl.load(gather_row + position, mask=live, other=0).to(tl.int64)
                else:
                    token = tl.load(gather_row + position).to(tl.int64)
                k_ptr = k_base + token[:, None] * stride_ks + offs_d[None, :]
                v_ptr = v_base + token[:, None] * stride_vs + offs_d[None, :]
            else:
                k_ptr = k_base + row.to(tl.int64) * stride_ks + offs_n[:, None] * stride_ks + offs_d[None, :]
                v_ptr = v_base + row.to(tl.int64) * stride_vs + offs_n[:, None] * stride_vs + offs_d[None, :]
            if MASKED:
                inside = live[:, None] & (offs_d[None, :] < D)
                k = tl.load(k_ptr, mask=inside, other=0.0)
                v = tl.load(v_ptr, mask=inside, other=0.0)
            elif BLOCK_D == D:
                k = tl.load(k_ptr)
                v = tl.load(v_ptr)
            else:
                k = tl.load(k_ptr, mask=offs_d[None, :] < D, other=0.0)
                v = tl.load(v_ptr, mask=offs_d[None, :] < D, other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            if HAS_MASK:
                # Text tokens are where they are in every order, so that positions index the mask.
                text = live & ((position < text_before) | (position >= visual_end))
                live = live & (tl.load(mask_row + position, mask=text, other=1) != 0)
            logits = tl.where(live[None, :], logits, float("-inf"))
        acc, total, top = _softmax_step(acc, total, top, logits, factor, v, PRECISION, MASKED)
    return acc, total, top


@triton.jit
def _tail_blocks(
    acc,
    total,
    top,
    q,
    mean_k,
    mean_v,
    var_k,
    bits_row,
    start_row,
    scale,
    num_blocks,
    parts,
    text_before,
    visual_end,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
    MOMENTS: tl.constexpr,
):
    """Attend the summaries, ``parts`` (1 or 2) for each, of every visual block that the row does not keep."""
    LOG2: tl.constexpr = 1.4426950408889634
    offs_d = tl.arange(0, BLOCK_D)
    if MOMENTS:
        qs = q.to(tl.float32) * scale
        half_square = (qs * qs * (0.5 * LOG2)).to(var_k.dtype.element_ty)
    for n0 in tl.range(0, parts * num_blocks, BLOCK_T, num_stages=2):
        row = n0 + tl.arange(0, BLOCK_T)
        exists = row < parts * num_blocks
        second = row >= num_blocks
        n = tl.where(second, row - num_blocks, row)
        start = tl.load(start_row + n, mask=exists, other=0)
        length = tl.load(start_row + n + 1, mask=exists, other=0) - start
        word = tl.load(bits_row + n // 32, mask=exists, other=0)
        visual = (length > 0) & (start >= text_before) & (start < visual_end)
        dropped = exists & visual & (((word >> (n % 32)) & 1) == 0)
        first = tl.where(parts == 2, length // 2, length)
        length = tl.where(second, length - first, first)
        at = row[:, None] * D + offs_d[None, :]
        inside = exists[:, None] & (offs_d[None, :] < D)
        k = tl.load(mean_k + at, mask=inside, other=0.0)
        v = tl.load(mean_v + at, mask=inside, other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2)
        if MOMENTS:
            var = tl.load(var_k + at, mask=inside, other=0.0)
            logits = tl.dot(half_square, tl.trans(var), logits, input_precision=PRECISION)
        log_length = tl.math.log2(tl.maximum(length, 1).to(tl.float32))
        logits = tl.where((dropped & (length > 0))[None, :], logits + log_length[None, :], float("-inf"))
        acc, total, top = _softmax_step(acc, total, top, logits, 1.0, v, PRECISION, True)
    return acc, total, top


@triton.jit
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    q_desc,
    k_desc,
    v_desc,
    out_ptr,
    lse_ptr,
    gather_ptr,
    block_start,
    head_order,
    row_ptr,
    col_idx,
    head_mode,
    key_mask,
    mean_k,
    mean_v,
    var_k,
    bits,
    scale,
    seq,
    num_blocks,
    bit_words,
    text_before,
    visual_end,
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
    TEXT_BLOCKS_BEFORE: tl.constexpr,
    TEXT_BLOCKS_AFTER: tl.constexpr,
    SOME_PARTIAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    GATHER: tl.constexpr,
    TMA: tl.constexpr,
    RETURN_LSE: tl.constexpr,
):
    LOG2: tl.constexpr = 1.4426950408889634
    SUB_M: tl.constexpr = BLOCK // BLOCK_M
    h = tl.program_id(1)
    b = tl.program_id(2)
    mode = head_mode + h * COLUMNS
    gathered = tl.load(mode + GATHERED_COLUMN)
    if (gathered != 0) != GATHER:
        return
    i = tl.program_id(0) // SUB_M
    start_row = block_start + tl.load(head_order + h) * (num_blocks + 1)
    gather_row = gather_ptr + tl.load(head_order + h).to(tl.int64) * seq
    row = tl.load(start_row + i) + (tl.program_id(0) % SUB_M) * BLOCK_M
    end = tl.load(start_row + i + 1)
    if row >= end:
        return

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    position = row + offs_m
    live_m = position < end
    if GATHER:
        token = tl.load(gather_row + position, mask=live_m, other=0).to(tl.int64)
    else:
        token = position.to(tl.int64)
    inside = live_m[:, None] & (offs_d[None, :] < D)
    b64 = b.to(tl.int64)
    out_row = (b64 * seq + token) * HEADS + h

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if tl.load(mode + SKIP_COLUMN) == 0:
        if TMA:
            q = q_desc.load([b, h, row, 0]).reshape(BLOCK_M, BLOCK_D)
        else:
            q_base = q_ptr + b64 * stride_qb + h.to(tl.int64) * stride_qh
            q = tl.load(q_base + token[:, None] * stride_qs + offs_d[None, :], mask=inside, other=0.0)
        k_base = k_ptr + b64 * stride_kb + h.to(tl.int64) * stride_kh
        v_base = v_ptr + b64 * stride_vb + h.to(tl.int64) * stride_vh
        mask_row = key_mask + b64 * seq if HAS_MASK else key_mask
        first = tl.load(row_ptr + h * num_blocks + i)
        listed = tl.load(row_ptr + h * num_blocks + i + 1) - first
        plain = listed
        checked = 0
        if SOME_PARTIAL:
            # Short blocks are the last of their segments (ragged tiles apart), and lists are ascending: text, video,
            # text. So all but the last listed block of the video are full.
            plain = tl.maximum(listed - TEXT_BLOCKS_BEFORE - TEXT_BLOCKS_AFTER - 1, 0)
            plain = tl.where(gathered == RAGGED, 0, plain)
            checked = listed - plain
        skipped = TEXT_BLOCKS_BEFORE if SOME_PARTIAL else 0
        acc, total, top = _kept_blocks(
            acc, total, top, q, k_base, v_base, k_desc, v_desc, gather_row, start_row, mask_row, col_idx,
            first + skipped, 0, 0, plain, b, h, stride_ks, stride_vs, scale * LOG2, text_before, visual_end,
            D, BLOCK_D, BLOCK_N, BLOCK, PRECISION, False, False, GATHER, TMA,
        )  # fmt: skip
        if SOME_PARTIAL:
            jump_at = TEXT_BLOCKS_BEFORE
            acc, total, top = _kept_blocks(
                acc, total, top, q, k_base, v_base, k_desc, v_desc, gather_row, start_row, mask_row, col_idx,
                first, jump_at, plain, checked, b, h, stride_ks, stride_vs, scale * LOG2, text_before, visual_end,
                D, BLOCK_D, BLOCK_N, BLOCK, PRECISION, True, HAS_MASK, GATHER, TMA,
            )  # fmt: skip
        if HAS_TAIL:
            tail = tl.load(mode + TAIL_COLUMN)
            variances = (b64 * HEADS + h) * num_blocks * D
            summary = 2 * variances
            bits_row = bits + (h * num_blocks + i).to(tl.int64) * bit_words
            if (tail == TAIL_MEAN) | (tail == TAIL_CENTROIDS):
                parts = tl.where(tail == TAIL_CENTROIDS, 2, 1)
                acc, total, top = _tail_blocks(
                    acc, total, top, q, mean_k + summary, mean_v + summary, var_k, bits_row, start_row,
                    scale, num_blocks, parts, text_before, visual_end, D, BLOCK_D, BLOCK_T, PRECISION, False,
                )  # fmt: skip
            if tail == TAIL_MOMENTS:
                acc, total, top = _tail_blocks(
                    acc, total, top, q, mean_k + summary, mean_v + summary, var_k + variances, bits_row, start_row,
                    scale, num_blocks, 1, text_before, visual_end, D, BLOCK_D, BLOCK_T, PRECISION, True,
                )  # fmt: skip

    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out_ptr + out_row[:, None] * D + offs_d[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)
    if RETURN_LSE:
        lse = tl.where(total > 0, (top + tl.math.log2(total)) / LOG2, float("-inf"))
        tl.store(lse_ptr + out_row, lse, mask=live_m)
