"""The CPU backend: gather a few rows' kept blocks, multiply, softmax, multiply.

Query blocks are taken in chunks small enough for their logits to stay in cache, rows with similar numbers of kept blocks
together. A tail costs nothing of its own: summaries lie behind the blocks in the same table, so that a row's list simply
goes on with them, and one softmax covers both. Heads that keep every block go to torch's own attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from diffsparse.entry import TAILS
from diffsparse.kernels.call import SKIP, TAIL, AttentionCall
from diffsparse.kernels.summaries import summarize

__all__ = ["run"]

# Bytes of logits that one chunk of rows may take per thread. Measured on a core with 1 MB of L2: half a megabyte to one
# are equally good, more spills, less leaves matrix products too small.
_CHUNK_BYTES = 3 << 18
_MAX_ROWS = 16
# Rows whose counts differ by more than this share are not padded to each other.
_MAX_PADDING = 0.1


@dataclass(frozen=True)
class _HeadRows:
    """What one head does, for all items of the batch. ``N`` blocks of ``block`` positions.

    token: int64 ``[N * block]``, the model's token at each padded position (0 where there is none).
    valid: bool ``[N * block]``; all_valid: whether every block is full.
    length: int64 ``[N]``.  rows: row indices, most kept blocks first.  counts: kept blocks of those rows.
    ptr: int64 ``[N + 1]`` into ``columns``, int64.
    tail_bias: fp32 ``[N, N]``, ln n where a block is attended through its summary, -inf elsewhere; or None.
    """

    token: torch.Tensor
    valid: torch.Tensor
    all_valid: bool
    in_place: bool
    length: torch.Tensor
    rows: list[int]
    counts: list[int]
    ptr: torch.Tensor
    columns: torch.Tensor
    tail_bias: torch.Tensor | None
    moments: bool


class _Workspace:
    """Buffers reused over all chunks of a call: fresh memory costs a page fault for every 4 kB."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, name: str, *shape: int) -> torch.Tensor:
        size = math.prod(shape)
        held = self._buffers.get(name)
        if held is None or held.numel() < size:
            held = self._buffers[name] = torch.empty(size, dtype=torch.float32)
        return held[:size].view(shape)


