"""Producer and consumer of the Hopper kernel for products in 8 bits.

As in 16 bits, a consumer works on the softmax of one block while the product of the last one's probabilities with its
values is under way. What differs is what lies in memory and in registers: blocks padded one after another, values
transposed, scales, and probabilities four to a register. And, since the rings have room for it, a block's keys share a
slot, and so its two barriers, with the values of the block before.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from diffsparse.kernels.gluon_compat import copy_tile
from diffsparse.kernels.gluon_parts import (
    checked,
    entry_of,
    next_slot,
    partial_sums,
    row_max,
    running_shift,
    store_lse,
    store_rows,
    sums_layout,
    tile_of,
)

__all__ = ["consume_eight", "produce_eight"]

#: 1.5 * 2^23: from here on fp32 has the integers, and nothing between them.
_INTEGERS = gl.constexpr(12582912.0)


@gluon.jit
def _fetch(
    rings, bars, stage, phase, fetched, b, h, k_row, v_row,
    KEYS: gl.constexpr, VALUES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy a block of keys, one of values, or both into a slot, once the consumers are done with it. Returns the next
    slot."""
    _q_ring, k_ring, v_ring = rings
    _q_full, _q_empty, full, empty, _v_full, _v_empty, _turn = bars
    _q_desc, k_desc, v_desc, _q_moved, _k_moved, _v_moved, _mean_k, _var_k, _mean_v = fetched
    BYTES: gl.constexpr = k_ring.shape[3] * k_ring.shape[4]
    mbarrier.wait(empty.index(stage), phase ^ 1)
    mbarrier.expect(full.index(stage), BYTES * (KEYS + VALUES))
    if KEYS:
        copy_tile(k_desc, [b, h, k_row, 0], full.index(stage), k_ring.index(stage))
    if VALUES:
        copy_tile(v_desc, [b, h, v_row, 0], full.index(stage), v_ring.index(stage))
    return next_slot(stage, phase, STAGES)


