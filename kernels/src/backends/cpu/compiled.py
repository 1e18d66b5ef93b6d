"""The CPU backend's rows in compiled code (``attend.c``): no padding of rows, logits never in memory.

Keys and values are laid out by torch as blocks, in the inputs' type; queries are read, and outputs written, where they
lie. Rows are attended by a function that every thread runs until all rows are taken. A row is always attended by one
thread in one order, so that results do not depend on the number of threads.
"""

from __future__ import annotations

import ctypes
from collections import deque
from dataclasses import dataclass

import torch

from diffsparse.kernels.backends.cpu.instructions import find_kernel
from diffsparse.kernels.backends.cpu.rows import HeadRows, closed_keys
from diffsparse.kernels.backends.cpu.table import Workspace, blocks_and_summaries
from diffsparse.kernels.backends.cpu.workers import on_workers
from diffsparse.kernels.call import AttentionCall

__all__ = ["attend", "can_attend"]

_QUERIES = 64  # as in the source, and MAX_DIM
_MAX_DIM = 256
_DIM_STEP = 4
_TYPES = (torch.float32, torch.bfloat16, torch.float16)
# Below this many blocks in all, handing work to threads takes longer than the work.
_MIN_ROWS = 16
# Tables of all heads at once, and of one between calls.
_MAX_TABLE_BYTES = 64 << 20
_spare: deque[Workspace] = deque(maxlen=8)

_POINTERS = (
    *("keys", "values", "mean_keys", "mean_values", "variance", "closed", "tail_bias"),
    *("index", "token", "length", "query", "out", "lse"),
)
_SIZES = (
    *("type", "rows", "most", "block", "dim", "padding", "summaries"),
    *("query_step", "out_step", "lse_step"),
)


class _CHead(ctypes.Structure):
    """``struct head`` of the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("scale", ctypes.c_double),
    ]


@dataclass(frozen=True)
class _Head:
    """One head of one item. tensors: everything that ``c`` points to, in the order of ``_POINTERS``."""

    c: _CHead
    tensors: tuple[torch.Tensor | None, ...]
    space: Workspace


def can_attend(call: AttentionCall) -> bool:
    """Whether the compiled code can run a call on this machine.

    Raises ValueError or RuntimeError where an instruction set is asked for that cannot be had (``find_kernel``).
    """
    compiled = find_kernel().library is not None
    dim = call.q.shape[3]
    return compiled and call.block_size % _QUERIES == 0 and dim % _DIM_STEP == 0 and dim <= _MAX_DIM


def attend(call: AttentionCall, heads: list[tuple[int, HeadRows]], out: torch.Tensor, lse: torch.Tensor) -> None:
    """Fill ``out[:, :, h]`` and, where asked for, ``lse[:, :, h]`` for these heads."""
    todo = [(b, h, rows) for b in range(call.q.shape[0]) for h, rows in heads]
    threads = torch.get_num_threads() if sum(rows.num_rows for _, _, rows in todo) >= _MIN_ROWS else 1
    each = 2 * call.k.element_size() * call.num_blocks * call.block_size * call.q.shape[3]  # keys, values
    at_once = max(threads, _MAX_TABLE_BYTES // each)
    for begin in range(0, len(todo), at_once):
        part = on_workers(threads, lambda job: _prepare(call, *job, out, lse), todo[begin : begin + at_once])
        _run(part, threads)
        _spare.extend(head.space for head in part if head.space.nbytes <= _MAX_TABLE_BYTES // 8)


def _run(part: list[_Head], threads: int) -> None:
    library = find_kernel().library
    assert library is not None  # can_attend said so
    heads, taken = (_CHead * len(part))(*(head.c for head in part)), ctypes.c_int64(0)

    def until_all_are_taken(_: int) -> None:  # ctypes lets go of the interpreter's lock meanwhile
        library.diffsparse_attend(heads, ctypes.c_int64(len(part)), ctypes.byref(taken))

    on_workers(threads, until_all_are_taken, range(threads))


def _prepare(call: AttentionCall, item: int, head: int, rows: HeadRows, out: torch.Tensor, lse: torch.Tensor) -> _Head:
    try:
        space = _spare.pop()
    except IndexError:
        space = Workspace()
    tables = blocks_and_summaries(call, rows, item, head, space)
    closed = rows.closed.bias if rows.is_closed else None
    if call.key_mask is not None:
        is_open = rows.valid & call.key_mask[item][rows.key_token]
        closed = closed_keys(rows, call.num_blocks, is_open).bias
    query, result = call.q[item, :, head], out[item, :, head]
    row_lse = lse[item, :, head] if call.return_lse else None
    if not rows.is_complete:
        result.zero_()
        if row_lse is not None:
            row_lse.fill_(-torch.inf)
    contiguous = (*tables, closed, rows.tail_bias, rows.index, rows.query_token, rows.row_length)
    if not all(x is None or x.is_contiguous() for x in contiguous):
        raise AssertionError("a table of the CPU backend is not contiguous")
    tensors = (*contiguous, query, result, row_lse)
    pointers = [None if x is None else x.data_ptr() for x in tensors]
    sizes = (
        *(_TYPES.index(query.dtype), rows.num_rows, rows.index.shape[1], call.block_size, query.shape[1]),
        *(call.num_blocks, rows.num_summaries, query.stride(0), result.stride(0)),
        0 if row_lse is None else row_lse.stride(0),
    )
    return _Head(_CHead(*pointers, *sizes, call.scale), tensors, space)
