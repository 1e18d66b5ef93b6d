"""The Hopper kernel, warp-specialised, written in Gluon: what runs on the device. ``host`` launches it.

One producer warp fetches tiles of q, k and v through the tensor memory accelerator (TMA) into rings of shared memory;
one consumer warpgroup for every 64 queries multiplies and takes the softmax. A consumer issues the product of q with
the next keys and the product of the last probabilities with their values together, and works on the softmax while the
matrix units are busy. Programs are persistent and take tiles of queries one after another, so that the producer fetches
the next tile's first blocks while the consumers still write the last one out.

In bf16 all but small calls take two passes (``PASS`` 1 and 2), else one (0). The first takes exponentials of logits as
they are: a softmax needs no largest logit but to keep them in range, finding it takes as many instructions as they do,
and nothing can begin before it is found. bf16 and fp32 have range for logits up to 80 (to base 2, below or above zero).
What went out of it the sums tell, and the second pass attends those tiles again, in the usual way; heads with wide
logits a sample tells beforehand (`wide`), and the second pass alone attends them. Nothing of it waits for the
host.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from diffsparse.kernels.backends.gluon_sm90.compat import copy_tile
from diffsparse.kernels.backends.gluon_sm90.eight import consume_eight, ones, produce_eight
from diffsparse.kernels.backends.gluon_sm90.parts import (
    checked,
    entry_of,
    mark,
    next_slot,
    partial_sums,
    row_max,
    running_shift,
    store_lse,
    store_rows,
    sums_layout,
    tile_of,
    within_range,
)
from diffsparse.kernels.backends.triton.codes import IN_AUTO, TAIL_CENTROIDS, TAIL_MOMENTS, TAIL_NONE

__all__ = ["forward_kernel"]


@gluon.jit
def _copy(ring, full, stage, desc, moved, gathered, b, h, local, row, GATHER: gl.constexpr):
    """Copy the box at ``row`` of a head into a slot.

    From ``desc``, or, for a head in an order of its own, from ``moved``, which is in that order.
    """
    if GATHER:
        if gathered != 0:
            copy_tile(moved, [b, local, row, 0], full.index(stage), ring.index(stage))
        else:
            copy_tile(desc, [b, h, row, 0], full.index(stage), ring.index(stage))
    else:
        copy_tile(desc, [b, h, row, 0], full.index(stage), ring.index(stage))


@gluon.jit
def _fetch(
    ring, full, empty, stage, phase, desc, moved, gathered, b, h, local, row,
    STAGES: gl.constexpr, BYTES: gl.constexpr, GATHER: gl.constexpr,
):  # fmt: skip
    """Copy the box at ``row`` of a head into a slot, once the consumers are done with it. Returns the next slot."""
    mbarrier.wait(empty.index(stage), phase ^ 1)
    mbarrier.expect(full.index(stage), BYTES)
    _copy(ring, full, stage, desc, moved, gathered, b, h, local, row, GATHER)
    return next_slot(stage, phase, STAGES)


@gluon.jit
def _fetch_both(
    rings, bars, fetched, stage, phase, gathered, b, h, local, k_row, v_row,
    KEYS: gl.constexpr, VALUES: gl.constexpr, STAGES: gl.constexpr, BYTES: gl.constexpr, GATHER: gl.constexpr,
):  # fmt: skip
    """The same for keys and values, or either, that share a slot and the barriers of keys."""
    _q_ring, k_ring, v_ring = rings
    _q_full, _q_empty, full, empty, _v_full, _v_empty, _turn = bars
    _q_desc, k_desc, v_desc, _q_moved, k_moved, v_moved, _mean_k, _var_k, _mean_v = fetched
    mbarrier.wait(empty.index(stage), phase ^ 1)
    mbarrier.expect(full.index(stage), BYTES * (KEYS + VALUES))
    if KEYS:
        _copy(k_ring, full, stage, k_desc, k_moved, gathered, b, h, local, k_row, GATHER)
    if VALUES:
        _copy(v_ring, full, stage, v_desc, v_moved, gathered, b, h, local, v_row, GATHER)
    return next_slot(stage, phase, STAGES)


@gluon.jit
def _fetch_queries(q_ring, q_full, desc, b, h, row, CONSUMERS: gl.constexpr):
    """Copy a tile of queries, 64 for each consumer."""
    for c in gl.static_range(CONSUMERS):
        copy_tile(desc, [b, h, row + c * 64, 0], q_full.index(0), q_ring.index(c))


@gluon.jit
def _produce_sixteen(
    rings, bars, fetched, lists, total_tiles, tiles, num_blocks,
    HEADS: gl.constexpr, TEXT_BEFORE: gl.constexpr,
    D: gl.constexpr, BLOCK: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, HAS_TAIL: gl.constexpr,
    GATHER: gl.constexpr, SHARED: gl.constexpr, PASS: gl.constexpr,
):  # fmt: skip
    """Fetch what the consumers of one program attend, in 16 bits."""
    q_ring, k_ring, v_ring = rings
    q_full, q_empty, k_full, k_empty, v_full, v_empty, _turn = bars
    q_desc, k_desc, v_desc, q_moved, k_moved, v_moved, mean_k, var_k, mean_v = fetched
    work, col_idx, block_start = lists
    BYTES: gl.constexpr = 2 * BLOCK * D
    used_q = 0
    k_stage = 0
    k_phase = 0
    v_stage = 0
    v_phase = 0
    count = gl.load(work[1]) if PASS == 2 else total_tiles
    for t in range(gl.program_id(0), count, gl.num_programs(0)):
        b, h, local, _i, order, row, end, first, listed, plain, tail, gathered = tile_of(
            work, t, tiles, total_tiles, PASS
        )
        start_row = block_start + order * (num_blocks + 1)
        if (row < end) & ((listed > 0) | (tail != TAIL_NONE)):
            mbarrier.wait(q_empty.index(0), (used_q & 1) ^ 1)
            mbarrier.expect(q_full.index(0), 2 * CONSUMERS * 64 * D)
            if GATHER:
                if gathered != 0:
                    _fetch_queries(q_ring, q_full, q_moved, b, local, row, CONSUMERS)
                else:
                    _fetch_queries(q_ring, q_full, q_desc, b, h, row, CONSUMERS)
            else:
                _fetch_queries(q_ring, q_full, q_desc, b, h, row, CONSUMERS)
            used_q += 1
            if listed > 0:
                # In the order in which consumers want them: a block's keys with the values of the block before.
                k_row = gl.load(start_row + gl.load(col_idx + entry_of(0, first, plain, TEXT_BEFORE)))
                if not SHARED:
                    k_stage, k_phase = _fetch(
                        k_ring, k_full, k_empty, k_stage, k_phase, k_desc, k_moved, gathered, b, h, local, k_row,
                        STAGES, BYTES, GATHER,
                    )  # fmt: skip
                    for e in range(1, listed):
                        v_row = k_row
                        k_row = gl.load(start_row + gl.load(col_idx + entry_of(e, first, plain, TEXT_BEFORE)))
                        k_stage, k_phase = _fetch(
                            k_ring, k_full, k_empty, k_stage, k_phase, k_desc, k_moved, gathered, b, h, local, k_row,
                            STAGES, BYTES, GATHER,
                        )  # fmt: skip
                        v_stage, v_phase = _fetch(
                            v_ring, v_full, v_empty, v_stage, v_phase, v_desc, v_moved, gathered, b, h, local, v_row,
                            STAGES, BYTES, GATHER,
                        )  # fmt: skip
                    v_stage, v_phase = _fetch(
                        v_ring, v_full, v_empty, v_stage, v_phase, v_desc, v_moved, gathered, b, h, local, k_row,
                        STAGES, BYTES, GATHER,
                    )  # fmt: skip
                else:
                    k_stage, k_phase = _fetch_both(
                        rings, bars, fetched, k_stage, k_phase, gathered, b, h, local, k_row, k_row,
                        True, False, STAGES, BYTES, GATHER,
                    )  # fmt: skip
                    for e in range(1, listed):
                        v_row = k_row
                        k_row = gl.load(start_row + gl.load(col_idx + entry_of(e, first, plain, TEXT_BEFORE)))
                        k_stage, k_phase = _fetch_both(
                            rings, bars, fetched, k_stage, k_phase, gathered, b, h, local, k_row, v_row,
                            True, True, STAGES, BYTES, GATHER,
                        )  # fmt: skip
                    k_stage, k_phase = _fetch_both(
                        rings, bars, fetched, k_stage, k_phase, gathered, b, h, local, k_row, k_row,
                        False, True, STAGES, BYTES, GATHER,
                    )  # fmt: skip
            if HAS_TAIL:
                if tail != TAIL_NONE:
                    bh = b * HEADS + h
                    for n in range(0, gl.where(tail == TAIL_CENTROIDS, 2 * num_blocks, num_blocks), BLOCK):
                        k_stage, k_phase = _fetch(
                            k_ring, k_full, k_empty, k_stage, k_phase, mean_k, mean_k, 0, 0, bh, bh, n,
                            STAGES, BYTES, False,
                        )  # fmt: skip
                        if tail == TAIL_MOMENTS:
                            mbarrier.wait(k_empty.index(k_stage), k_phase ^ 1)
                            mbarrier.expect(k_full.index(k_stage), BYTES)
                            as_var = k_ring.index(k_stage)._reinterpret(
                                gl.bfloat16, [1, 1, BLOCK, D], k_ring.type.layout
                            )
                            copy_tile(var_k, [0, bh, n, 0], k_full.index(k_stage), as_var)
                            k_stage, k_phase = next_slot(k_stage, k_phase, STAGES)
                        v_stage, v_phase = _fetch(
                            v_ring, v_full, v_empty, v_stage, v_phase, mean_v, mean_v, 0, 0, bh, bh, n,
                            STAGES, BYTES, False,
                        )  # fmt: skip


@gluon.jit
def _pairs(p, DTYPE: gl.constexpr):
    """Probabilities ``[64, columns]`` in 16 bits, two neighbours in an int32 ``[64, columns / 2]``.

    So they are carried from one block to the next. As they are, the compiler would take them apart and join them again.
    """
    first, second = gl.split(p.reshape([64, p.shape[1] // 2, 2]))
    if gl.bfloat16 == DTYPE:
        pairs = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [first, second], dtype=gl.int32, is_pure=True, pack=1
        )
    else:
        pairs = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [first, second], dtype=gl.int32, is_pure=True, pack=1
        )
    return pairs


@gluon.jit
def _operand(pairs, DTYPE: gl.constexpr, P: gl.constexpr):
    """Probabilities as an operand of the matrix units."""
    both = gl.join(pairs.to(gl.int16), (pairs >> 16).to(gl.int16))
    p = both.reshape([64, 2 * pairs.shape[1]]).to(DTYPE, bitcast=True)
    return gl.convert_layout(p, P, assert_trivial=True)


@gluon.jit
def _cut(p):
    """fp32 without the bits that bf16 has not."""
    return (p.to(gl.int32, bitcast=True) & -65536).to(gl.float32, bitcast=True)


@gluon.jit
def _softmax(
    logits, total, top, factor, PASS: gl.constexpr, RETURN_LSE: gl.constexpr, S: gl.constexpr, T: gl.constexpr
):  # fmt: skip
    """One step of the running softmax: probabilities, and by how much what came before shrinks.

    In the first of two passes these are exponentials of the logits as they are, and nothing shrinks. The largest, which
    otherwise is 1, then is rounded like all others, and may be all there is. So what is summed is what they are in
    bf16, cut off rather than rounded, which takes half the instructions; and in ``top``, where the sum itself is asked
    for, what they are in fp32.
    """
    if PASS == 1:
        p = gl.exp2(logits * factor)
        if RETURN_LSE:
            top += partial_sums(p, T)
        p = _cut(p)
        keep = 1.0
    else:
        new_top = gl.maximum(top, row_max(logits, S) * factor)
        shift = running_shift(new_top)
        keep = gl.exp2(top - shift)
        top = new_top
        total = total * gl.convert_layout(keep, gl.SliceLayout(1, T), assert_trivial=True)[:, None]
        p = gl.exp2(logits * factor - shift[:, None])
    return p, total + partial_sums(p, T), top, keep


@gluon.jit
def _attend_block(
    q, acc, pairs, total, top, shrink, rings, bars, k_stage, k_phase, v_stage, v_phase, turns, factor, e, first,
    plain, col_idx, start_row, mask_row, text_before, visual_end,
    CHECKED: gl.constexpr, WHICH: gl.constexpr, TEXT_BEFORE: gl.constexpr, D: gl.constexpr, BLOCK: gl.constexpr,
    STAGES: gl.constexpr, HAS_MASK: gl.constexpr, TAKE_TURNS: gl.constexpr, SHARED: gl.constexpr,
    PASS: gl.constexpr, RETURN_LSE: gl.constexpr,
):  # fmt: skip
    """Attend the keys of block ``e`` of a list, and meanwhile the values of the one before, by its probabilities.

    ``shrink``: by how much what came before that one shrinks.
    """
    _q_ring, k_ring, v_ring = rings
    q_full, _q_empty, k_full, k_empty, v_full, v_empty, turn = bars
    DTYPE: gl.constexpr = v_ring.dtype
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    T: gl.constexpr = sums_layout()
    mbarrier.wait(k_full.index(k_stage), k_phase)
    if TAKE_TURNS:
        # One consumer multiplies while the other works on its softmax. Consumer 0 begins.
        mbarrier.wait(turn[WHICH], (turns & 1) ^ (1 - WHICH))
    k = k_ring.index(k_stage).reshape([BLOCK, D])
    zeros = gl.zeros([64, BLOCK], gl.float32, layout=S)
    sums = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    if SHARED:
        values = v_ring.index(k_stage).reshape([BLOCK, D])
    else:
        mbarrier.wait(v_full.index(v_stage), v_phase)
        values = v_ring.index(v_stage).reshape([BLOCK, D])
    if PASS != 1:
        # Here, while the first product is under way.
        acc = acc * shrink
    products = warpgroup_mma(_operand(pairs, DTYPE, P), values, acc, is_async=True)
    if TAKE_TURNS:
        mbarrier.arrive(turn[1 - WHICH], count=1)
        turns += 1
    logits = warpgroup_mma_wait(1, deps=(sums,))
    if not SHARED:
        mbarrier.arrive(k_empty.index(k_stage), count=1)
    if CHECKED:
        j = gl.load(col_idx + entry_of(e, first, plain, TEXT_BEFORE))
        logits = checked(logits, j, start_row, mask_row, text_before, visual_end, HAS_MASK, S)
    probabilities, total, top, keep = _softmax(logits, total, top, factor, PASS, RETURN_LSE, S, T)
    # Never waited for, which the assembler cannot know. It orders code between branches as it likes, and would put the
    # softmax after the wait for the second product.
    mbarrier.wait(q_full.index(0), 0, pred=first + e < 0)
    products = warpgroup_mma_wait(0, deps=(products,))
    if SHARED:
        mbarrier.arrive(k_empty.index(k_stage), count=1)
    else:
        mbarrier.arrive(v_empty.index(v_stage), count=1)
        v_stage, v_phase = next_slot(v_stage, v_phase, STAGES)
    k_stage, k_phase = next_slot(k_stage, k_phase, STAGES)
    shrink = 1.0 if PASS == 1 else gl.convert_layout(keep, gl.SliceLayout(1, O))[:, None]
    # Not before the wait: it would hold the products up, whose operand these registers are.
    pairs = _pairs(probabilities, DTYPE)
    return products, pairs, total, top, shrink, k_stage, k_phase, v_stage, v_phase, turns


@gluon.jit
def _attend_summaries(
    q, acc, total, top, rings, bars, bias_ptr, k_stage, k_phase, v_stage, v_phase, h, i, num_blocks, count, scale,
    MOMENTS: gl.constexpr, D: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, PASS: gl.constexpr,
    RETURN_LSE: gl.constexpr,
):  # fmt: skip
    """Attend ``count`` summaries of a head's blocks; with ``MOMENTS`` by the mean and the variance of their keys."""
    _q_ring, k_ring, v_ring = rings
    _q_full, _q_empty, k_full, k_empty, v_full, v_empty, _turn = bars
    DTYPE: gl.constexpr = v_ring.dtype
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    Q2: gl.constexpr = gl.DotOperandLayout(0, S, 2)
    T: gl.constexpr = sums_layout()
    factor = scale * 1.4426950408889634
    columns = gl.arange(0, BLOCK, layout=gl.BlockedLayout([1], [32], [4], [0]))
    bias_row = bias_ptr + (h * num_blocks + i).to(gl.int64) * (2 * num_blocks)
    if MOMENTS:
        # Half the variance of a block's logits, in units of the products with q.
        half = q.load(Q2).to(gl.float32)
        half = (half * half * (0.5 * scale)).to(gl.bfloat16)
    for n in range(0, count, BLOCK):
        # Asked for here, long before it is needed, one for a thread.
        bias = gl.load(bias_row + n + columns, mask=n + columns < count, other=float("-inf"))
        mbarrier.wait(k_full.index(k_stage), k_phase)
        k = k_ring.index(k_stage).reshape([BLOCK, D])
        zeros = gl.zeros([64, BLOCK], gl.float32, layout=S)
        logits = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
        means = k_stage
        if MOMENTS:
            k_stage, k_phase = next_slot(k_stage, k_phase, STAGES)
            mbarrier.wait(k_full.index(k_stage), k_phase)
            var = k_ring.index(k_stage)._reinterpret(gl.bfloat16, [1, 1, BLOCK, D], k_ring.type.layout)
            logits = warpgroup_mma(half, var.reshape([BLOCK, D]).permute((1, 0)), logits, is_async=True)
        logits = warpgroup_mma_wait(0, deps=(logits,))
        mbarrier.arrive(k_empty.index(means), count=1)
        if MOMENTS:
            mbarrier.arrive(k_empty.index(k_stage), count=1)
        k_stage, k_phase = next_slot(k_stage, k_phase, STAGES)
        bias = gl.convert_layout(bias.to(gl.float32), gl.SliceLayout(0, S))
        logits = logits * factor + bias[None, :]
        probabilities, total, top, keep = _softmax(logits, total, top, 1.0, PASS, RETURN_LSE, S, T)
        if PASS != 1:
            acc = acc * gl.convert_layout(keep, gl.SliceLayout(1, O))[:, None]
        mbarrier.wait(v_full.index(v_stage), v_phase)
        p = gl.convert_layout(probabilities.to(DTYPE), P)
        acc = warpgroup_mma(p, v_ring.index(v_stage).reshape([BLOCK, D]), acc)
        mbarrier.arrive(v_empty.index(v_stage), count=1)
        v_stage, v_phase = next_slot(v_stage, v_phase, STAGES)
    return acc, total, top, k_stage, k_phase, v_stage, v_phase


