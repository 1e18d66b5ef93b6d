"""Producer and consumer of the Hopper kernel for products in 8 bits.

As in 16 bits, a consumer works on the softmax of one block while the product of the last one's probabilities with its
values is under way. What differs is what lies in memory and in registers: blocks padded one after another, values
transposed, scales, and probabilities four to a register. And, since the rings have room for it, a block's keys share a
slot, and so its two barriers, with the values of the block before.

The products take half the time that they take in 16 bits, so that the softmax is what there is to save on. Powers of
two come from a line (see `_softmax`), and the matrix units, which wait most of the time, add probabilities up: a
product with ones.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from diffsparse.kernels.backends.gluon_sm90.compat import copy_tile
from diffsparse.kernels.backends.gluon_sm90.parts import (
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
from diffsparse.kernels.backends.triton.codes import IN_INT8, TAIL_CENTROIDS, TAIL_NONE

__all__ = ["consume_eight", "ones", "produce_eight"]

#: 1.5 * 2^23: from here on fp32 has the integers, and nothing between them.
_INTEGERS = gl.constexpr(12582912.0)


@gluon.jit
def ones(BLOCK: gl.constexpr):
    """Ones in fp8, ``[8, BLOCK]``, in shared memory: the least columns that a product has, all of them the same."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=BLOCK, element_bitwidth=8, rank=2)
    found = gl.allocate_shared_memory(gl.float8e4nv, [8, BLOCK], LAYOUT)
    # By their bits: converted from 1.0, half of them were something else (Triton 3.6).
    bits = gl.full([8, BLOCK], 0x38, gl.int8, layout=gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0]))
    found.store(bits.to(gl.float8e4nv, bitcast=True))
    return found


@gluon.jit
def _fetch(
    rings, bars, stage, phase, fetched, b, h, k_row, v_row,
    KEYS: gl.constexpr, VALUES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy a block of keys, one of values, or both into a slot, once the consumers are done with it. Returns the next
    slot."""
    _q_ring, k_ring, v_ring, _ones = rings
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
    q_ring, _k_ring, _v_ring, _ones = rings
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
        if (row < end) & ((listed > 0) | (tail != TAIL_NONE)):
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
                if tail != TAIL_NONE:
                    # Summaries are blocks behind the others.
                    for n in range(0, gl.where(tail == TAIL_CENTROIDS, 2 * num_blocks, num_blocks), BLOCK):
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
    """Four numbers in fp8, in an int32, each given by its bits as a whole number, which need not be rounded yet.

    fp16 has the whole numbers from 1024 on, and nothing between them. What is less than 0 becomes 0; NaN stays NaN.
    """
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 low, high, thousand;
        cvt.rn.relu.f16x2.f32 low, $2, $1;
        cvt.rn.relu.f16x2.f32 high, $4, $3;
        mov.b32 thousand, 0x64006400;
        add.rn.f16x2 low, low, thousand;
        add.rn.f16x2 high, high, thousand;
        prmt.b32 $0, low, high, 0x6420;
        }""",
        "=r,f,f,f,f", [first, second, third, fourth], dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _packed(bits):
    """Probabilities ``[64, columns]`` as fp8, four in an int32 ``[64, columns / 4]``: what a thread has of 16 columns,
    which are neighbours in an operand (see value_order).

    So they are carried from one block to the next. As bytes each would take a register, and be taken apart and joined.
    """
    columns: gl.constexpr = bits.shape[1]
    bits = bits.reshape([64, columns // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([64, columns // 4, 2, 2])
    even, odd = gl.split(bits)
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
def _products(operand, columns, zeros):
    """Begin the product of probabilities with values, or with ones."""
    return warpgroup_mma(operand, columns, zeros, use_acc=False, is_async=True)


@gluon.jit
def _softmax(logits, exact, top, factor, OFFSET: gl.constexpr, RETURN_LSE: gl.constexpr, S: gl.constexpr):
    """One step of the running softmax: probabilities times 2^8, as the bits that they have in fp8, and by how much what
    came before shrinks.

    Those bits, read as a whole number, are 8 times the exponent and the fraction: 8 times the logarithm to base 2, with
    a line in place of the curve between two powers of two (Schraudolph 1999, A fast, compact approximation of the
    exponential function, section 2). So logits only need to be rounded. The line is up to 3.9% below and 2.0% above;
    the rounding to 4 bits is up to 6.3% off.

    ``OFFSET``: what the logits have too much, taken off with the shift. ``exact``: where the log-sum-exp is asked for,
    the running sum of the probabilities in fp32.
    """
    new_top = gl.maximum(top, (row_max(logits, S) - OFFSET) * factor)
    shift = running_shift(new_top)
    keep = gl.exp2(top - shift)
    if RETURN_LSE:
        T: gl.constexpr = sums_layout()
        p = gl.exp2(logits * factor - (shift + OFFSET * factor)[:, None])
        exact = exact * gl.convert_layout(keep, gl.SliceLayout(1, T), assert_trivial=True)[:, None] + partial_sums(p, T)
    # 1.0 has the bits 56. In fp8 small ones keep more of their bits where all are 2^8 times as large. The line lies
    # above the curve; with so much taken off it is right on average.
    factor *= 8.0
    shift = 8.0 * shift + (OFFSET * factor - (64.0 + 56.0 - 0.458))
    return logits * factor - shift[:, None], exact, new_top, keep


@gluon.jit
def _attend_block(
    q, acc, p, total, exact, top, shrink, rings, bars, stage, phase, unit, scales, e, first, plain, col_idx, start_row,
    mask_row, text_before, visual_end,
    CHECKED: gl.constexpr, OFFSET: gl.constexpr, TEXT_BEFORE: gl.constexpr, D: gl.constexpr, BLOCK: gl.constexpr,
    STAGES: gl.constexpr, HAS_MASK: gl.constexpr, RETURN_LSE: gl.constexpr,
):  # fmt: skip
    """Attend the keys of block ``e`` of a list, and meanwhile the values of the one before, by its probabilities.

    ``shrink``: by how much what came before that one shrinks. The matrix units add up fp8 products with 14 bits. So
    each block's sum starts afresh, and is added in fp32 (SageAttention2, section 3.4), when what came before shrinks.
    """
    _q_ring, k_ring, v_ring, ones_ring = rings
    _q_full, _q_empty, full, empty, _v_full, _v_empty, _turn = bars
    INT8: gl.constexpr = gl.int8 == k_ring.dtype
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 32])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    N: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 32])
    P: gl.constexpr = gl.DotOperandLayout(0, O, 4)
    # Loaded here, long before it is needed.
    j = gl.load(col_idx + entry_of(e, first, plain, TEXT_BEFORE))
    block_unit = unit * gl.load(scales + j)
    operand = gl.convert_layout(_unpacked(p), P, assert_trivial=True)
    sums = _logits(q, k_ring, stage, gl.int32 if INT8 else gl.float32, S)
    products = _products(operand, _values(v_ring, stage), gl.zeros([64, D], gl.float32, layout=O))
    added = _products(operand, ones_ring.permute((1, 0)), gl.zeros([64, 8], gl.float32, layout=N))
    logits = warpgroup_mma_wait(2, deps=(sums,))
    if INT8:
        logits = _as_float(logits)
    if CHECKED:
        logits = checked(logits, j, start_row, mask_row, text_before, visual_end, HAS_MASK, S)
    bits, exact, top, keep = _softmax(logits, exact, top, block_unit, OFFSET, RETURN_LSE, S)
    # Here, so that the assembler, which orders code between branches as it likes, cannot put the softmax after the wait
    # for the other products.
    done = stage
    stage, phase = next_slot(stage, phase, STAGES)
    mbarrier.wait(full.index(stage), phase)
    products, added = warpgroup_mma_wait(0, deps=(products, added))
    # Not before the wait: it would hold the products up, whose operand these registers are.
    p = _packed(bits)
    mbarrier.arrive(empty.index(done), count=1)
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, O))[:, None] + products
    total = total * gl.convert_layout(shrink, gl.SliceLayout(1, N))[:, None] + added
    return acc, p, total, exact, top, keep, stage, phase


