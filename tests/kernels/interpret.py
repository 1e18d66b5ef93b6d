"""Run in a process of its own with TRITON_INTERPRET=1: the Triton kernels on the CPU against the oracle."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from itertools import pairwise

import torch

from diffsparse.grid import TokenGrid
from diffsparse.kernels import reference_attention
from diffsparse.kernels.backends.triton.host import Config, launch
from diffsparse.kernels.call import AttentionCall, make_call
from diffsparse.layout import BlockLayout
from diffsparse.order import AxisOrder, TileOrder
from tests.kernels.apart import case, finish
from tests.kernels.cases import MIXED, head, inputs, random_layout
from tests.tolerance import ATTENTION, Work, assert_near

#: (grid, entries, block size, head_dim, tiles, valid text or None)
FAST = [
    (TokenGrid(1, 9, 15, text_before=5, text_after=20), [head(), head(TileOrder(1, 8, 8), "moments")], 64, 24,
     Config(64, 32, 16, 4, 1, True), 7),
    (TokenGrid(1, 8, 16), [head(tail="mean"), head(tail="centroids"), head(mode="skip")], 64, 32,
     Config(64, 64, 32, 4, 1, True), None),
]  # fmt: skip
SLOW = [
    (TokenGrid(2, 11, 13, text_after=70), list(MIXED), 64, 72, Config(32, 32, 32, 4, 1, False), 3),
    (TokenGrid(3, 9, 16), list(MIXED), 128, 64, Config(128, 64, 32, 4, 1, True), None),
    (TokenGrid(1, 16, 17, text_before=64), [head(AxisOrder("WHF"), "mean")], 128, 88,
     Config(64, 128, 16, 4, 1, True), None),
]  # fmt: skip


def check_work_list(call: AttentionCall, layout: BlockLayout, group: int) -> None:
    """Every tile once, group by group, longest first, with what the layout says of it."""
    from diffsparse.kernels.backends.gluon_sm90.prepare import work_list

    n, block, grid = layout.num_blocks, layout.block_size, layout.grid
    heads = layout.num_heads
    work = work_list(call, group).view(heads, n, 8)
    assert work_list(call, group).data_ptr() == work.data_ptr()
    row, end, first, listed, plain, mode, head_of, block_of = work.long().unbind(2)
    assert bool((head_of == head_of[:, :1]).all()), "heads stay together"
    assert torch.equal((head_of * n + block_of).flatten().sort().values, torch.arange(heads * n))
    assert bool((listed.diff(dim=1) <= 0).all()), "longest first"
    for start in range(0, heads, group):
        assert sorted(head_of[start : start + group, 0].tolist()) == list(range(start, min(start + group, heads)))
        assert bool((listed[start : start + group].sum(1).diff() <= 0).all()), "longest first"
    for h, i, *found in zip(*(x.flatten().tolist() for x in (head_of, block_of, row, end, first, listed, plain, mode))):
        skipped, tail, _, gathered = layout.heads.table[h].tolist()
        order = int(layout.tokens.head_order[h])
        borders = layout.tokens.block_start[order, i : i + 2].tolist()
        at, stop = layout.index.row_ptr[0, h * n + i : h * n + i + 2].tolist()
        assert found[:3] == [*borders, at]
        assert found[3] == (0 if skipped else stop - at)
        assert found[5] == (0 if skipped else tail) + 4 * gathered + 16 * order + 65536 * (h % group)
        # Two blocks of text before the video, one after it; what is plain is full and of the video.
        blocks = layout.index.col_idx[at:stop].long()
        start, length = layout.tokens.block_start[order][blocks], layout.tokens.block_start[order].diff()[blocks]
        visual = (start >= grid.text_before) & (start < grid.text_before + grid.num_visual)
        full = visual & (length == block)
        assert found[4] == (0 if skipped else int(full.sum()))
        assert bool(full[2 : 2 + found[4]].all())
        if stop > at:
            assert visual.tolist() == [False] * 2 + [True] * (stop - at - 3) + [False]


def check_preparations() -> None:
    """What the Hopper kernel is given beside q, k and v, against plain torch."""
    from diffsparse.kernels.backends.gluon_sm90.prepare import head_kinds, reorder, tail_bias
    from diffsparse.kernels.backends.triton.prepare import summaries

    grid, block = TokenGrid(2, 9, 15, text_before=70, text_after=20), 64
    entries = [
        head(tail="moments"),
        *(head(TileOrder(1, 8, 8), tail) for tail in ("moments", "centroids", "mean", "none")),
        head(mode="skip"),
    ]
    layout = random_layout(grid, entries, block, 0.4)
    q, k, v = inputs(grid, len(entries), 24, batch=2)
    # Far from zero, and near each other.
    call = make_call(q, 1e-2 * k + 30, v, layout)
    whole = summaries(call)
    for first, heads in ((0, len(entries)), (1, 3)):
        copies = [torch.zeros(2, len(entries), grid.seq_len, 24) for _ in range(3)]
        parts = summaries(call, head_kinds(call))
        for part in parts:  # what was left unwritten
            part[:, [1, 3, 4, 5]] = torch.nan
        reorder(call, copies, first, heads, parts)
        for copy, x in zip(copies, (call.q, call.k, call.v)):
            for h in range(max(first, 1), min(first + heads, 5)):
                want = x[:, layout.tokens.gather[int(layout.tokens.head_order[h])].long(), h]
                assert torch.equal(copy[:, h - first], want)
            assert not copy[:, heads:].any()
        for part, one in zip(parts, whole):
            assert torch.equal(part[:, [0, 1, 3]], one[:, [0, 1, 3]])
            assert part[:, [4, 5]].isnan().all()
        for part, one in zip(parts[:2], whole):
            assert torch.equal(part[:, 2], one[:, 2])

    for h in (0, 1, 3):
        start = layout.tokens.block_start[int(layout.tokens.head_order[h])].tolist()
        token = layout.tokens.gather[int(layout.tokens.head_order[h])].long()
        for i, (begin, end) in enumerate(pairwise(start)):
            if begin < end:
                for x, mean in zip((call.k, call.v), whole):
                    want = x[:, token[begin:end], h].double().mean(1)
                    # A mean may be far smaller than what is summed up for it.
                    most = Work(length=block).tolerance(mean, x)
                    torch.testing.assert_close(mean[:, h, 0, i].double(), want, rtol=0, atol=most)
                want = call.k[:, token[begin:end], h].double().var(1, unbiased=False)
                # Of differences to a mean that is itself off: what remains is the square of that.
                most = Work(length=block).tolerance(whole[2], want) + Work(length=block).tolerance(mean, call.k) ** 2
                torch.testing.assert_close(whole[2][:, h, i].double(), want, rtol=0, atol=most)

    n = layout.num_blocks
    bias = tail_bias(call).view(len(entries), n, 2, n)
    for h, halves in ((1, 1), (2, 2), (3, 1)):
        start = layout.tokens.block_start[int(layout.tokens.head_order[h])]
        length = start.diff()
        first = length // 2 if halves == 2 else length
        for part, count in enumerate((first, length - first)[:halves]):
            want = count.float().log2().expand(n, n).clone()  # -inf where a block has no tokens
            text = (start[:-1] < grid.text_before) | (start[:-1] >= grid.text_before + grid.num_visual)
            want[:, text] = -torch.inf
            want[layout.mask(h)] = -torch.inf
            assert_near(bias[h, :, part].float(), want, Work(length=1, dtype=bias.dtype))

    for group in (len(entries), 3):
        check_work_list(call, layout, group)


def check_sample() -> None:
    """Of heads that have wide logits every tile is marked, item by item, and of the others none."""
    from diffsparse.kernels.backends.gluon_sm90.prepare import work_list
    from diffsparse.kernels.backends.gluon_sm90.wide import SAMPLE, WIDE, mark_wide_heads

    for grid, dim, heads, block in ((TokenGrid(2, 9, 15, text_after=20), 24, 4, 64), (TokenGrid(1, 5, 9), 64, 3, 128)):
        layout = random_layout(grid, [head()] * heads, block, 0.3)
        q, k, v = inputs(grid, heads, dim, batch=2)
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
        q[1, :, 0] *= 20
        k[0, :, heads - 1] *= 20
        call = make_call(q, k, v, layout)
        token = torch.arange(SAMPLE) * grid.seq_len // SAMPLE
        logits = torch.einsum("bihd,bjhd->bhij", call.q[:, token], call.k[:, token]) * call.scale / math.log(2)
        wide = logits.abs().amax((2, 3)) > WIDE
        assert wide.tolist() == [[h == (heads - 1, 0)[b] for h in range(heads)] for b in range(2)]
        n = call.num_blocks
        for group in (heads, 2):
            for first in range(0, heads, group):
                ours = work_list(call, group)[first * n : (first + group) * n]
                total = 2 * len(ours)
                marked = torch.zeros(1 + 2 * total, dtype=torch.int32)
                mark_wide_heads(call, ours, marked, len(ours))
                want = wide[:, ours[:, 6].long()].flatten()  # of tiles, item by item
                assert int(marked[0]) == int(want.sum())
                assert torch.equal(marked[1 : 1 + marked[0]].sort().values.long(), want.nonzero().flatten())
                assert torch.equal(marked[1 + total :].bool(), want)


def check_unpacking() -> None:
    """Lists made from bits, against those that the layout was built with."""
    from diffsparse.kernels.backends.gluon_sm90.prepare import work_list
    from diffsparse.kernels.backends.triton.unpack import unpack_lists

    entries = [head(), head(TileOrder(1, 8, 8)), head(mode="skip"), head(AxisOrder("WHF"))]
    for grid, density, width in (
        (TokenGrid(2, 9, 15, text_before=70, text_after=20), 0.4, 4),
        (TokenGrid(2, 9, 15, text_after=20), 0.6, 1024),
        (TokenGrid(1, 8, 8), 0.0, 1024),
    ):
        layout, packed = (random_layout(grid, entries, 64, density, packed=p) for p in (False, True))
        call = make_call(*inputs(grid, len(entries), 16), layout)
        made = unpack_lists(packed.index, packed.tokens, width)
        assert torch.equal(made[: len(layout.index.col_idx)], layout.index.col_idx)
        index = replace(call.index, row_ptr=call.index.row_ptr.clone(), col_idx=made)
        room = replace(call, index=index, packed=packed.index)
        assert torch.equal(work_list(room, 3), work_list(call, 3))
    try:
        unpack_lists(replace(packed.index, num_blocks=1 << 16), packed.tokens)
    except ValueError as error:
        assert "up to 65,535 blocks a head, got 65,536" in str(error)
    else:
        raise AssertionError("more blocks than 16 bits count")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--slow", action="store_true")
    slow = parser.parse_args().slow
    for grid, entries, block, dim, config, text in SLOW if slow else FAST:
        torch.manual_seed(0)
        for density in (0.0, 0.4):
            with case(grid, block, dim, density):
                layout = random_layout(grid, entries, block, density)
                q, k, v = inputs(grid, len(entries), dim)
                kv_len = None if text is None else torch.tensor([grid.seq_len - grid.text_after + text])
                call = make_call(q, k, v, layout, kv_len=kv_len, return_lse=True)
                out, lse = launch(call, config)
                want, want_lse = reference_attention(q, k, v, layout, kv_len=kv_len)
                assert_near(out.double(), want, ATTENTION)
                assert_near(lse.double(), want_lse, ATTENTION)
    for check in () if slow else (check_preparations, check_unpacking, check_sample):
        with case(check.__name__):
            check()


if __name__ == "__main__":
    main()
    finish()