@gluon.jit
def _consume_sixteen(
    rings, bars, tensors, lists, scale, seq, total_tiles, tiles, num_blocks, text_before, visual_end,
    WHICH: gl.constexpr, HEADS: gl.constexpr, TEXT_BEFORE: gl.constexpr,
    D: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, HAS_MASK: gl.constexpr,
    HAS_TAIL: gl.constexpr, GATHER: gl.constexpr, RETURN_LSE: gl.constexpr, TAKE_TURNS: gl.constexpr,
    SHARED: gl.constexpr, PASS: gl.constexpr,
):  # fmt: skip
    """Attend the tiles of one program, 64 queries of each, in 16 bits.

    Blocks of 128 keys, without tails, share a slot, and so its two barriers, with the values of the block before. Tails
    fetch keys and values ahead as each have room, and blocks of 64 take turns too quickly for so few slots.
    """
    q_ring, k_ring, v_ring = rings
    q_full, q_empty, k_full, k_empty, v_full, v_empty, _turn = bars
    out_ptr, lse_ptr, gather_ptr, key_mask, bias_ptr, _q_scale, _k_scale, _v_scale, _v_mean = tensors
    work, col_idx, block_start = lists
    DTYPE: gl.constexpr = v_ring.dtype
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    T: gl.constexpr = sums_layout()
    factor = scale * 1.4426950408889634
    used_q = 0
    k_stage = 0
    k_phase = 0
    v_stage = 0
    v_phase = 0
    turns = 0
    b, h, _local, i, order, row, end, first, listed, plain, tail, gathered = tile_of(
        work, gl.program_id(0), tiles, total_tiles, PASS
    )
    count = gl.load(work[1]) if PASS == 2 else total_tiles
    for t in range(gl.program_id(0), count, gl.num_programs(0)):
        start_row = block_start + order * (num_blocks + 1)
        if row < end:
            acc = gl.zeros([64, D], gl.float32, layout=O)
            total = gl.zeros([64, 4], gl.float32, layout=T)
            if PASS == 1:
                top = gl.zeros([64, 4], gl.float32, layout=T)
            else:
                top = gl.full([64], float("-inf"), gl.float32, layout=gl.SliceLayout(1, S))
            if (listed > 0) | (tail != TAIL_NONE):
                q = q_ring.index(WHICH).reshape([64, D])
                mbarrier.wait(q_full.index(0), used_q & 1)
                used_q += 1
                mask_row = key_mask + b.to(gl.int64) * seq if HAS_MASK else key_mask
                if listed > 0:
                    j = gl.load(col_idx + entry_of(0, first, plain, TEXT_BEFORE))
                    mbarrier.wait(k_full.index(k_stage), k_phase)
                    k = k_ring.index(k_stage).reshape([BLOCK, D])
                    zeros = gl.zeros([64, BLOCK], gl.float32, layout=S)
                    logits = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False)
                    mbarrier.arrive(k_empty.index(k_stage), count=1)
                    k_stage, k_phase = next_slot(k_stage, k_phase, STAGES)
                    if plain == 0:
                        logits = checked(logits, j, start_row, mask_row, text_before, visual_end, HAS_MASK, S)
                    probabilities, total, top, keep = _softmax(logits, total, top, factor, PASS, RETURN_LSE, S, T)
                    pairs = _pairs(probabilities, DTYPE)
                    shrink = 1.0 if PASS == 1 else gl.convert_layout(keep, gl.SliceLayout(1, O))[:, None]
                    # First the plain blocks, in a loop of their own, then those to be checked.
                    for CHECKED in gl.static_range(2):
                        for e in range(gl.maximum(plain, 1) if CHECKED else 1, listed if CHECKED else plain):
                            acc, pairs, total, top, shrink, k_stage, k_phase, v_stage, v_phase, turns = _attend_block(
                                q, acc, pairs, total, top, shrink, rings, bars, k_stage, k_phase, v_stage, v_phase,
                                turns, factor, e, first, plain, col_idx, start_row, mask_row, text_before, visual_end,
                                CHECKED, WHICH, TEXT_BEFORE, D, BLOCK, STAGES, HAS_MASK, TAKE_TURNS, SHARED, PASS,
                                RETURN_LSE,
                            )  # fmt: skip
                    if not HAS_TAIL:
                        mbarrier.arrive(q_empty.index(0), count=1)
                    p = _operand(pairs, DTYPE, P)
                    if PASS != 1:
                        acc = acc * shrink
                    if SHARED:
                        mbarrier.wait(k_full.index(k_stage), k_phase)
                        acc = warpgroup_mma(p, v_ring.index(k_stage).reshape([BLOCK, D]), acc)
                        mbarrier.arrive(k_empty.index(k_stage), count=1)
                        k_stage, k_phase = next_slot(k_stage, k_phase, STAGES)
                    else:
                        mbarrier.wait(v_full.index(v_stage), v_phase)
                        acc = warpgroup_mma(p, v_ring.index(v_stage).reshape([BLOCK, D]), acc)
                        mbarrier.arrive(v_empty.index(v_stage), count=1)
                        v_stage, v_phase = next_slot(v_stage, v_phase, STAGES)
                if HAS_TAIL:
                    if tail != TAIL_NONE:
                        if tail == TAIL_MOMENTS:
                            acc, total, top, k_stage, k_phase, v_stage, v_phase = _attend_summaries(
                                q, acc, total, top, rings, bars, bias_ptr, k_stage, k_phase, v_stage, v_phase, h, i,
                                num_blocks, num_blocks, scale, True, D, BLOCK, STAGES, PASS, RETURN_LSE,
                            )  # fmt: skip
                        else:
                            acc, total, top, k_stage, k_phase, v_stage, v_phase = _attend_summaries(
                                q, acc, total, top, rings, bars, bias_ptr, k_stage, k_phase, v_stage, v_phase, h, i,
                                num_blocks, gl.where(tail == TAIL_CENTROIDS, 2 * num_blocks, num_blocks), scale, False,
                                D, BLOCK, STAGES, PASS, RETURN_LSE,
                            )  # fmt: skip
                    mbarrier.arrive(q_empty.index(0), count=1)

            next_tile = tile_of(work, gl.minimum(t + gl.num_programs(0), count - 1), tiles, total_tiles, PASS)
            total = gl.sum(total, 1)
            if PASS == 1:
                if (listed > 0) | (tail != TAIL_NONE):
                    if gl.min(within_range(total).to(gl.int32), 0) == 0:
                        mark(work, t, total_tiles)
            sums = gl.convert_layout(total, gl.SliceLayout(1, O))
            out = acc / gl.where(sums > 0, sums, 1.0)[:, None]
            store_rows(
                out, out_ptr, row + WHICH * 64, end, b, h, order, gathered, gather_ptr, seq, HEADS, HEAD_DIM, GATHER
            )
            if RETURN_LSE:
                if PASS == 1:
                    total = gl.sum(top, 1)
                    top = gl.zeros([64], gl.float32, layout=gl.SliceLayout(1, S))
                store_lse(
                    top, total, lse_ptr, row + WHICH * 64, end, b, h, order, gathered, gather_ptr, seq,
                    HEADS, GATHER, S,
                )  # fmt: skip
        else:
            next_tile = tile_of(work, gl.minimum(t + gl.num_programs(0), count - 1), tiles, total_tiles, PASS)
        b, h, _local, i, order, row, end, first, listed, plain, tail, gathered = next_tile