@gluon.jit
def consume_eight(
    rings, bars, tensors, lists, scale, seq, total_tiles, tiles, num_blocks, text_before, visual_end,
    WHICH: gl.constexpr, HEADS: gl.constexpr, TEXT_BEFORE: gl.constexpr,
    D: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, HAS_MASK: gl.constexpr,
    HAS_TAIL: gl.constexpr, GATHER: gl.constexpr, RETURN_LSE: gl.constexpr, NUMERICS: gl.constexpr,
):  # fmt: skip
    """Attend the tiles of one program, 64 queries of each, in int8 (``NUMERICS`` 1) or fp8 (2)."""
    q_ring, k_ring, v_ring, ones_ring = rings
    q_full, q_empty, full, empty, _v_full, _v_empty, _turn = bars
    out_ptr, lse_ptr, gather_ptr, key_mask, bias_ptr, q_scale, k_scale, v_scale, v_mean = tensors
    work, col_idx, block_start = lists
    SUM: gl.constexpr = gl.int32 if NUMERICS == IN_INT8 else gl.float32
    OFFSET: gl.constexpr = _INTEGERS if NUMERICS == IN_INT8 else 0.0
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 32])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    N: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 32])
    P: gl.constexpr = gl.DotOperandLayout(0, O, 4)
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
            total = gl.zeros([64, 8], gl.float32, layout=N)
            exact = gl.zeros([64, 4], gl.float32, layout=sums_layout())
            top = gl.full([64], float("-inf"), gl.float32, layout=gl.SliceLayout(1, S))
            if (listed > 0) | (tail != TAIL_NONE):
                q = q_ring.index(WHICH).reshape([64, D])
                mbarrier.wait(q_full.index(0), used_q & 1)
                used_q += 1
                mask_row = key_mask + b.to(gl.int64) * seq if HAS_MASK else key_mask
                unit = factor * gl.load(q_scale + (b * HEADS + h) * num_blocks + i)
                # Blocks of summaries have scales too.
                more = (2 * num_blocks + BLOCK - 1) // BLOCK if HAS_TAIL else 0
                scales = k_scale + (b * HEADS + h) * (num_blocks + more)
                if listed > 0:
                    j = gl.load(col_idx + entry_of(0, first, plain, TEXT_BEFORE))
                    block_unit = unit * gl.load(scales + j)
                    mbarrier.wait(full.index(stage), phase)
                    logits = warpgroup_mma_wait(0, deps=(_logits(q, k_ring, stage, SUM, S),))
                    mbarrier.arrive(empty.index(stage), count=1)
                    stage, phase = next_slot(stage, phase, STAGES)
                    if NUMERICS == IN_INT8:
                        logits = _as_float(logits)
                    if plain == 0:
                        logits = checked(logits, j, start_row, mask_row, text_before, visual_end, HAS_MASK, S)
                    bits, exact, top, shrink = _softmax(logits, exact, top, block_unit, OFFSET, RETURN_LSE, S)
                    p = _packed(bits)
                    mbarrier.wait(full.index(stage), phase)
                    # First the plain blocks, in a loop of their own, then those to be checked.
                    for CHECKED in gl.static_range(2):
                        for e in range(gl.maximum(plain, 1) if CHECKED else 1, listed if CHECKED else plain):
                            acc, p, total, exact, top, shrink, stage, phase = _attend_block(
                                q, acc, p, total, exact, top, shrink, rings, bars, stage, phase, unit, scales, e, first,
                                plain, col_idx, start_row, mask_row, text_before, visual_end,
                                CHECKED, OFFSET, TEXT_BEFORE, D, BLOCK, STAGES, HAS_MASK, RETURN_LSE,
                            )  # fmt: skip
                    if not HAS_TAIL:
                        mbarrier.arrive(q_empty.index(0), count=1)
                    operand = gl.convert_layout(_unpacked(p), P, assert_trivial=True)
                    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, O))[:, None]
                    acc = warpgroup_mma(operand, _values(v_ring, stage), acc)
                    total = total * gl.convert_layout(shrink, gl.SliceLayout(1, N))[:, None]
                    total = warpgroup_mma(operand, ones_ring.permute((1, 0)), total)
                    mbarrier.arrive(empty.index(stage), count=1)
                    stage, phase = next_slot(stage, phase, STAGES)
                if HAS_TAIL:
                    if tail != TAIL_NONE:
                        columns = gl.arange(0, BLOCK, layout=gl.BlockedLayout([1], [32], [4], [0]))
                        count = gl.where(tail == TAIL_CENTROIDS, 2 * num_blocks, num_blocks)
                        bias_row = bias_ptr + (h * num_blocks + i).to(gl.int64) * (2 * num_blocks)
                        for n in range(0, count, BLOCK):
                            # Asked for here, long before it is needed, one for a thread.
                            bias = gl.load(bias_row + n + columns, mask=n + columns < count, other=float("-inf"))
                            block_unit = unit * gl.load(scales + num_blocks + n // BLOCK)
                            mbarrier.wait(full.index(stage), phase)
                            logits = warpgroup_mma_wait(0, deps=(_logits(q, k_ring, stage, SUM, S),))
                            if NUMERICS == IN_INT8:
                                logits = _as_float(logits) - _INTEGERS
                            bias = gl.convert_layout(bias.to(gl.float32), gl.SliceLayout(0, S))
                            logits = logits * block_unit + bias[None, :]
                            # What int8 logits had too much is off already.
                            bits, exact, top, keep = _softmax(logits, exact, top, 1.0, 0.0, RETURN_LSE, S)
                            operand = gl.convert_layout(_unpacked(_packed(bits)), P, assert_trivial=True)
                            acc = acc * gl.convert_layout(keep, gl.SliceLayout(1, O))[:, None]
                            acc = warpgroup_mma(operand, _values(v_ring, stage), acc)
                            total = total * gl.convert_layout(keep, gl.SliceLayout(1, N))[:, None]
                            total = warpgroup_mma(operand, ones_ring.permute((1, 0)), total)
                            mbarrier.arrive(empty.index(stage), count=1)
                            stage, phase = next_slot(stage, phase, STAGES)
                    mbarrier.arrive(q_empty.index(0), count=1)

            next_tile = tile_of(work, gl.minimum(t + gl.num_programs(0), total_tiles - 1), tiles, total_tiles, 0)
            # All columns are the same.
            total = gl.max(total, 1)
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
                    top, gl.sum(exact, 1), lse_ptr, row + WHICH * 64, end, b, h, order, gathered, gather_ptr, seq,
                    HEADS, GATHER, S,
                )  # fmt: skip
        else:
            next_tile = tile_of(work, gl.minimum(t + gl.num_programs(0), total_tiles - 1), tiles, total_tiles, 0)
        b, h, _local, i, order, row, end, first, listed, plain, tail, gathered = next_tile
