"""The CPU backend: gather a few rows' kept blocks, multiply, softmax, multiply.

Query blocks are taken in chunks small enough for their logits to stay in cache, rows with similar numbers of kept
blocks together. A tail needs no pass of its own: summaries lie behind the blocks in the same table, so that a row's
list simply goes on with them, and one softmax covers both. Heads that keep every block go to torch's own attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from diffsparse.entry import TAILS
from diffsparse.kernels.call import GATHERED, SKIP, TAIL, AttentionCall
from diffsparse.kernels.summaries import half_lengths, summarize, summarize_halves

__all__ = ["run"]

# Bytes of logits that one chunk of rows may take per thread. Measured on a core with 1 MB of L2: half a megabyte to one
# are equally good, more spills, less leaves matrix products too small.
_CHUNK_BYTES = 3 << 18
_MAX_ROWS = 16
# Rows whose counts differ by more than this share are not padded to each other.
_MAX_PADDING = 0.1


@dataclass(frozen=True)
class _HeadRows:
    """What one head does, for all items of the batch. ``N`` blocks of ``block`` positions, ``R`` rows with work to do.

    key_token: int64 ``[N * block]``, the model's token at each padded position (0 where there is none).
    valid: bool ``[N * block]``.  in_place: every block is full and the order is the model's.
    length: int64 ``[N]``.
    counts: kept blocks of the rows, most first.  index: int64 ``[R, counts[0]]``, those blocks, filled up with ``N``.
    query_token: int64 ``[R * block]``, as ``key_token``, in the rows' order.
    place: int64 ``[S]``, where each token's result is among ``R * block`` rows; ``R * block`` where it has none.
    tail: its name, ``none`` where nothing is left out.
    tail_bias: fp32 ``[R, 1, M]``, ln n where a block is attended through its summary, -inf elsewhere; or None. ``M``
    summaries: one for each block, or those of all first halves and then those of all second ones.
    """

    key_token: torch.Tensor
    valid: torch.Tensor
    all_valid: bool
    in_place: bool
    length: torch.Tensor
    counts: list[int]
    index: torch.Tensor
    query_token: torch.Tensor
    place: torch.Tensor
    tail_bias: torch.Tensor | None
    tail: str


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
    n, block, seq = call.num_blocks, call.block_size, call.q.shape[1]
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
        parts = half_lengths(length) if tail == "centroids" else length[None]
        bias = torch.where(call.visual_blocks(order), parts.float().log(), -math.inf).repeat(n, 1, 1)
        bias[torch.repeat_interleave(torch.arange(n), count), :, columns] = -math.inf
        bias = bias.flatten(1)
        if bool(bias.isneginf().all()):
            bias = None
    counts, rows = count.sort(descending=True, stable=True)
    # A row with neither kept blocks nor a tail attends nothing; an empty block has no queries.
    used = length[rows] > 0 if bias is not None else (length[rows] > 0) & (counts > 0)
    counts, rows = counts[used], rows[used]

    slot = torch.arange(int(counts[0]) if len(counts) else 0)
    listed = slot < counts[:, None]
    index = (ptr[rows][:, None] + slot).masked_fill_(~listed, 0)
    index = columns[index].masked_fill_(~listed, n) if len(columns) else index
    rank = torch.full((n,), len(rows)).index_copy_(0, rows, torch.arange(len(rows)))
    block_of = torch.repeat_interleave(torch.arange(n), length)
    place = torch.where(rank[block_of] < len(rows), torch.arange(seq) - start[block_of], 0) + rank[block_of] * block
    all_valid = bool(valid.all())
    return _HeadRows(
        key_token=token,
        valid=valid,
        all_valid=all_valid,
        in_place=all_valid and not bool(call.head_mode[head, GATHERED]),
        length=length,
        counts=counts.tolist(),
        index=index,
        query_token=token.view(n, block)[rows].view(-1),
        place=place[call.scatter[order].long()],
        tail_bias=None if bias is None else bias[rows][:, None],
        tail=tail,
    )


def _chunks(counts: list[int], block: int, extra: int) -> list[tuple[int, int]]:
    """Cut rows (most kept blocks first) into runs ``begin, end`` that are padded to their first row's count."""
    threads = torch.get_num_threads()
    pieces, begin = [], 0
    while begin < len(counts):
        widest = counts[begin]
        # Batched products are split over threads by batch: a number of rows that does not divide leaves threads idle.
        fit = max(1, min(_MAX_ROWS, _CHUNK_BYTES // (4 * block * max(1, widest * block + extra)))) * threads
        least = widest - max(1, int(_MAX_PADDING * widest))
        end = begin + 1
        while end < len(counts) and end - begin < fit and (counts[end] >= least or (end - begin) % threads):
            end += 1
        pieces.append((begin, end))
        begin = end
    return pieces


def _table(
    call: AttentionCall, head: _HeadRows, b: int, h: int, space: _Workspace
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Keys and values as fp32 blocks ``[N + 1 + summary blocks, block * D]``, and the variances ``[N, D]`` of keys.

    Block ``N`` is padding; the rows of the summary blocks are means, as many as ``tail_bias`` has columns.
    """
    n, block, dim = call.num_blocks, call.block_size, call.q.shape[3]
    summaries = 0 if head.tail_bias is None else head.tail_bias.shape[2]
    total = n + 1 + -(-summaries // block)
    tables = []
    for name, x in (("keys", call.k[b, :, h]), ("values", call.v[b, :, h])):
        table = space.take(name, total * block, dim)
        tokens = table[: n * block]
        if head.in_place:
            tokens.copy_(x)
        else:
            tokens.copy_(x.index_select(0, head.key_token))
            if not head.all_valid:
                tokens.masked_fill_(~head.valid[:, None], 0.0)
        table[n * block :] = 0.0
        tables.append(table)
    variance = None
    if head.tail_bias is not None:
        key_blocks, value_blocks = (t[: n * block].view(n, block, dim) for t in tables)
        if head.tail == "centroids":
            mean_k, mean_v = (x.flatten(0, 1) for x in summarize_halves(key_blocks, value_blocks, head.length))
        else:
            moments = head.tail == "moments"
            mean_k, mean_v, variance = summarize(key_blocks, value_blocks, head.length, moments=moments)
        for table, mean in zip(tables, (mean_k, mean_v)):
            table[(n + 1) * block : (n + 1) * block + summaries] = mean
    keys, values = (t.view(total, block * dim) for t in tables)
    return keys, values, variance


def _attend(
    call: AttentionCall, head: _HeadRows, b: int, h: int, out: torch.Tensor, lse: torch.Tensor, space: _Workspace
) -> None:
    """One head of one item: fills ``out[b, :, h]`` and, where asked for, ``lse[b, :, h]``."""
    n, block, dim, used = call.num_blocks, call.block_size, call.q.shape[3], len(head.counts)
    tail = 0 if head.tail_bias is None else head.tail_bias.shape[2]
    keys, values, variance = _table(call, head, b, h, space)
    summaries = torch.arange(n + 1, len(keys))
    query = call.q[b, :, h].index_select(0, head.query_token).float().view(used, block, dim).mul_(call.scale)
    square = query.square().mul_(0.5) if variance is not None else None

    # 0 or -inf for each position of a block, and the slots of each row between which some position is closed.
    is_open = head.valid if call.key_mask is None else head.valid & call.key_mask[b][head.key_token]
    key_bias = torch.full((n + 1, block), -math.inf)
    key_bias[:n].view(-1).masked_fill_(is_open, 0.0)
    closed = key_bias.isneginf().any(1)[head.index].to(torch.uint8)
    slots = closed.shape[1]
    some = closed.amax(1) if slots else closed.new_zeros(used)
    first = torch.where(some > 0, closed.argmax(1), slots).tolist() if slots else [0] * used
    last = torch.where(some > 0, slots - closed.flip(1).argmax(1), 0).tolist() if slots else [0] * used

    # One more block, of rows that attend nothing.
    result = space.take("result", used + 1, block, dim)
    result[used] = 0.0
    row_lse = torch.full((used + 1, block), -math.inf) if call.return_lse else None
    for begin, end in _chunks(head.counts, block, tail):
        size, widest = end - begin, head.counts[begin]
        index = head.index[begin:end, :widest]
        fetched = torch.cat([index, summaries.expand(size, -1)], 1).view(-1) if tail else index.reshape(-1)
        exact = widest * block
        width = exact + tail
        key = torch.index_select(keys, 0, fetched, out=space.take("key", len(fetched), block * dim))
        value = torch.index_select(values, 0, fetched, out=space.take("value", len(fetched), block * dim))
        key, value = (x.view(size, -1, dim)[:, :width] for x in (key, value))
        logits = space.take("logits", size, block, width)
        torch.bmm(query[begin:end], key.transpose(1, 2), out=logits)
        low, high = min(first[begin:end]), min(widest, max(last[begin:end]))
        if low < high:
            logits[:, :, low * block : high * block] += key_bias[index[:, low:high]].view(size, 1, -1)
        if head.tail_bias is not None:
            extra = head.tail_bias[begin:end]
            if square is not None and variance is not None:
                extra = torch.baddbmm(extra, square[begin:end], variance.T.expand(size, -1, -1))
            logits[:, :, exact:] += extra
        if row_lse is None and call.key_mask is None:
            torch.bmm(torch.softmax(logits, -1, out=logits), value, out=result[begin:end])
            continue
        # Every key of a row may be masked out, and -inf - -inf is NaN.
        top = logits.amax(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).min)
        total = logits.sub_(top).exp_().sum(-1, keepdim=True)
        torch.bmm(logits, value, out=result[begin:end]).div_(total.where(total > 0, 1.0))
        if row_lse is not None:
            row_lse[begin:end] = (top + total.log())[..., 0]

    out[b, :, h] = result.view(-1, dim).index_select(0, head.place)
    if row_lse is not None:
        lse[b, :, h] = row_lse.view(-1)[head.place]