@gluon.jit
def _consumer(
    rings, bars, tensors, lists, scale, seq, total_tiles, tiles, num_blocks, text_before, visual_end,
    WHICH: gl.constexpr, HEADS: gl.constexpr, TEXT_BEFORE: gl.constexpr,
    D: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, HAS_MASK: gl.constexpr,
    HAS_TAIL: gl.constexpr, GATHER: gl.constexpr, RETURN_LSE: gl.constexpr, TAKE_TURNS: gl.constexpr,
    SHARED: gl.constexpr, PASS: gl.constexpr, NUMERICS: gl.constexpr,
):  # fmt: skip
    if NUMERICS == IN_AUTO:
        _consume_sixteen(
            rings, bars, tensors, lists, scale, seq, total_tiles, tiles, num_blocks, text_before, visual_end,
            WHICH, HEADS, TEXT_BEFORE, D, HEAD_DIM, BLOCK, STAGES, HAS_MASK, HAS_TAIL, GATHER, RETURN_LSE, TAKE_TURNS,
            SHARED, PASS,
        )  # fmt: skip
    else:
        consume_eight(
            rings, bars, tensors, lists, scale, seq, total_tiles, tiles, num_blocks, text_before, visual_end,
            WHICH, HEADS, TEXT_BEFORE, D, HEAD_DIM, BLOCK, STAGES, HAS_MASK, HAS_TAIL, GATHER, RETURN_LSE, NUMERICS,
        )  # fmt: skip


