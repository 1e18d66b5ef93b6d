"""The CPU backend's rows in compiled code (``attend.c``): no gathers, no padding of rows, logits never in memory.

Keys, values and queries are laid out by torch as for the uncompiled way; rows are attended by a function that every
thread runs until all rows are taken. A row is always attended by one thread in one order, so that results do not
depend on the number of threads.
"""

from __future__ import annotations

import ctypes
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch

from diffsparse.kernels.backends.cpu.compiler import compiled_library
from diffsparse.kernels.backends.cpu.rows import HeadRows, closed_keys
from diffsparse.kernels.backends.cpu.table import Workspace, fill_table
from diffsparse.kernels.backends.cpu.workers import on_workers
from diffsparse.kernels.call import AttentionCall

__all__ = ["attend", "can_attend"]

_SOURCE = Path(__file__).with_name("attend.c")
_QUERIES = 64  # as in the source, and MAX_DIM and STRIP
_MAX_DIM = 256
_DIM_STEP = 4
# Below this many blocks in all, handing work to threads takes longer than the work.
_MIN_ROWS = 16
# Tables of all heads at once, and of one between calls.
_MAX_TABLE_BYTES = 64 << 20
_spare: deque[Workspace] = deque(maxlen=8)


class _CHead(ctypes.Structure):
    """``struct head`` of the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("keys", "values", "variance", "query", "closed", "tail_bias")),
        *((name, ctypes.c_void_p) for name in ("index", "result", "lse")),
        *((name, ctypes.c_int64) for name in ("rows", "most", "block", "dim", "padding", "summaries")),
    ]


@dataclass(frozen=True)
class _Head:
    """One head of one item. tensors: everything that ``c`` points to. result, lse: ``[R + 1, block, ..]``."""

    item: int
    head: int
    rows: HeadRows
    c: _CHead
    tensors: list[torch.Tensor | None]
    result: torch.Tensor
    lse: torch.Tensor | None
    space: Workspace


def can_attend(call: AttentionCall) -> bool:
    """Whether the compiled code can run a call on this machine: it is written for AVX-512."""
    dim = call.q.shape[3]
    if call.block_size % _QUERIES or dim % _DIM_STEP or dim > _MAX_DIM:
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and compiled_library(_SOURCE) is not None


def attend(call: AttentionCall, heads: list[tuple[int, HeadRows]], out: torch.Tensor, lse: torch.Tensor) -> None:
    """Fill ``out[:, :, h]`` and, where asked for, ``lse[:, :, h]`` for these heads."""
    todo = [(b, h, rows) for b in range(call.q.shape[0]) for h, rows in heads]
    threads = torch.get_num_threads() if sum(rows.num_rows for _, _, rows in todo) >= _MIN_ROWS else 1
    each = 4 * 4 * call.num_blocks * call.block_size * call.q.shape[3]  # keys, values, queries, results
    at_once = max(threads, _MAX_TABLE_BYTES // each)
    for begin in range(0, len(todo), at_once):
        part = on_workers(threads, lambda job: _prepare(call, *job), todo[begin : begin + at_once])
        _run(part, threads)
        on_workers(threads, lambda head: _finish(head, out, lse), part)


def _run(part: list[_Head], threads: int) -> None:
    library = compiled_library(_SOURCE)
    assert library is not None  # can_attend said so
    heads, taken = (_CHead * len(part))(*(head.c for head in part)), ctypes.c_int64(0)

    def until_all_are_taken(_: int) -> None:  # ctypes lets go of the interpreter's lock meanwhile
        library.diffsparse_attend(heads, ctypes.c_int64(len(part)), ctypes.byref(taken))

    on_workers(threads, until_all_are_taken, range(threads))


def _prepare(call: AttentionCall, item: int, head: int, rows: HeadRows) -> _Head:
    try:
        space = _spare.pop()
    except IndexError:
        space = Workspace()
    block, dim, used = call.block_size, call.q.shape[3], rows.num_rows
    keys, values, variance = fill_table(call, rows, item, head, space)
    query = space.take("query", used * block, dim)
    source = call.q[item, :, head]
    if source.dtype == query.dtype:
        torch.index_select(source, 0, rows.query_token, out=query)
    else:
        query.copy_(source.index_select(0, rows.query_token))
    query.mul_(call.scale)
    closed = rows.closed.bias if rows.is_closed else None
    if call.key_mask is not None:
        is_open = rows.valid & call.key_mask[item][rows.key_token]
        closed = closed_keys(rows, call.num_blocks, is_open).bias
    # One more block, of rows that attend nothing.
    result = space.take("result", used + 1, block, dim)
    result[used] = 0.0
    row_lse = torch.full((used + 1, block), -torch.inf) if call.return_lse else None
    tensors = [keys, values, variance, query, closed, rows.tail_bias, rows.index, result, row_lse]
    if not all(x is None or x.is_contiguous() for x in tensors):
        raise AssertionError("a table of the CPU backend is not contiguous")
    pointers = [None if x is None else x.data_ptr() for x in tensors]
    sizes = (used, rows.index.shape[1], block, dim, call.num_blocks, rows.num_summaries)
    return _Head(item, head, rows, _CHead(*pointers, *sizes), tensors, result, row_lse, space)


def _finish(head: _Head, out: torch.Tensor, lse: torch.Tensor) -> None:
    place, dim = head.rows.place, out.shape[3]
    out[head.item, :, head.head] = head.result.view(-1, dim).index_select(0, place)
    if head.lse is not None:
        lse[head.item, :, head.head] = head.lse.view(-1)[place]
    if head.space.nbytes <= _MAX_TABLE_BYTES // 8:
        _spare.append(head.space)
