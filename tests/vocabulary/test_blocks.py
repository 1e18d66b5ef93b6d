"""Block indices: made from masks, cut to heads, turned round; lists and bits hold the same."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffsparse.blocks import BlockIndex, pack_bits, unpack_bits
from diffsparse.entry import HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.layout import build_layout
from diffsparse.order import AxisOrder, RasterOrder, TileOrder
from diffsparse.tokens import TokenLayout, cut_tokens
from tests.vocabulary.strategies import orders, text_grids

some_orders = st.lists(orders, min_size=1, max_size=4)


def random_mask(batch: int, tokens: TokenLayout, seed: int) -> torch.Tensor:
    shape = (batch, tokens.num_heads, tokens.num_blocks, tokens.num_blocks)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4


def allowed(mask: torch.Tensor, tokens: TokenLayout) -> torch.Tensor:
    """What an index made from a mask is to hold, pair by pair: text always, blocks that are not there never."""
    wanted = mask.clone()
    for h, o in enumerate(tokens.head_order.tolist()):
        start = tokens.block_start[o].tolist()
        first, end = tokens.text_before, tokens.text_before + tokens.num_visual
        real = [a < b for a, b in zip(start, start[1:])]
        text = [not first <= a < end for a in start[:-1]]
        for i in range(tokens.num_blocks):
            for j in range(tokens.num_blocks):
                if text[i] or text[j]:
                    wanted[:, h, i, j] = True
                if not (real[i] and real[j]):
                    wanted[:, h, i, j] = False
    return wanted


@given(text_grids, some_orders, st.sampled_from([64, 128]), st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_an_index_holds_its_mask(grid, head_orders, block_size, batch, seed):
    tokens, _ = cut_tokens(grid, head_orders, block_size)
    mask = random_mask(batch, tokens, seed)
    wanted = allowed(mask, tokens)
    index = BlockIndex.from_mask(mask, tokens)
    lists = index.unpacked(tokens)
    assert (index.batch, index.num_heads, index.num_blocks) == (batch, len(head_orders), tokens.num_blocks)
    assert index.is_packed and not lists.is_packed
    for one in (index, lists):
        assert torch.equal(one.mask(), wanted)
        assert one.row_ptr.dtype == torch.int32
    assert lists.col_idx.numel() == int(wanted.sum())
    for b in range(batch):
        assert torch.equal(lists.item(b).mask()[0], wanted[b])
        assert torch.equal(index.item(b).unpacked(tokens).mask()[0], wanted[b])


@given(text_grids, some_orders, st.integers(1, 2), st.integers(0, 99), st.data())
@settings(max_examples=40, deadline=None)
def test_some_heads_of_an_index_are_those_heads(grid, head_orders, batch, seed, data):
    tokens, _ = cut_tokens(grid, head_orders)
    wanted = allowed(random_mask(batch, tokens, seed), tokens)
    index = BlockIndex.from_mask(wanted, tokens)
    first = data.draw(st.integers(0, len(head_orders) - 1))
    end = data.draw(st.integers(first + 1, len(head_orders)))
    picked = data.draw(st.lists(st.integers(0, len(head_orders) - 1), min_size=1, max_size=3))
    for one in (index, index.unpacked(tokens)):
        for selection in (slice(first, end), slice(None, None, 2), slice(None, None, -1), picked):
            cut = tokens.heads(selection)
            numbers = range(len(head_orders))[selection] if isinstance(selection, slice) else selection
            part = one.heads(selection)
            assert torch.equal(part.mask(), wanted[:, list(numbers)])
            assert torch.equal(part.unpacked(cut).mask(), wanted[:, list(numbers)])
            assert torch.equal(part.item(batch - 1).mask()[0], wanted[batch - 1, list(numbers)])


def test_a_run_of_heads_shares_the_lists_memory():
    tokens, _ = cut_tokens(TokenGrid(3, 16, 16), [RasterOrder()] * 4)
    index = BlockIndex.from_mask(random_mask(1, tokens, 0), tokens)
    for one in (index, index.unpacked(tokens)):
        part = one.heads(slice(1, 3))
        assert part.col_idx.untyped_storage().data_ptr() == one.col_idx.untyped_storage().data_ptr()


@given(text_grids, some_orders, st.integers(1, 2), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_transposed_index_is_the_keys_view(grid, head_orders, batch, seed):
    tokens, _ = cut_tokens(grid, head_orders)
    wanted = allowed(random_mask(batch, tokens, seed), tokens)
    index = BlockIndex.from_mask(wanted, tokens)
    for one in (index, index.unpacked(tokens)):
        assert torch.equal(one.transposed().mask(), wanted.transpose(2, 3))
        again = one.transposed().transposed().unpacked(tokens)
        assert torch.equal(again.col_idx, index.unpacked(tokens).col_idx)
        assert torch.equal(again.row_ptr, index.unpacked(tokens).row_ptr)


def test_heads_that_are_left_out_keep_nothing():
    tokens, _ = cut_tokens(TokenGrid(2, 8, 8, 5), [RasterOrder()] * 3)
    index = BlockIndex.from_mask(random_mask(2, tokens, 1), tokens)
    rest = index.without(torch.tensor([False, True, False]))
    assert not rest.mask()[:, 1].any()
    assert torch.equal(rest.mask()[:, [0, 2]], index.mask()[:, [0, 2]])


def test_what_lies_beyond_the_lists_is_not_read():
    tokens, _ = cut_tokens(TokenGrid(3, 16, 16), [RasterOrder(), TileOrder(1, 8, 8)])
    lists = BlockIndex.from_mask(random_mask(1, tokens, 3), tokens).unpacked(tokens)
    longer = BlockIndex(lists.row_ptr, torch.cat([lists.col_idx, torch.full((50,), 1 << 30)]).int(), lists.num_blocks)
    assert torch.equal(longer.mask(), lists.mask())
    assert torch.equal(longer.heads([1, 0]).mask(), lists.mask()[:, [1, 0]])


@given(st.integers(1, 40), st.integers(0, 9))
def test_bits_hold_what_was_packed(length, seed):
    mask = torch.rand(3, length, generator=torch.Generator().manual_seed(seed)) < 0.5
    bits = pack_bits(mask)
    assert bits.dtype == torch.uint8 and bits.shape == (3, -(-length // 8))
    assert torch.equal(unpack_bits(bits, length), mask)


def test_a_mask_that_does_not_fit_is_refused():
    tokens, _ = cut_tokens(TokenGrid(3, 16, 16), [RasterOrder()] * 2)
    n = tokens.num_blocks
    with pytest.raises(ValueError, match=r"here with 2 heads and N = 12; got bool \[3, 12, 12\]"):
        BlockIndex.from_mask(torch.ones(3, n, n, dtype=torch.bool), tokens)
    with pytest.raises(ValueError, match="got float32"):
        BlockIndex.from_mask(torch.ones(2, n, n), tokens)
    with pytest.raises(ValueError, match="on meta, the token layout on cpu"):
        BlockIndex.from_mask(torch.ones(2, n, n, dtype=torch.bool, device="meta"), tokens)
    with pytest.raises(ValueError, match="at least one head"):
        BlockIndex.from_mask(torch.ones(2, n, n, dtype=torch.bool), tokens).heads(slice(1, 1))


def test_a_layouts_heads_are_cut_in_all_its_parts():
    heads = [HeadEntry(AxisOrder("HWF")), HeadEntry(), HeadEntry(TileOrder(1, 8, 8))]
    layout = build_layout(TokenGrid(2, 9, 9, 3), heads)
    part = layout.of_heads(slice(1, 3))
    assert part.num_heads == part.heads.num_heads == part.index.num_heads == 2
    assert part.densities == layout.densities[1:]
    for h in range(2):
        assert torch.equal(part.mask(h), layout.mask(h + 1))
        assert torch.equal(part.token_mask(h), layout.token_mask(h + 1))
    assert torch.equal(layout.of_heads([2, 0]).token_mask(1), layout.token_mask(0))