def run(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[B, S, H, D]`` in the inputs' dtype, log-sum-exp fp32 ``[B, S, H]`` (empty unless asked for)."""
    batch, seq, heads, _ = call.q.shape
    n = call.num_blocks
    out = torch.empty(call.q.shape, dtype=call.q.dtype)
    lse = torch.empty((batch, seq, heads) if call.return_lse else (0,), dtype=torch.float32)
    kept = call.row_ptr.diff().view(heads, n).sum(1).tolist()
    real = (call.block_start.diff(dim=1) > 0).sum(1).tolist()
    order_of, modes = call.head_order.tolist(), call.head_mode.tolist()
    dense, space = [], _Workspace()
    for h in range(heads):
        if modes[h][SKIP]:
            out[:, :, h] = 0
            if call.return_lse:
                lse[:, :, h] = -math.inf
        elif kept[h] == real[order_of[h]] ** 2 and not call.return_lse:
            dense.append(h)
        else:
            rows = _head_rows(call, h, order_of[h], TAILS[modes[h][TAIL]])
            for b in range(batch):
                _attend(call, rows, b, h, out, lse, space)
    if len(dense) == heads:
        return _dense(call, call.q, call.k, call.v), lse
    if dense:
        out[:, :, dense] = _dense(call, *(x[:, :, dense] for x in (call.q, call.k, call.v)))
    return out, lse


def _dense(call: AttentionCall, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    mask = None if call.key_mask is None else call.key_mask[:, None, None, :]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=call.scale)
    return out.transpose(1, 2).contiguous()


def _head_rows(call: AttentionCall, head: int, order: int, tail: str) -> _HeadRows:
    n, block = call.num_blocks, call.block_size
    start = call.block_start[order].long()
    length = start.diff()
    offset = torch.arange(block)
    valid = (offset < length[:, None]).view(-1)
    position = (start[:-1, None] + offset).view(-1).masked_fill_(~valid, 0)
    token = call.gather[order].long()[position].masked_fill_(~valid, 0)
    ptr = call.row_ptr[head * n : (head + 1) * n + 1].long()
    columns = call.col_idx[int(ptr[0]) : int(ptr[-1])].long()
    ptr = ptr - ptr[0]
    count = ptr.diff()

    bias = None
    if tail != "none":
        bias = torch.where(call.visual_blocks(order), length.float().log(), -math.inf).expand(n, n).clone()
        bias[torch.repeat_interleave(torch.arange(n), count), columns] = -math.inf
        if bool(bias.isneginf().all()):
            bias = None
    counts, rows = count.sort(descending=True, stable=True)
    # A row with neither kept blocks nor a tail attends nothing; an empty block has no queries.
    used = length[rows] > 0 if bias is not None else (length[rows] > 0) & (counts > 0)
    all_valid = bool(valid.all())
    return _HeadRows(
        token=token,
        valid=valid,
        all_valid=all_valid,
        in_place=all_valid and not bool(call.head_mode[head, 3]),
        length=length,
        rows=rows[used].tolist(),
        counts=counts[used].tolist(),
        ptr=ptr,
        columns=columns,
        tail_bias=bias,
        moments=tail == "moments",
    )


def _padded(x: torch.Tensor, head: _HeadRows, buffer: torch.Tensor) -> torch.Tensor:
    """One head's tokens ``[S, D]`` as fp32 blocks in ``buffer`` ``[N * block, D]``, zeros beyond short blocks."""
    if head.in_place:
        return buffer.copy_(x)
    buffer.copy_(x[head.token])
    if not head.all_valid:
        buffer.masked_fill_(~head.valid[:, None], 0.0)
    return buffer


def _chunks(counts: list[int], block: int, extra: int) -> list[tuple[int, int]]:
    """Cut rows (most kept blocks first) into runs ``begin, end`` that are padded to their first row's count."""
    budget = _CHUNK_BYTES * torch.get_num_threads()
    pieces, begin = [], 0
    while begin < len(counts):
        widest = counts[begin]
        fit = min(_MAX_ROWS, max(1, budget // (4 * block * (widest * block + extra))))
        least = widest - max(1, int(_MAX_PADDING * widest))
        end = begin + 1
        while end < len(counts) and end - begin < fit and counts[end] >= least:
            end += 1
        pieces.append((begin, end))
        begin = end
    return pieces


def _attend(
    call: AttentionCall, head: _HeadRows, b: int, h: int, out: torch.Tensor, lse: torch.Tensor, space: _Workspace
) -> None:
    """One head of one item: fills ``out[b, :, h]`` and, where asked for, ``lse[b, :, h]``."""
    n, block, dim = call.num_blocks, call.block_size, call.q.shape[3]
    tail = head.tail_bias is not None
    # The table's blocks: N of tokens, one of padding, then the summaries, one row each.
    table = n + 1 + (-(-n // block) if tail else 0)
    keys, values = space.take("keys", table * block, dim), space.take("values", table * block, dim)
    _padded(call.k[b, :, h], head, keys[: n * block])
    _padded(call.v[b, :, h], head, values[: n * block])
    query = _padded(call.q[b, :, h], head, space.take("query", n * block, dim)).mul_(call.scale)
    keys[n * block : (n + 1) * block] = 0.0
    values[n * block : (n + 1) * block] = 0.0
    variance = None
    if tail:
        mean_k, mean_v, variance = summarize(
            keys[: n * block].view(n, block, dim),
            values[: n * block].view(n, block, dim),
            head.length,
            moments=head.moments,
        )
        keys[(n + 1) * block : (n + 1) * block + n] = mean_k
        values[(n + 1) * block : (n + 1) * block + n] = mean_v
    # 0 or -inf for each position of each block, the padding block included, and the blocks that hold some -inf.
    open_key = head.valid if call.key_mask is None else head.valid & call.key_mask[b][head.token]
    key_bias = torch.zeros(n + 1, block)
    key_bias[:n].view(-1).masked_fill_(~open_key, -math.inf)
    key_bias[n] = -math.inf
    partial = key_bias.isneginf().any(1)
    some_partial = bool(partial[:n].any())

    query = query.view(n, block, dim)
    square = query.square().mul_(0.5) if variance is not None else None
    keys, values = keys.view(table, block * dim), values.view(table, block * dim)
    result = space.take("result", n, block, dim)
    row_lse = space.take("lse", n, block) if call.return_lse else None
    if len(head.rows) < n:
        result.zero_()
        if row_lse is not None:
            row_lse.fill_(-math.inf)
    summary_blocks = torch.arange(n + 1, table)
    rows_of = torch.tensor(head.rows, dtype=torch.long)
    for begin, end in _chunks(head.counts, block, n if tail else 0):
        rows, size, widest = rows_of[begin:end], end - begin, head.counts[begin]
        slot = torch.arange(widest)
        listed = slot < (head.ptr[rows + 1] - head.ptr[rows])[:, None]
        ragged = head.counts[end - 1] < widest
        chosen = (head.ptr[rows][:, None] + slot).clamp_(max=max(0, len(head.columns) - 1))
        index = head.columns[chosen] if widest else chosen
        if ragged:
            index = index.masked_fill(~listed, n)
        fetched = torch.cat([index, summary_blocks.expand(size, -1)], 1) if tail else index
        exact = widest * block
        width = exact + (n if tail else 0)
        flat = fetched.reshape(-1)
        key = torch.index_select(keys, 0, flat, out=space.take("key", len(flat), block * dim))
        value = torch.index_select(values, 0, flat, out=space.take("value", len(flat), block * dim))
        key, value = (x.view(size, -1, dim)[:, :width] for x in (key, value))
        chunk = query[rows]
        logits = torch.bmm(chunk, key.transpose(1, 2), out=space.take("logits", size, block, width))
        if some_partial or ragged:
            slots = partial[index].any(0).nonzero()
            if len(slots):
                low, high = int(slots[0]), int(slots[-1]) + 1
                logits[:, :, low * block : high * block] += key_bias[index[:, low:high]].view(size, 1, -1)
        if tail:
            assert head.tail_bias is not None
            extra = head.tail_bias[rows][:, None]
            if square is not None and variance is not None:
                extra = torch.baddbmm(extra, square[rows], variance.T.expand(size, -1, -1))
            logits[:, :, exact:] += extra
        top = logits.amax(-1, keepdim=True)
        if call.key_mask is not None:
            # Every key of a row may be masked out, and -inf - -inf is NaN.
            top.clamp_(min=torch.finfo(torch.float32).min)
        weights = logits.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        product = torch.bmm(weights, value, out=space.take("product", size, block, dim))
        result[rows] = product.div_(total if call.key_mask is None else total.where(total > 0, 1.0))
        if row_lse is not None:
            row_lse[rows] = (top + total.log())[..., 0]

    flat_result = result.view(n * block, dim)
    if head.in_place:
        out[b, :, h] = flat_result
        if row_lse is not None:
            lse[b, :, h] = row_lse.view(-1)
        return
    token = head.token if head.all_valid else head.token[head.valid]
    out[b, token, h] = (flat_result if head.all_valid else flat_result[head.valid]).to(out.dtype)
    if row_lse is not None:
        flat_lse = row_lse.view(-1)
        lse[b, token, h] = flat_lse if head.all_valid else flat_lse[head.valid]
