"""What the Hopper kernel needs beside q, k, v and summaries: a work list, heads put in order, summaries' weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch.utils.weak import WeakIdKeyDictionary

from diffsparse.blocks import unpack_bits
from diffsparse.entry import NUMERICS
from diffsparse.kernels.backends.triton.codes import (
    COLUMNS,
    GATHERED_COLUMN,
    IN_AUTO,
    SKIP_COLUMN,
    TAIL_CENTROIDS,
    TAIL_COLUMN,
    TAIL_MEAN,
    TAIL_MOMENTS,
    TAIL_NONE,
)
from diffsparse.kernels.backends.triton.prepare import store_summary, summary_warps, tokens_of
from diffsparse.kernels.call import AttentionCall

__all__ = ["head_kinds", "reorder", "tail_bias", "work_list"]

#: Work lists of the layouts that are alive, and what their heads run in: by row pointers, then by what they are for.
_WORK: WeakIdKeyDictionary = WeakIdKeyDictionary()


def head_kinds(call: AttentionCall) -> torch.Tensor:
    """``AttentionCall.head_kinds``, kept as long as the layout is."""
    kept = _WORK.setdefault(call.index.row_ptr, {})
    key = (call.numerics, call.kinds)
    if key not in kept:
        kept[key] = call.head_kinds().contiguous()
    return kept[key]


def work_list(call: AttentionCall, group: int, numerics: str = "auto") -> torch.Tensor:
    """What the kernel's tiles are, int32 ``[H * N, 8]``. Kept as long as the layout is.

    Heads that run in other ``numerics`` than these have empty tiles. ``group`` heads after another run together, and
    stand together here. Of a group what takes longest comes first.

    A record: the first and the past-the-end position of its queries; where its list begins, how long it is and how many
    of its blocks are plain; ``tail + 4 * gathered + 16 * order + 65536 * head in its group``; head; query block. A list
    starts with the text before the video, then come the plain blocks, which are full and of the video; the rest has to
    be checked. Heads stay together, so that the keys and values of few heads are in use at a time and stay in the L2
    cache.
    """
    lists = _WORK.setdefault(call.index.row_ptr, {})
    key = (group, numerics, call.numerics, call.kinds)
    if key not in lists:
        lists[key] = _records(call, group, NUMERICS.index(numerics))
    return lists[key]


def _short_blocks(call: AttentionCall, starts: torch.Tensor) -> torch.Tensor:
    """How many blocks of the video in each row's list are short, int64 ``[H * N]``; ``starts`` is ``[H, N + 1]``."""
    first, end = starts[:, :-1], starts[:, 1:]
    visual = (first >= call.tokens.text_before) & (first < call.tokens.text_before + call.tokens.num_visual)
    short = visual & (end - first < call.block_size)
    n = call.num_blocks
    if call.packed is not None:  # one head after another: all at once would take more memory than the lists do
        bits = call.packed.col_idx[0].view(len(short), n, -1)
        return torch.cat([(unpack_bits(of_head, n) & row).sum(1) for of_head, row in zip(bits, short)])
    # What stands before the first list and behind the last is no part of them, and may be anything.
    ptr, column = call.index.row_ptr[0], call.index.col_idx
    entry = torch.arange(len(column), dtype=torch.int32, device=column.device)
    row = torch.searchsorted(ptr, entry, right=True) - 1
    inside = (row >= 0) & (row < short.numel())
    found = short[torch.where(inside, row, 0) // n, torch.where(inside, column, 0).long()] & inside
    return torch.nn.functional.pad(found.cumsum(0), (1, 0))[ptr.long()].diff()


def _records(call: AttentionCall, group: int, kind: int) -> torch.Tensor:
    heads, n, device = call.tokens.head_order.shape[0], call.num_blocks, call.index.row_ptr.device
    order = call.tokens.head_order.long()
    starts = call.tokens.block_start.view(-1, n + 1)[order]
    skipped, tail, _, gathered = call.heads.table.view(heads, 4).unbind(1)
    ours = head_kinds(call) == kind
    live = ((skipped == 0) & ours)[:, None]
    tail = tail * live[:, 0]
    listed = call.index.row_ptr.diff().view(heads, n) * live
    # Of the video only the last block is short, where no head has an order of its own.
    short = _short_blocks(call, starts).view(heads, n) if call.tokens.needs_gather else 1
    plain = (listed - sum(call.tokens.text_blocks) - short).clamp(min=0)
    head, index = torch.arange(heads, device=device), torch.arange(n, device=device)
    mode = tail + 4 * gathered + 16 * call.tokens.head_order + 65536 * (head % group)
    columns = (
        starts[:, :-1],
        torch.where(ours[:, None], starts[:, 1:], starts[:, :-1]),
        call.index.row_ptr[0, :-1].view(heads, n),
        listed,
        plain,
        mode[:, None].expand(heads, n),
        head[:, None].expand(heads, n),
        index.expand(heads, n),
    )
    records = torch.stack([x.to(torch.int32) for x in columns], dim=2)
    within = listed.argsort(dim=1, descending=True, stable=True)
    total = listed.sum(1)
    across = (head // group * (total.max() + 1) - total).argsort(stable=True)
    return records[across[:, None], within[across]].reshape(-1, 8).contiguous()


@triton.jit
def _bias_kernel(
    bias,
    row_ptr,
    col_idx,
    block_start,
    head_order,
    head_mode,
    num_blocks,
    text_before,
    visual_end,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    i = tl.program_id(0)
    h = tl.program_id(1)
    tail = tl.load(head_mode + h * COLUMNS + TAIL_COLUMN)
    if (tail == TAIL_NONE) | (tl.load(head_mode + h * COLUMNS + SKIP_COLUMN) != 0):
        return
    row = h * num_blocks + i
    out = bias + row.to(tl.int64) * 2 * num_blocks
    start_row = block_start + tl.load(head_order + h) * (num_blocks + 1)
    for n0 in range(0, num_blocks, WIDTH):
        n = n0 + tl.arange(0, WIDTH)
        exists = n < num_blocks
        start = tl.load(start_row + n, mask=exists, other=0)
        length = tl.load(start_row + n + 1, mask=exists, other=0) - start
        visual = (start >= text_before) & (start < visual_end)
        first = tl.where(tail == TAIL_CENTROIDS, length // 2, length)
        log = tl.where(visual & (first > 0), tl.math.log2(tl.maximum(first, 1).to(tl.float32)), float("-inf"))
        tl.store(out + n, log.to(tl.float16), mask=exists)
        if tail == TAIL_CENTROIDS:
            rest = length - first
            log = tl.where(visual & (rest > 0), tl.math.log2(tl.maximum(rest, 1).to(tl.float32)), float("-inf"))
            tl.store(out + num_blocks + n, log.to(tl.float16), mask=exists)
    # What is stored above is overwritten below, by other threads.
    tl.debug_barrier()
    first_entry = tl.load(row_ptr + row)
    end = tl.load(row_ptr + row + 1)
    for at in range(first_entry, end, CHUNK):
        entry = at + tl.arange(0, CHUNK)
        j = tl.load(col_idx + entry, mask=entry < end, other=0)
        none = tl.full([CHUNK], float("-inf"), tl.float16)
        tl.store(out + j, none, mask=entry < end)
        if tail == TAIL_CENTROIDS:
            tl.store(out + num_blocks + j, none, mask=entry < end)


@triton.jit
def _move(source, stride, token, inside, to, live):
    """Copy the rows of these tokens, and return them: all that are ``inside``, of which ``live`` ones are written."""
    x = tl.load(source[None, :] + token[:, None] * stride, mask=inside, other=0.0)
    tl.store(to, x, mask=live)
    return x


@triton.jit(do_not_specialize=["first_head"])
def _reorder_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    q_out,
    k_out,
    v_out,
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
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    first_head,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    SUMMED: tl.constexpr,
):
    """A block of the queries, of the keys or of the values of a head that has an order of its own; with ``SUMMED``,
    where the head has a tail, it is summed up too."""
    i = tl.program_id(0)
    local = tl.program_id(1)
    h = first_head + local
    if (tl.load(head_mode + h * COLUMNS + GATHERED_COLUMN) == 0) | (tl.load(head_kind + h) != IN_AUTO):
        return
    tail = tl.load(head_mode + h * COLUMNS + TAIL_COLUMN)
    summed = (tail == TAIL_MEAN) | (tail == TAIL_MOMENTS)
    which = tl.program_id(2) % 3
    b = (tl.program_id(2) // 3).to(tl.int64)
    h64 = h.to(tl.int64)
    order = tl.load(head_order + h)
    offs_n = tl.arange(0, BLOCK)
    channel = tl.arange(0, BLOCK_D)
    there = channel < D
    token, first, length = tokens_of(gather_ptr, block_start, order, i, seq, num_blocks, offs_n, True)
    inside = there[None, :] & (length > 0)
    live = there[None, :] & (offs_n < length)[:, None]
    start = tl.load(block_start + order * (num_blocks + 1) + i)
    to = ((b * GROUP + local) * seq + start + offs_n)[:, None] * D + channel[None, :]
    if which == 0:
        source = q_ptr + b * stride_qb + h64 * stride_qh + channel
        _move(source, stride_qs, token, inside, q_out + to, live)
    elif which == 1:
        source = k_ptr + b * stride_kb + h64 * stride_kh + channel
        x = _move(source, stride_ks, token, inside, k_out + to, live)
        if SUMMED:
            if summed:
                at = source + first * stride_ks
                store_summary(x, at, length, there, mean_k, var_k, b * HEADS + h, i, num_blocks, D, BLOCK_D, True)
    else:
        source = v_ptr + b * stride_vb + h64 * stride_vh + channel
        x = _move(source, stride_vs, token, inside, v_out + to, live)
        if SUMMED:
            if summed:
                at = source + first * stride_vs
                store_summary(x, at, length, there, mean_v, var_k, b * HEADS + h, i, num_blocks, D, BLOCK_D, False)


def tail_bias(call: AttentionCall, warmup: bool = False) -> Any:
    """What every row adds to the logits (to base 2) of its blocks' summaries: fp16 ``[H * N, 2 * N]``.

    That is log2 of a block's length where the row attends its summary, and -inf where it keeps the block or the block
    is text. A head with the tail ``centroids`` has all first halves, then all second ones; other heads write and read
    the first ``N`` columns only. Lengths of full blocks and halves are powers of two, so that fp16 has them exactly.
    """
    heads = call.tokens.num_heads
    rows = heads * call.num_blocks
    bias = torch.empty(rows, 2 * call.num_blocks, dtype=torch.float16, device=call.index.col_idx.device)
    args = [
        bias,
        call.index.row_ptr,
        call.index.col_idx,
        call.tokens.block_start,
        call.tokens.head_order,
        call.heads.table,
        call.num_blocks,
    ]
    args += [call.tokens.text_before, call.tokens.text_before + call.tokens.num_visual]
    constants = dict(WIDTH=256, CHUNK=128, num_warps=4)
    grid = (call.num_blocks, heads)
    if warmup:
        return _bias_kernel.warmup(*args, grid=grid, **constants)
    _bias_kernel[grid](*args, **constants)
    return bias


def reorder(
    call: AttentionCall,
    copies: Sequence[torch.Tensor],
    first_head: int,
    heads: int,
    means: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    warmup: bool = False,
) -> Any:
    """Put q, k and v of ``heads`` heads in their heads' orders, all three in one pass, and sum up their blocks.

    ``copies``: three tensors ``[B, group, S, D]``, written from their first head on. Heads that read the sequence in
    the model's order are left as they are, and so are those that run in 8 bits. ``means``: as
    :func:`triton.prepare.summaries` makes them; those of the heads in question are written, but for centroids.
    """
    batch, seq, num_heads, dim = call.q.shape
    columns = triton.next_power_of_2(dim)
    strides = [*call.q.stride()[:3], *call.k.stride()[:3], *call.v.stride()[:3]]
    args: list[Any] = [
        call.q,
        call.k,
        call.v,
        *copies,
        *(means or [call.tokens.gather] * 3),
        call.tokens.gather,
        call.tokens.block_start,
    ]
    args += [call.tokens.head_order, call.heads.table, head_kinds(call), seq, call.num_blocks, *strides, first_head]
    constants = dict(
        HEADS=num_heads,
        GROUP=copies[0].shape[1],
        D=dim,
        BLOCK_D=columns,
        BLOCK=call.block_size,
        SUMMED=means is not None,
        num_warps=summary_warps(call.block_size, columns, call.q.element_size()),
    )
    grid = (call.num_blocks, heads, 3 * batch)
    if warmup:
        return _reorder_kernel.warmup(*args, grid=grid, **constants)
    _reorder_kernel[grid](*args, **constants)
    return None