@gluon.jit
def _producer(
    rings, bars, fetched, lists, total_tiles, tiles, num_blocks,
    HEADS: gl.constexpr, TEXT_BEFORE: gl.constexpr,
    D: gl.constexpr, BLOCK: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, HAS_TAIL: gl.constexpr,
    GATHER: gl.constexpr, SHARED: gl.constexpr, PASS: gl.constexpr, NUMERICS: gl.constexpr,
):  # fmt: skip
    if NUMERICS == IN_AUTO:
        _produce_sixteen(
            rings, bars, fetched, lists, total_tiles, tiles, num_blocks,
            HEADS, TEXT_BEFORE, D, BLOCK, CONSUMERS, STAGES, HAS_TAIL, GATHER, SHARED, PASS,
        )  # fmt: skip
    else:
        produce_eight(
            rings, bars, fetched, lists, total_tiles, tiles, num_blocks,
            TEXT_BEFORE, D, BLOCK, CONSUMERS, STAGES, HAS_TAIL,
        )  # fmt: skip


@gluon.jit
def forward_kernel(
    q_desc, k_desc, v_desc, q_moved, k_moved, v_moved, mean_k, var_k, mean_v,
    out_ptr, lse_ptr, gather_ptr, key_mask, bias_ptr, q_scale, k_scale, v_scale, v_mean,
    records, marked, col_idx, block_start,
    scale, seq, total_tiles, tiles, num_blocks, text_before, visual_end,
    HEADS: gl.constexpr, TEXT_BEFORE: gl.constexpr, D: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, HAS_MASK: gl.constexpr, HAS_TAIL: gl.constexpr,
    GATHER: gl.constexpr, RETURN_LSE: gl.constexpr, TAKE_TURNS: gl.constexpr, SHARED: gl.constexpr,
    PASS: gl.constexpr, NUMERICS: gl.constexpr,
    CONSUMER_REGS: gl.constexpr, PRODUCER_REGS: gl.constexpr,
):  # fmt: skip
    V_ROWS: gl.constexpr = BLOCK if NUMERICS == IN_AUTO else D
    V_COLUMNS: gl.constexpr = D if NUMERICS == IN_AUTO else BLOCK
    q_ring = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 1, 64, D], q_desc.layout)
    k_ring = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, BLOCK, D], k_desc.layout)
    v_ring = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, V_ROWS, V_COLUMNS], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full.index(0), count=1)
    mbarrier.init(q_empty.index(0), count=CONSUMERS)
    # Apart: the compiler takes all barriers of an array for one, and has warps wait for one another between their uses.
    first_turn = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    second_turn = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(first_turn, count=1)
    mbarrier.init(second_turn, count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(k_full.index(s), count=1)
        mbarrier.init(v_full.index(s), count=1)
        mbarrier.init(k_empty.index(s), count=CONSUMERS)
        mbarrier.init(v_empty.index(s), count=CONSUMERS)
    rings = (q_ring, k_ring, v_ring) if NUMERICS == IN_AUTO else (q_ring, k_ring, v_ring, ones(BLOCK))
    fence_async_shared()
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty, (first_turn, second_turn))
    # What a call has not is not handed over, since the host makes every descriptor anew; nor is it ever read.
    if q_moved is None:
        q_moved, k_moved, v_moved = q_desc, k_desc, v_desc
    if mean_k is None:
        mean_k, var_k, mean_v = k_desc, k_desc, v_desc
    fetched = (q_desc, k_desc, v_desc, q_moved, k_moved, v_moved, mean_k, var_k, mean_v)
    tensors = (out_ptr, lse_ptr, gather_ptr, key_mask, bias_ptr, q_scale, k_scale, v_scale, v_mean)
    lists = ((records, marked), col_idx, block_start)
    # Constants stay constant only where they are written into the call.
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consumer, (
                    rings, bars, tensors, lists, scale, seq, total_tiles, tiles, num_blocks, text_before, visual_end,
                    0, HEADS, TEXT_BEFORE, D, HEAD_DIM, BLOCK, STAGES, HAS_MASK, HAS_TAIL, GATHER,
                    RETURN_LSE, TAKE_TURNS, SHARED, PASS, NUMERICS,
                )),
                (_consumer, (
                    rings, bars, tensors, lists, scale, seq, total_tiles, tiles, num_blocks, text_before, visual_end,
                    1, HEADS, TEXT_BEFORE, D, HEAD_DIM, BLOCK, STAGES, HAS_MASK, HAS_TAIL, GATHER,
                    RETURN_LSE, TAKE_TURNS, SHARED, PASS, NUMERICS,
                )),
                (_producer, (
                    rings, bars, fetched, lists, total_tiles, tiles, num_blocks,
                    HEADS, TEXT_BEFORE, D, BLOCK, CONSUMERS, STAGES, HAS_TAIL, GATHER, SHARED, PASS, NUMERICS,
                )),
            ],
            [4, 1],
            [CONSUMER_REGS, PRODUCER_REGS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consumer, (
                    rings, bars, tensors, lists, scale, seq, total_tiles, tiles, num_blocks, text_before, visual_end,
                    0, HEADS, TEXT_BEFORE, D, HEAD_DIM, BLOCK, STAGES, HAS_MASK, HAS_TAIL, GATHER,
                    RETURN_LSE, TAKE_TURNS, SHARED, PASS, NUMERICS,
                )),
                (_producer, (
                    rings, bars, fetched, lists, total_tiles, tiles, num_blocks,
                    HEADS, TEXT_BEFORE, D, BLOCK, CONSUMERS, STAGES, HAS_TAIL, GATHER, SHARED, PASS, NUMERICS,
                )),
            ],
            [1],
            [PRODUCER_REGS],
        )  # fmt: skip
    # Barriers that a variant never waits for would end at their init, and the compiler would put other values in their
    # place. Memory that still is a barrier must hold nothing else (PTX ISA, mbarrier.init and mbarrier.inval): where
    # processes take turns on a GPU, such values came back as NaN.
    mbarrier.invalidate(q_full.index(0))
    mbarrier.invalidate(q_empty.index(0))
    mbarrier.invalidate(first_turn)
    mbarrier.invalidate(second_turn)
    for s in gl.static_range(STAGES):
        mbarrier.invalidate(k_full.index(s))
        mbarrier.invalidate(k_empty.index(s))
        mbarrier.invalidate(v_full.index(s))
        mbarrier.invalidate(v_empty.index(s))
