"""What the parts of the Hopper kernel share: tiles of the work list, slots of rings, sums along the rows of logits, and
how a finished tile is written."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = [
    "checked",
    "entry_of",
    "mark",
    "next_slot",
    "partial_sums",
    "row_max",
    "running_shift",
    "store_lse",
    "store_rows",
    "sums_layout",
    "tile_of",
    "within_range",
]


@gluon.constexpr_function
def sums_layout():
    """What the four threads of a row of logits have each: see `partial_sums`."""
    return gl.DistributedLinearLayout(
        [[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 4]
    )


@gluon.jit
def tile_of(work, t, tiles, total_tiles, PASS: gl.constexpr):
    """What tile ``t`` of the work list is: item, head, head in its group, query block, its order, its borders, its
    list, how much of it is plain, its head's tail and how its tokens are reached. See `prepare.work_list`.

    In the first ``PASS`` a tile that is marked (see `mark`) is empty; in the second it is the ``t``-th that is marked.
    """
    records, marked = work
    skipped = 0
    if PASS == 1:
        skipped = gl.load(marked + 1 + total_tiles + t)
    if PASS == 2:
        t = gl.load(marked + 1 + t)
    record = records + (t % tiles) * 8
    row = gl.load(record)
    end = gl.where(skipped == 0, gl.load(record + 1), row)
    first = gl.load(record + 2)
    listed = gl.load(record + 3)
    plain = gl.load(record + 4)
    mode = gl.load(record + 5)
    h = gl.load(record + 6)
    i = gl.load(record + 7)
    order = (mode >> 4) & 4095
    return t // tiles, h, mode >> 16, i, order, row, end, first, listed, plain, mode & 3, (mode >> 2) & 3


@gluon.jit
def entry_of(t, first, plain, TEXT_BEFORE):
    """Where the list's ``t``-th block to be attended stands: first the plain ones, then those to be checked."""
    rest = t - plain
    rest = gl.where(rest < TEXT_BEFORE, rest, rest + plain)
    return first + gl.where(t < plain, TEXT_BEFORE + t, rest)


@gluon.jit
def next_slot(stage, phase, STAGES: gl.constexpr):
    """The slot after ``stage``; the phase turns each time round."""
    stage = stage + 1
    phase = gl.where(stage == STAGES, phase ^ 1, phase)
    return gl.where(stage == STAGES, 0, stage), phase


@gluon.jit
def running_shift(top):
    """What logits are taken relative to, given the largest so far."""
    # Nothing attended yet: -inf - -inf is NaN.
    return gl.where(top == float("-inf"), 0.0, top)


@gluon.jit
def within_range(total):
    """Of sums of exponentials that were not taken relative to the largest: whether nothing of weight was lost.

    From 2^-80 on, what fell below 2^-126 is less than 2^-29 of the sum, whatever the number of keys; up to 2^80,
    nothing was infinite, nor is its product with values.
    """
    return (total > 8.271806125530277e-25) & (total < 1.2089258196146292e24)


@gluon.jit
def mark(work, t, total_tiles):
    """Have tile ``t`` attended again: once, whether one consumer of it asks or both.

    What is kept: how many there are, which, and of every tile whether it is one of them.
    """
    _records, marked = work
    if gl.atomic_xchg(marked + 1 + total_tiles + t, 1) == 0:
        gl.store(marked + 1 + gl.atomic_add(marked, 1), t)


@gluon.jit
def _by_thread(x):
    """``[64, columns]`` as ``[64, 4, columns / 32, 4, 2]``: of axis 3 a thread has one, of axes 1, 2 and 4 all."""
    return x.reshape([64, 4, x.shape[1] // 32, 4, 2])


@gluon.jit
def partial_sums(x, T: gl.constexpr):
    """What each of the four threads of a row adds up, ``[64, 4]``. In steps, as a tree, so that additions need not
    wait for one another; and without the exchange between threads, which is left to the end."""
    return gl.convert_layout(gl.sum(gl.sum(gl.sum(_by_thread(x), 4), 2), 1), T, assert_trivial=True)


@gluon.jit
def row_max(x, S: gl.constexpr):
    """Largest of each row, likewise as a tree."""
    found = gl.max(gl.max(gl.max(gl.max(_by_thread(x), 4), 2), 1), 1)
    return gl.convert_layout(found, gl.SliceLayout(1, S), assert_trivial=True)


@gluon.jit
def checked(logits, j, start_row, mask_row, text_before, visual_end, HAS_MASK: gl.constexpr, S: gl.constexpr):
    """Logits of a block that may be short or masked out: -inf where no key takes part."""
    start = gl.load(start_row + j)
    position = start + gl.arange(0, logits.shape[1], layout=gl.SliceLayout(0, S))
    live = position < gl.load(start_row + j + 1)
    if HAS_MASK:
        # Text tokens are where they are in every order, so that positions index the mask.
        text = live & ((position < text_before) | (position >= visual_end))
        live = live & (gl.load(mask_row + position, mask=text, other=1) != 0)
    return gl.where(live[None, :], logits, float("-inf"))


@gluon.jit
def _output_row(position, live, b, h, order, gathered, gather_ptr, seq, HEADS: gl.constexpr, GATHER: gl.constexpr):
    """Where the queries at these positions stand in the output, in rows of one head."""
    token = position
    if GATHER:
        if gathered != 0:
            token = gl.load(gather_ptr + order.to(gl.int64) * seq + position, mask=live, other=0)
    return (b.to(gl.int64) * seq + token.to(gl.int64)) * HEADS + h


@gluon.jit
def store_rows(
    out, out_ptr, first, end, b, h, order, gathered, gather_ptr, seq,
    HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, GATHER: gl.constexpr,
):  # fmt: skip
    """Write 64 rows ``[64, D]`` of the output, of the positions from ``first`` on that lie before ``end``."""
    D: gl.constexpr = out.shape[1]
    # Whole rows to a warp, 16 bytes to a thread.
    W: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    out = gl.convert_layout(out.to(out_ptr.dtype.element_ty), W)
    position = first + gl.arange(0, 64, layout=gl.SliceLayout(1, W))
    live = position < end
    out_row = _output_row(position, live, b, h, order, gathered, gather_ptr, seq, HEADS, GATHER)
    channel = gl.arange(0, D, layout=gl.SliceLayout(0, W))
    gl.store(
        out_ptr + out_row[:, None] * HEAD_DIM + channel[None, :], out,
        mask=live[:, None] & (channel[None, :] < HEAD_DIM),
    )  # fmt: skip


@gluon.jit
def store_lse(
    top, total, lse_ptr, first, end, b, h, order, gathered, gather_ptr, seq,
    HEADS: gl.constexpr, GATHER: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    """Write the log-sum-exp of 64 rows, from the largest logit and the sum relative to it."""
    LOG2: gl.constexpr = 1.4426950408889634
    total = gl.convert_layout(total, gl.SliceLayout(1, S))
    lse = (top + gl.log2(total)) / LOG2
    position = first + gl.arange(0, 64, layout=gl.SliceLayout(1, S))
    live = position < end
    out_row = _output_row(position, live, b, h, order, gathered, gather_ptr, seq, HEADS, GATHER)
    gl.store(lse_ptr + out_row, gl.where(total > 0, lse, float("-inf")), mask=live)
