"""What the CPU backend needs to know of one head: which blocks each row fetches, in which chunks rows are taken.

All of it follows from a layout alone, and is kept as long as the layout's tensors live: a plan is attended hundreds of
times, and building these tables takes a few per cent of a call.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch

from diffsparse.heads import GATHERED
from diffsparse.kernels.call import AttentionCall
from diffsparse.kernels.summaries import half_lengths

__all__ = ["Chunk", "Closed", "HeadRows", "closed_keys", "head_rows"]

# Bytes of logits that one chunk of rows may take per thread. Measured on a core with 1 MB of L2: half a megabyte to one
# are equally good, more spills, less leaves matrix products too small.
_CHUNK_BYTES = 3 << 18
_MAX_ROWS = 16
# Rows whose counts differ by more than this share are not padded to each other.
_MAX_PADDING = 0.1
# Tables of small grids take 0.1 MB a head, those of 75,600 tokens some ten; what was used last stays.
_MAX_TABLE_BYTES = 256 << 20


@dataclass(frozen=True)
class Chunk:
    """Rows ``begin:end`` of a head, attended at once, each with ``widest`` blocks (and those of summaries).

    fetched: int64 ``[rows * (widest + summary blocks)]``, the blocks of each row.  tail_bias: as in ``HeadRows``.
    """

    begin: int
    end: int
    widest: int
    fetched: torch.Tensor
    tail_bias: torch.Tensor | None


@dataclass(frozen=True)
class Closed:
    """Positions of kept blocks that no row may attend: beyond a short block, masked out, or only there to pad.

    bias: fp32 ``[N + 1, block]``, 0 or -inf.  spans: for each chunk the slots between which some position is closed.
    """

    bias: torch.Tensor
    spans: list[tuple[int, int]]


@dataclass(frozen=True)
class HeadRows:
    """What one head does, for all items of the batch. ``N`` blocks of ``block`` positions, ``R`` rows with work to do.

    key_token: int64 ``[N * block]``, the model's token at each padded position (0 where there is none).
    valid: bool ``[N * block]``.  in_place: every block is full and the order is the model's.
    length: int64 ``[N]``.
    index: int64 ``[R, most]``, kept blocks of the rows, those with most first, filled up with ``N``.
    query_token: int64 ``[R * block]``, as ``key_token``, in the rows' order.  row_length: int64 ``[R]``, its queries.
    is_complete: every block that has queries is a row.
    place: int64 ``[S]``, where each token's result is among ``R * block`` rows; ``R * block`` where it has none.
    tail: its name, ``none`` where nothing is left out.
    tail_bias: fp32 ``[R, 1, M]``, ln n where a block is attended through its summary, -inf elsewhere; or None. ``M``
    summaries: one for each block, or those of all first halves and then those of all second ones.
    closed: where no key mask closes more.
    """

    key_token: torch.Tensor
    valid: torch.Tensor
    all_valid: bool
    in_place: bool
    length: torch.Tensor
    index: torch.Tensor
    query_token: torch.Tensor
    row_length: torch.Tensor
    is_complete: bool
    place: torch.Tensor
    tail: str
    tail_bias: torch.Tensor | None
    chunks: list[Chunk]
    closed: Closed

    @property
    def num_rows(self) -> int:
        """``R``."""
        return len(self.index)

    @property
    def num_summaries(self) -> int:
        """``M``, 0 without a tail."""
        return 0 if self.tail_bias is None else self.tail_bias.shape[2]

    @property
    def work(self) -> int:
        """Blocks that its rows attend, those that only pad and those of summaries counted."""
        return sum(len(chunk.fetched) for chunk in self.chunks)

    @property
    def is_closed(self) -> bool:
        """Whether some position of the kept blocks may not be attended, those that only pad left aside."""
        return not self.all_valid

    @property
    def nbytes(self) -> int:
        """Memory of all tables."""
        own = [x for x in (getattr(self, f.name) for f in fields(self)) if isinstance(x, torch.Tensor)]
        return sum(x.nbytes for x in [*own, self.closed.bias, *(c.fetched for c in self.chunks)])


class _Tables:
    """Tables of the heads used last, forgotten with the layout's list of columns."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held: OrderedDict[Any, tuple[tuple[weakref.ref[torch.Tensor], ...], HeadRows, int]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.RLock()  # a tensor may die, and its entry with it, inside of any of these methods

    def get(self, tensors: tuple[torch.Tensor, ...], rest: Any, build: Callable[[], HeadRows]) -> HeadRows:
        """The table made from just these tensors, in the state that they are in, and ``rest``."""
        # Tensors made in inference mode count no changes.
        key = (*((id(x), None if x.is_inference() else x._version) for x in tensors), rest)
        with self._lock:
            found = self._held.get(key)
            # An id is given again once its tensor is gone.
            if found is not None and all(ref() is x for ref, x in zip(found[0], tensors)):
                self._held.move_to_end(key)
                return found[1]
        rows = build()
        with self._lock:
            self._drop(key)
            refs = tuple(weakref.ref(x, partial(self._drop, key)) for x in tensors)
            self._held[key] = (refs, rows, rows.nbytes)
            self._bytes += rows.nbytes
            while self._bytes > self._max_bytes and len(self._held) > 1:
                self._drop(next(iter(self._held)))
        return rows

    def _drop(self, key: Any, _: object = None) -> None:
        with self._lock:
            found = self._held.pop(key, None)
            if found is not None:
                self._bytes -= found[2]