@gluon.jit
def produce_eight(
    rings, bars, fetched, lists, total_tiles, tiles, num_blocks,
    TEXT_BEFORE: gl.constexpr, D: gl.constexpr, BLOCK: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    HAS_TAIL: gl.constexpr,
):  # fmt: skip
    """Fetch what the consumers of one program attend: of keys ``[BLOCK, D]``, of values ``[D, BLOCK]``."""
    q_ring, _k_ring, _v_ring = rings
    q_full, q_empty, _full, _empty, _v_full, _v_empty, _turn = bars
    q_desc, _k_desc, _v_desc, _q_moved, _k_moved, _v_moved, _mean_k, _var_k, _mean_v = fetched
    work, col_idx, _block_start = lists
    used_q = 0
    stage = 0
    phase = 0
    for t in range(gl.program_id(0), total_tiles, gl.num_programs(0)):
        b, h, _local, i, _order, row, end, first, listed, plain, tail, _gathered = tile_of(
            work, t, tiles, total_tiles, 0
        )
        if (row < end) & ((listed > 0) | (tail != 0)):
            mbarrier.wait(q_empty.index(0), (used_q & 1) ^ 1)
            mbarrier.expect(q_full.index(0), CONSUMERS * 64 * D)
            for c in gl.static_range(CONSUMERS):
                copy_tile(q_desc, [b, h, i * BLOCK + c * 64, 0], q_full.index(0), q_ring.index(c))
            used_q += 1
            if listed > 0:
                j = gl.load(col_idx + entry_of(0, first, plain, TEXT_BEFORE))
                stage, phase = _fetch(rings, bars, stage, phase, fetched, b, h, j * BLOCK, 0, True, False, STAGES)
                for e in range(1, listed):
                    next_j = gl.load(col_idx + entry_of(e, first, plain, TEXT_BEFORE))
                    stage, phase = _fetch(
                        rings, bars, stage, phase, fetched, b, h, next_j * BLOCK, j * D, True, True, STAGES
                    )
                    j = next_j
                stage, phase = _fetch(rings, bars, stage, phase, fetched, b, h, 0, j * D, False, True, STAGES)
            if HAS_TAIL:
                if tail != 0:
                    # Summaries are blocks behind the others.
                    for n in range(0, gl.where(tail == 3, 2 * num_blocks, num_blocks), BLOCK):
                        k_row = num_blocks * BLOCK + n
                        v_row = (num_blocks + n // BLOCK) * D
                        stage, phase = _fetch(
                            rings, bars, stage, phase, fetched, b, h, k_row, v_row, True, True, STAGES
                        )


@gluon.jit
def _as_float(x):
    """Sums of int8 products, below 2^22, as fp32, plus _INTEGERS: added to its bits, as conversions run at a sixteenth
    of the rate of additions."""
    return (x + 0x4B400000).to(gl.float32, bitcast=True)


@gluon.jit
def _four_fp8(first, second, third, fourth):
    """fp32 as fp8, four in an int32."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high};
        }""",
        "=r,f,f,f,f", [first, second, third, fourth], dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _packed(p):
    """Probabilities ``[64, columns]`` as fp8, four in an int32 ``[64, columns / 4]``: what a thread has of 16 columns,
    which are neighbours in an operand (see value_order).

    So they are carried from one block to the next. As bytes each would take a register, and be taken apart and joined.
    """
    columns: gl.constexpr = p.shape[1]
    p = p.reshape([64, columns // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([64, columns // 4, 2, 2])
    even, odd = gl.split(p)
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    return _four_fp8(first, second, third, fourth)


@gluon.jit
def _unpacked(x):
    first = x.to(gl.int8)
    second = (x >> 8).to(gl.int8)
    third = (x >> 16).to(gl.int8)
    fourth = (x >> 24).to(gl.int8)
    pairs = gl.join(gl.join(first, second), gl.join(third, fourth)).permute((0, 1, 3, 2))
    return pairs.reshape([64, 4 * x.shape[1]]).to(gl.float8e4nv, bitcast=True)


@gluon.jit
def _logits(q, ring, stage, SUM: gl.constexpr, S: gl.constexpr):
    """Begin the product of the queries with the keys in a slot, ``[64, keys]``."""
    KEYS: gl.constexpr = ring.shape[3]
    keys = ring.index(stage).reshape([KEYS, ring.shape[4]]).permute((1, 0))
    return warpgroup_mma(q, keys, gl.zeros([64, KEYS], SUM, layout=S), use_acc=False, is_async=True)


@gluon.jit
def _values(ring, stage):
    """A slot of values as keys x channels."""
    D: gl.constexpr = ring.shape[3]
    return ring.index(stage).reshape([D, ring.shape[4]]).permute((1, 0))


@gluon.jit
def _products(operand, ring, stage, O: gl.constexpr):
    """Begin the product of probabilities with the values in a slot, ``[64, D]``."""
    D: gl.constexpr = ring.shape[3]
    zeros = gl.zeros([64, D], gl.float32, layout=O)
    return warpgroup_mma(operand, _values(ring, stage), zeros, use_acc=False, is_async=True)


@gluon.jit
def _softmax(logits, total, top, factor, OFFSET: gl.constexpr, S: gl.constexpr, T: gl.constexpr):
    """One step of the running softmax: probabilities times 2^8, and by how much what came before shrinks.

    ``OFFSET``: what the logits have too much, taken off with the shift.
    """
    new_top = gl.maximum(top, (row_max(logits, S) - OFFSET) * factor)
    shift = running_shift(new_top)
    keep = gl.exp2(top - shift)
    total = total * gl.convert_layout(keep, gl.SliceLayout(1, T), assert_trivial=True)[:, None]
    # In fp8 small ones keep more of their bits so.
    shift += OFFSET * factor - 8.0
    p = gl.exp2(logits * factor - shift[:, None])
    return p, total + partial_sums(p, T), new_top, keep


@gluon.jit
def consume_eight(
    rings, bars, tensors, lists, scale, seq, total_tiles, tiles, num_blocks, text_before, visual_end,
    WHICH: gl.constexpr, HEADS: gl.constexpr, TEXT_BEFORE: gl.constexpr,
    D: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, HAS_MASK: gl.constexpr,
    HAS_TAIL: gl.constexpr, GATHER: gl.constexpr, RETURN_LSE: gl.constexpr, NUMERICS: gl.constexpr,
):  # fmt: skip
    """Attend the tiles of one program, 64 queries of each, in int8 (``NUMERICS`` 1) or fp8 (2)."""
    q_ring, k_ring, v_ring = rings
    q_full, q_empty, full, empty, _v_full, _v_empty, _turn = bars
    out_ptr, lse_ptr, gather_ptr, key_mask, bias_ptr, q_scale, k_scale, v_scale, v_mean = tensors
    work, col_idx, block_start = lists
    SUM: gl.constexpr = gl.int32 if NUMERICS == 1 else gl.float32
    OFFSET: gl.constexpr = _INTEGERS if NUMERICS == 1 else 0.0
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 32])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    P: gl.constexpr = gl.DotOperandLayout(0, O, 4)
    T: gl.constexpr = sums_layout()
    factor = scale * 1.4426950408889634
    used_q = 0
    stage = 0
    phase = 0
    b, h, _local, i, order, row, end, first, listed, plain, tail, gathered = tile_of(
        work, gl.program_id(0), tiles, total_tiles, 0
    )
    for t in range(gl.program_id(0), total_tiles, gl.num_programs(0)):
        start_row = block_start + order * (num_blocks + 1)
        if row < end:
            acc = gl.zeros([64, D], gl.float32, layout=O)
            total = gl.zeros([64, 4], gl.float32, layout=T)
            top = gl.full([64], float("-inf"), gl.float32, layout=gl.SliceLayout(1, S))
            if (listed > 0) | (tail != 0):
                q = q_ring.index(WHICH).reshape([64, D])
                mbarrier.wait(q_full.index(0), used_q & 1)
                used_q += 1
                mask_row = key_mask + b.to(gl.int64) * seq if HAS_MASK else key_mask
                unit = factor * gl.load(q_scale + (b * HEADS + h) * num_blocks + i)
                scales = (b * HEADS + h) * num_blocks
                if HAS_TAIL:
                    # Blocks of summaries have scales too.
                    scales = (b * HEADS + h) * (num_blocks + (2 * num_blocks + BLOCK - 1) // BLOCK)
                if listed > 0:
                    j = gl.load(col_idx + entry_of(0, first, plain, TEXT_BEFORE))
                    block_unit = unit * gl.load(k_scale + scales + j)
                    mbarrier.wait(full.index(stage), phase)
                    logits = warpgroup_mma_wait(0, deps=(_logits(q, k_ring, stage, SUM, S),))
                    mbarrier.arrive(empty.index(stage), count=1)
                    stage, phase = next_slot(stage, phase, STAGES)
                    if NUMERICS == 1:
                        logits = _as_float(logits)
                    if plain == 0:
                        logits = checked(logits, j, start_row, mask_row, text_before, visual_end, HAS_MASK, S)
                    probabilities, total, top, keep = _softmax(logits, total, top, block_unit, OFFSET, S, T)
                    p = _packed(probabilities)
                    # The matrix units add up fp8 products with 14 bits. So each block's sum starts afresh, and is added
                    # in fp32 (SageAttention2, section 3.4); by when the next block's shrinks it all.
                    last_shrink = gl.convert_layout(keep, gl.SliceLayout(1, O))[:, None]
                    mbarrier.wait(full.index(stage), phase)
                    for e in range(1, listed):
                        # Loaded here, long before it is needed.
                        j = gl.load(col_idx + entry_of(e, first, plain, TEXT_BEFORE))
                        block_unit = unit * gl.load(k_scale + scales + j)
                        operand = gl.convert_layout(_unpacked(p), P, assert_trivial=True)
                        sums = _logits(q, k_ring, stage, SUM, S)
                        products = _products(operand, v_ring, stage, O)
                        logits = warpgroup_mma_wait(1, deps=(sums,))
                        if NUMERICS == 1:
                            logits = _as_float(logits)
                        if e >= plain:
                            j = gl.load(col_idx + entry_of(e, first, plain, TEXT_BEFORE))
                            logits = checked(logits, j, start_row, mask_row, text_before, visual_end, HAS_MASK, S)
                        probabilities, total, top, keep = _softmax(logits, total, top, block_unit, OFFSET, S, T)
                        # Here, so that the assembler, which orders code between branches as it likes, cannot put the
                        # softmax after the wait for the second product.
                        done = stage
                        stage, phase = next_slot(stage, phase, STAGES)
                        mbarrier.wait(full.index(stage), phase)
                        products = warpgroup_mma_wait(0, deps=(products,))
                        # Not before the wait: it would hold the products up, whose operand these registers are.
                        p = _packed(probabilities)
                        mbarrier.arrive(empty.index(done), count=1)
                        shrink = gl.convert_layout(keep, gl.SliceLayout(1, O))[:, None]
                        acc = acc * last_shrink + products
                        last_shrink = shrink
                    if not HAS_TAIL:
                        mbarrier.arrive(q_empty.index(0), count=1)
                    operand = gl.convert_layout(_unpacked(p), P, assert_trivial=True)
                    acc = acc * last_shrink
                    acc = warpgroup_mma(operand, _values(v_ring, stage), acc)
                    mbarrier.arrive(empty.index(stage), count=1)
                    stage, phase = next_slot(stage, phase, STAGES)
                if HAS_TAIL:
                    if tail != 0:
                        columns = gl.arange(0, BLOCK, layout=gl.BlockedLayout([1], [32], [4], [0]))
                        count = gl.where(tail == 3, 2 * num_blocks, num_blocks)
                        bias_row = bias_ptr + (h * num_blocks + i).to(gl.int64) * (2 * num_blocks)
                        for n in range(0, count, BLOCK):
                            # Asked for here, long before it is needed, one for a thread.
                            bias = gl.load(bias_row + n + columns, mask=n + columns < count, other=float("-inf"))
                            block_unit = unit * gl.load(k_scale + scales + num_blocks + n // BLOCK)
                            mbarrier.wait(full.index(stage), phase)
                            logits = warpgroup_mma_wait(0, deps=(_logits(q, k_ring, stage, SUM, S),))
                            if NUMERICS == 1:
                                logits = _as_float(logits) - _INTEGERS
                            bias = gl.convert_layout(bias.to(gl.float32), gl.SliceLayout(0, S))
                            logits = logits * block_unit + bias[None, :]
                            # What int8 logits had too much is off already.
                            probabilities, total, top, keep = _softmax(logits, total, top, 1.0, 0.0, S, T)
                            operand = gl.convert_layout(_unpacked(_packed(probabilities)), P, assert_trivial=True)
                            acc = acc * gl.convert_layout(keep, gl.SliceLayout(1, O))[:, None]
                            acc = warpgroup_mma(operand, _values(v_ring, stage), acc)
                            mbarrier.arrive(empty.index(stage), count=1)
                            stage, phase = next_slot(stage, phase, STAGES)
                    mbarrier.arrive(q_empty.index(0), count=1)

            next_tile = tile_of(work, gl.minimum(t + gl.num_programs(0), total_tiles - 1), tiles, total_tiles, 0)
            total = gl.sum(total, 1)
            sums = gl.convert_layout(total, gl.SliceLayout(1, O))
            out = acc / gl.where(sums > 0, sums, 1.0)[:, None]
            channel = gl.arange(0, D, layout=gl.SliceLayout(0, O))
            at = (b * HEADS + h) * HEAD_DIM + channel
            real = channel < HEAD_DIM
            out = out * gl.load(v_scale + at, mask=real, other=0.0)[None, :]
            mean = gl.load(v_mean + at, mask=real, other=0.0)
            out = gl.where((sums > 0)[:, None], out + mean[None, :], 0.0)
            store_rows(
                out, out_ptr, row + WHICH * 64, end, b, h, order, gathered, gather_ptr, seq, HEADS, HEAD_DIM, GATHER
            )
            if RETURN_LSE:
                store_lse(
                    top, total, 8.0, lse_ptr, row + WHICH * 64, end, b, h, order, gathered, gather_ptr, seq,
                    HEADS, GATHER, S,
                )  # fmt: skip
        else:
            next_tile = tile_of(work, gl.minimum(t + gl.num_programs(0), total_tiles - 1), tiles, total_tiles, 0)
        b, h, _local, i, order, row, end, first, listed, plain, tail, gathered = next_tile
