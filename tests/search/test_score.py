"""Block scores against the definition, written out with all queries of every block."""

import pytest
import torch

from diffsparse.entry import TAILS, Execution, HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.kernels import sparse_attention
from diffsparse.layout import build_layout, head_block_mask
from diffsparse.order import AxisOrder, RasterOrder, TileOrder
from diffsparse.patterns import Full
from diffsparse.search.score import BlockIndex, projection_roots, score_call
from tests.tolerance import ATTENTION, Work, assert_near, near

CPU = torch.device("cpu")


def inputs(grid, heads=2, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, grid.seq_len, heads, dim, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("order", [RasterOrder(), TileOrder(1, 8, 8), AxisOrder("HWF")])
@pytest.mark.parametrize("tail", TAILS)
def test_a_small_change_costs_what_the_score_says(order, tail):
    """Dropping one block changes the output by the score, to first order in the block's weight."""
    grid = TokenGrid(3, 9, 10, 3, 2)
    q, k, v = inputs(grid)
    index = BlockIndex.build(grid, order, 64, CPU)
    # Every query is sampled about as often as any other, so that the estimate is close to the sum.
    scores = score_call(q, k, v, index, samples=64, generator=torch.Generator().manual_seed(1))
    dense = sparse_attention(q, k, v, build_layout(grid, [HeadEntry(order)] * 2), backend="reference")
    entry = HeadEntry(order, Full(), execution=Execution(tail=tail))
    mask = head_block_mask(grid, entry, 64)
    first = -(-grid.text_before // 64)
    row, column = 0, len(index.length) - 1  # the last block is short: little weight
    mask[first + row, first + column] = False
    layout = build_layout(grid, [entry] * 2, masks=[mask] * 2)
    sparse = sparse_attention(q, k, v, layout, backend="reference")
    tokens = index.tokens[row][index.valid[row]]
    wanted = (sparse - dense)[0, tokens].square().sum((0, 2))
    found = scores.error[TAILS.index(tail), :, row, column]
    # Sampled, so far from exact; where a tail is, nothing is left but rounding.
    rounding = ATTENTION.tolerance(sparse, dense) ** 2 * dense[0, tokens].numel()
    assert torch.allclose(found, wanted, rtol=0.6, atol=rounding), (found, wanted)


def test_mass_and_energy():
    grid = TokenGrid(2, 8, 8)
    q, k, v = inputs(grid)
    index = BlockIndex.build(grid, TileOrder(1, 8, 8), 64, CPU)
    scores = score_call(q, k, v, index, samples=64)
    assert_near(scores.mass.sum(-1), torch.ones(2, 2), ATTENTION)
    out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    assert torch.allclose(scores.energy, out.square().sum((0, 2, 3)), rtol=0.1)


@pytest.mark.parametrize("padding", [0, 40])
def test_leaving_a_head_out_costs_the_output_of_text_too(padding):
    grid = TokenGrid(1, 8, 16, 5, 90)
    q, k, v = inputs(grid)
    q[:, grid.text_before + grid.num_visual :] *= 3  # text attends sharply: its outputs are larger
    index = BlockIndex.build(grid, RasterOrder(), 64, CPU)
    valid = torch.arange(grid.seq_len) < grid.seq_len - padding
    mask = valid if padding else None
    scores = score_call(q, k, v, index, samples=64, key_mask=mask)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[None])[
        :, :, valid
    ]
    assert torch.allclose(scores.energy, out.square().sum((0, 2, 3)), rtol=0.05)
    few = score_call(*inputs(grid), index, samples=8, generator=torch.Generator().manual_seed(2)).energy
    assert torch.allclose(few, score_call(*inputs(grid), index, samples=64).energy, rtol=0.2)


def test_tails_are_exact_where_a_block_is_constant():
    grid = TokenGrid(2, 8, 8)
    q, k, v = inputs(grid)
    for x in (k, v):
        x[:, 64:] = x[:, 64:65]
    index = BlockIndex.build(grid, TileOrder(1, 8, 8), 64, CPU)
    error = score_call(q, k, v, index).error
    none, *tails = error[:, :, :, 1]
    assert none.min() > 1e-3 and len(tails) == len(TAILS) - 1
    for tail in tails:
        assert tail.max() < 1e-6 * none.max()


def test_projection_roots_carry_the_norm():
    weight = torch.randn(24, 2 * 16)
    roots = projection_roots(weight, 2, 16, CPU)
    x = torch.randn(5, 2, 16)
    direct = torch.einsum("nhd,ohd->nho", x, weight.reshape(24, 2, 16)).norm(dim=-1)
    assert_near(torch.einsum("nhd,hde->nhe", x, roots).norm(dim=-1), direct, Work(length=24 * 16, sums=2))
    assert torch.equal(projection_roots(None, 2, 16, CPU)[0], torch.eye(16))


def test_masked_keys_have_no_weight_and_chunks_do_not_matter(monkeypatch):
    grid = TokenGrid(2, 9, 9, 0, 6)
    q, k, v = inputs(grid)
    index = BlockIndex.build(grid, TileOrder(1, 8, 8), 64, CPU)
    mask = torch.arange(grid.seq_len) < grid.seq_len - 4
    whole = score_call(q, k, v, index, key_mask=mask, generator=torch.Generator().manual_seed(3))
    k[:, -4:] = 50.0
    monkeypatch.setattr("diffsparse.search.score.CHUNK_BYTES", 1)
    again = score_call(q, k, v, index, key_mask=mask, generator=torch.Generator().manual_seed(3))
    assert_near(whole.error, again.error, ATTENTION)


def test_items_of_a_batch_count_alike_each_with_its_mask():
    """Scores of a batch are the mean of its items' own, from the same samples; which share them."""
    grid = TokenGrid(2, 9, 9, 0, 6)
    q, k, v = (torch.cat([a, b]) for a, b in zip(inputs(grid, seed=0), inputs(grid, seed=1), strict=True))
    index = BlockIndex.build(grid, TileOrder(1, 8, 8), 64, CPU)
    mask = torch.arange(grid.seq_len) < grid.seq_len - torch.tensor([[4], [0]])
    both = score_call(q, k, v, index, samples=8, key_mask=mask, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    each = [
        score_call(q[i : i + 1], k[i : i + 1], v[i : i + 1], index, samples=4, key_mask=mask[i], generator=generator)
        for i in range(2)
    ]
    for name in ("error", "mass", "energy", "summed", "true"):
        one, other = (getattr(scores, name) for scores in each)
        assert not near(one, other, ATTENTION)
        assert near(getattr(both, name), (one + other) / 2, ATTENTION), name