_tables = _Tables(_MAX_TABLE_BYTES)


def head_rows(call: AttentionCall, head: int, order: int, tail: str, threads: int) -> HeadRows:
    """The tables of one head, made anew only if the layout is another one, for chunks that ``threads`` share."""
    tensors = (
        call.index.col_idx,
        call.index.row_ptr,
        call.tokens.gather,
        call.tokens.scatter,
        call.tokens.block_start,
        call.heads.table,
    )
    rest = (head, order, tail, call.block_size, call.tokens.text_before, call.tokens.num_visual, threads)
    return _tables.get(tensors, rest, lambda: _build(call, head, order, tail, threads))


def closed_keys(rows: HeadRows, num_blocks: int, is_open: torch.Tensor) -> Closed:
    """From which positions may be attended, bool ``[N * block]``."""
    bias = torch.full((num_blocks + 1, len(is_open) // num_blocks), -math.inf)
    bias[:num_blocks].view(-1).masked_fill_(is_open, 0.0)
    return Closed(bias, _spans(bias, rows.index, [(c.begin, c.end, c.widest) for c in rows.chunks]))


def _spans(bias: torch.Tensor, index: torch.Tensor, pieces: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
    closed = bias.isneginf().any(1)[index]
    spans = []
    for begin, end, widest in pieces:
        slots = closed[begin:end, :widest].any(0).nonzero()
        spans.append((int(slots[0]), int(slots[-1]) + 1) if len(slots) else (0, 0))
    return spans


def _build(call: AttentionCall, head: int, order: int, tail: str, threads: int) -> HeadRows:
    n, block, seq = call.num_blocks, call.block_size, call.q.shape[1]
    start = call.tokens.block_start[order].long()
    length = start.diff()
    offset = torch.arange(block)
    valid = (offset < length[:, None]).view(-1)
    position = (start[:-1, None] + offset).view(-1).masked_fill_(~valid, 0)
    token = call.tokens.gather[order].long()[position].masked_fill_(~valid, 0)
    ptr = call.index.row_ptr[0, head * n : (head + 1) * n + 1].long()
    columns = call.index.col_idx[int(ptr[0]) : int(ptr[-1])].long()
    ptr = ptr - ptr[0]
    count = ptr.diff()

    bias = None
    if tail != "none":
        parts = half_lengths(length) if tail == "centroids" else length[None]
        bias = torch.where(call.tokens.visual_blocks(order), parts.float().log(), -math.inf).repeat(n, 1, 1)
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

    tail_bias = None if bias is None else bias[rows][:, None]
    num_summaries = 0 if tail_bias is None else tail_bias.shape[2]
    # Behind the blocks and the one that pads.
    summaries = torch.arange(n + 1, n + 1 - (-num_summaries // block))
    pieces = _pieces(counts.tolist(), block, num_summaries, threads)
    chunks = [
        Chunk(
            begin,
            end,
            widest,
            torch.cat([index[begin:end, :widest], summaries.expand(end - begin, -1)], 1).view(-1),
            None if tail_bias is None else tail_bias[begin:end],
        )
        for begin, end, widest in pieces
    ]
    key_bias = torch.full((n + 1, block), -math.inf)
    key_bias[:n].view(-1).masked_fill_(valid, 0.0)
    all_valid = bool(valid.all())
    return HeadRows(
        key_token=token,
        valid=valid,
        all_valid=all_valid,
        in_place=all_valid and not bool(call.heads.table[head, GATHERED]),
        length=length,
        index=index,
        query_token=token.view(n, block)[rows].view(-1),
        row_length=length[rows],
        is_complete=len(rows) == int((length > 0).sum()),
        place=place[call.tokens.scatter[order].long()],
        tail=tail,
        tail_bias=tail_bias,
        chunks=chunks,
        closed=Closed(key_bias, _spans(key_bias, index, pieces)),
    )


def _pieces(counts: list[int], block: int, extra: int, threads: int) -> list[tuple[int, int, int]]:
    """Cut rows (most kept blocks first) into runs ``begin, end`` that are padded to their first row's count."""
    pieces, begin = [], 0
    while begin < len(counts):
        widest = counts[begin]
        # Batched products are split over threads by batch: a number of rows that does not divide leaves threads idle.
        fit = max(1, min(_MAX_ROWS, _CHUNK_BYTES // (4 * block * max(1, widest * block + extra)))) * threads
        least = widest - max(1, int(_MAX_PADDING * widest))
        end = begin + 1
        while end < len(counts) and end - begin < fit and (counts[end] >= least or (end - begin) % threads):
            end += 1
        pieces.append((begin, end, widest))
        begin = end
    return pieces
