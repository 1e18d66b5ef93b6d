"""Block scores against the definition, written out with all queries of every block."""

import pytest
import torch

from diffsparse.entry import TAILS, Execution, HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.kernels import sparse_attention
from diffsparse.layout import build_layout, head_block_mask
from diffsparse.order import AxisOrder, RasterOrder, TileOrder
from diffsparse.patterns import Full
from diffsparse.search import score_plain, score_rows
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
    monkeypatch.setattr("diffsparse.search.score_plain.CHUNK_BYTES", 1)
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
    for name in ("error", "mass", "energy", "summed", "true", "repaired"):
        one, other = (getattr(scores, name) for scores in each)
        assert not near(one, other, ATTENTION)
        assert near(getattr(both, name), (one + other) / 2, ATTENTION), name


# -- by kernels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("grid", "order", "samples"),
    [
        (TokenGrid(3, 9, 10, 3, 2), TileOrder(1, 8, 8), 3),
        (TokenGrid(3, 8, 8), RasterOrder(), 64),
        (TokenGrid(5, 7, 9, 0, 70), AxisOrder("HWF"), 1),
    ],
)
def test_scores_of_many_heads_at_once_are_those_of_one_after_another(grid, order, samples, masked, monkeypatch):
    """What kernels add up on a GPU is what torch adds up: same samples, same arrays; in groups of heads, too."""
    heads, dim = 3, 16
    q, k, v = inputs(grid, heads, dim)
    weight = 1e-3 * torch.randn(40, heads * dim, generator=torch.Generator().manual_seed(3))
    mask = None
    if masked and grid.text_after:
        mask = torch.arange(grid.seq_len) < grid.seq_len - 1
    found = []
    for way in (score_plain, score_rows):
        monkeypatch.setattr(score_plain, "add_item", way.add_item)
        monkeypatch.setattr(score_rows, "CHUNK_BYTES", 1)
        monkeypatch.setattr(score_rows, "_LADDER_ROWS", 10**6)
        scores = score_call(
            q,
            k,
            v,
            BlockIndex.build(grid, order, 64, CPU),
            roots=projection_roots(weight, heads, dim, CPU),
            samples=samples,
            generator=torch.Generator().manual_seed(1),
            key_mask=mask,
            heads=[2, 0],
        )
        found.append(scores)
    for name in ("error", "mass", "energy", "summed", "true", "repaired"):
        want, got = (getattr(scores, name) for scores in found)
        assert want.abs().max() > 0
        assert_near(got, want, Work(length=grid.seq_len, sums=8))


def test_true_errors_of_large_calls_are_measured_on_a_part(monkeypatch):
    """A ratio, which some query blocks tell as well as all; whatever is added up over all queries is exact."""
    grid = TokenGrid(4, 16, 16)
    q, k, v = inputs(grid)
    scores = []
    for rows in (10**6, 24):
        monkeypatch.setattr(score_rows, "_LADDER_ROWS", rows)
        monkeypatch.setattr(score_plain, "add_item", score_rows.add_item)
        index = BlockIndex.build(grid, TileOrder(1, 8, 8), 64, CPU)
        scores.append(score_call(q, k, v, index, samples=8, generator=torch.Generator().manual_seed(1)))
    every, some = scores
    assert torch.equal(every.error, some.error) and torch.equal(every.energy, some.energy)
    ratio = (some.true / some.summed) / (every.true / every.summed)
    assert torch.allclose(ratio, torch.ones_like(ratio), rtol=0.25), ratio
