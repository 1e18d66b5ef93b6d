import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffsparse.entry import Execution, HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.layout import build_layout, head_block_mask
from diffsparse.order import AxisOrder, RasterOrder, TileOrder
from diffsparse.patterns import Empty, Full, Sink, Window
from tests.vocabulary.strategies import orders, text_grids

patterns = st.sampled_from([Full(), Empty(), Window((1, 0.4, 0.4)), Sink(1) | Window((None, 3, 2))])
entries = st.builds(
    HeadEntry,
    orders,
    patterns,
    st.just("static"),
    st.builds(Execution, st.sampled_from(["exact", "skip"]), st.sampled_from(["none", "moments"])),
)


@given(text_grids, st.lists(entries, min_size=1, max_size=4), st.sampled_from([64, 128]))
@settings(max_examples=80, deadline=None)
def test_layouts_hold_exactly_the_masks(grid, heads, block_size):
    layout = build_layout(grid, heads, block_size)
    n, text = layout.num_blocks, -(-grid.text_before // block_size)
    assert layout.index.row_ptr.shape == (1, len(heads) * n + 1)
    assert layout.index.col_idx.dtype == layout.tokens.gather.dtype == torch.int32
    assert 0 <= layout.density <= 1
    for h, entry in enumerate(heads):
        o = int(layout.tokens.head_order[h])
        assert torch.equal(
            layout.tokens.gather[o][layout.tokens.scatter[o].long()], torch.arange(grid.seq_len, dtype=torch.int32)
        )
        start = layout.tokens.block_start[o]
        assert int(start[0]) == 0
        assert int(start[-1]) == grid.seq_len
        assert int(start.diff().max()) <= block_size
        # Text keeps its place, and no block holds both text and video.
        assert int(start[text]) == grid.text_before
        kept = layout.mask(h).numpy()
        if entry.execution.mode == "skip":
            assert not kept.any()
            continue
        mask = head_block_mask(grid, entry, block_size)
        assert np.array_equal(kept[: len(mask), : len(mask)], mask)
        assert not kept[len(mask) :].any()
        assert not kept[:, len(mask) :].any()
        tokens = layout.token_mask(h)
        for part in (slice(0, grid.text_before), slice(grid.text_before + grid.num_visual, grid.seq_len)):
            assert tokens[part].all()
            assert tokens[:, part].all()


@given(text_grids, st.lists(entries, min_size=1, max_size=4), st.sampled_from([64, 128]))
@settings(max_examples=40, deadline=None)
def test_packed_layouts_hold_the_same(grid, heads, block_size):
    layout, packed = (build_layout(grid, heads, block_size, packed=p) for p in (False, True))
    assert packed.is_packed and not layout.is_packed
    assert packed.index.col_idx.nbytes == len(heads) * layout.num_blocks * -(-layout.num_blocks // 8)
    assert torch.equal(packed.unpacked().index.col_idx, layout.index.col_idx)
    assert packed.unpacked().index.col_idx.dtype == torch.int32
    assert torch.equal(packed.index.row_ptr, layout.index.row_ptr)
    assert packed.densities == layout.densities
    for h in range(len(heads)):
        assert torch.equal(packed.mask(h), layout.mask(h))


def test_density_counts_tokens_and_not_blocks():
    grid = TokenGrid(1, 9, 8)  # two tiles, of 64 and 8 tokens
    mask = np.array([[True, False], [False, True]])
    layout = build_layout(grid, [HeadEntry(TileOrder(1, 8, 8))], masks=[mask])
    assert layout.density == pytest.approx((64**2 + 8**2) / 72**2)


def test_orders_are_shared_between_heads():
    heads = [HeadEntry(AxisOrder("HWF")), HeadEntry(), HeadEntry(AxisOrder("HWF"))]
    layout = build_layout(TokenGrid(2, 9, 9), heads)
    assert layout.tokens.gather.shape[0] == 2
    assert layout.tokens.head_order.tolist() == [0, 1, 0]
    assert layout.tokens.needs_gather
    assert not build_layout(TokenGrid(2, 9, 9), [HeadEntry(RasterOrder())]).tokens.needs_gather


def test_bad_layouts_are_refused():
    with pytest.raises(ValueError, match="at least one head"):
        build_layout(TokenGrid(1, 8, 8), [])
    with pytest.raises(ValueError, match="block_size"):
        build_layout(TokenGrid(1, 8, 8), [HeadEntry()], 32)
    with pytest.raises(ValueError, match="has 2 blocks"):
        build_layout(TokenGrid(2, 8, 8), [HeadEntry()], masks=[np.ones((3, 3), bool)])


def kind(block, start, grid, block_size):
    """Of a block: 0 text before the video, 1 full, 2 short, 3 text after it."""
    if start[block] < grid.text_before:
        return 0
    if start[block] >= grid.text_before + grid.num_visual:
        return 3
    return 1 if start[block + 1] - start[block] == block_size else 2


@given(text_grids, st.lists(entries, min_size=1, max_size=4), st.sampled_from([64, 128]))
@settings(max_examples=60, deadline=None)
def test_lists_have_text_then_full_blocks_then_short_ones_then_text(grid, heads, block_size):
    layout = build_layout(grid, heads, block_size)
    ends = layout.index.row_ptr[0].tolist()
    for row, (first, end) in enumerate(zip(ends, ends[1:])):
        start = layout.tokens.block_start[int(layout.tokens.head_order[row // layout.num_blocks])].tolist()
        places = [(kind(j, start, grid, block_size), j) for j in layout.index.col_idx[first:end].tolist()]
        assert places == sorted(places)
