"""Sums of scores: what they say of an option is what the scores themselves say of its mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffsparse.entry import TAILS
from diffsparse.grid import TokenGrid
from diffsparse.order import AxisOrder, RasterOrder, TileOrder
from diffsparse.search.candidates import BITMAP_DENSITIES
from diffsparse.search.masks import levels_of, mask_at
from diffsparse.search.options import FamilyTable
from diffsparse.search.scored import LADDER, CallScores
from diffsparse.search.tally import LayerSums, pooled, sum_up
from tests.tolerance import Work, assert_near

GRIDS = [TokenGrid(3, 12, 20), TokenGrid(1, 31, 17), TokenGrid(5, 7, 9)]

#: A sum over the pairs of blocks of a head, less a sum over some of them.
SUMS = Work(length=2000, sums=2, dtype=torch.float32)
#: What shares of the work that add up to 1 may be off.
ROUNDING = 2 * float(np.finfo(np.float32).eps)


def scores_of(heads: int, blocks: int, seed: int = 0) -> CallScores:
    draw = torch.Generator().manual_seed(seed)
    mass = torch.rand(heads, blocks, blocks, generator=draw)
    return CallScores(
        error=torch.rand(len(TAILS), heads, blocks, blocks, generator=draw).pow(8),
        mass=mass / mass.sum(2, keepdim=True),
        energy=torch.rand(heads, generator=draw),
        summed=torch.rand(len(TAILS), heads, len(LADDER), generator=draw),
        true=torch.rand(len(TAILS), heads, len(LADDER), generator=draw),
        repaired=torch.rand(len(TAILS), heads, len(LADDER), generator=draw),
    )


@pytest.mark.parametrize("order", [RasterOrder(), TileOrder(1, 8, 8), AxisOrder("HWF")], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_sums_are_those_of_every_options_mask(grid: TokenGrid, order: RasterOrder) -> None:
    table = FamilyTable(grid, order, 64)
    blocks, heads = len(table.weight), 3
    scores, value = scores_of(heads, blocks), scores_of(heads, blocks, 1).error[0]
    levels = levels_of(value, torch.from_numpy(table.weight))
    found = sum_up(scores, table, [torch.full_like(levels, 255), levels], 2)
    measured = table.num_families + len(BITMAP_DENSITIES)
    share = table.weight.sum(1)
    for head in range(heads):
        masks = dict(zip(table.places, table.masks, strict=True))
        for i, density in enumerate(BITMAP_DENSITIES):
            masks[measured + i] = mask_at(value[head].numpy(), table.weight, density)
        for place, mask in masks.items():
            left = (scores.error[:, head].double().numpy() * ~mask).sum((1, 2))
            assert_near(found["left"][head, :, place].double(), torch.from_numpy(left), SUMS)
            dropped = share @ (scores.mass[head].double().numpy() * ~mask).sum(1)
            assert_near(found["dropped"][head, place].double(), torch.tensor(dropped), SUMS)
        assert torch.equal(found["summed"][head], scores.summed[:, head])
        assert torch.equal(found["true"][head], scores.true[:, head])
        assert torch.equal(found["repaired"][head], scores.repaired[:, head])
    assert torch.equal(found["energy"], scores.energy)
    # Masks that compute nothing leave everything.
    nothing = found["left"][:, :, table.num_families : measured]
    assert_near(nothing, found["left"][:, :, :1].expand_as(nothing), SUMS)
    assert sum_up(scores, table)["left"].shape[2] == table.num_families


@settings(max_examples=40, deadline=None)
@given(blocks=st.integers(1, 24), heads=st.integers(1, 3), seed=st.integers(0, 99), equal=st.booleans())
def test_every_mask_takes_the_best_pairs_that_fit(blocks: int, heads: int, seed: int, equal: bool) -> None:
    draw = np.random.default_rng(seed)
    lengths = np.ones(blocks) if equal else draw.integers(1, 64, blocks).astype(float)
    weight = np.outer(lengths, lengths) / lengths.sum() ** 2
    value = draw.random((heads, blocks, blocks)).round(1).astype(np.float32)  # many are equal
    levels = levels_of(torch.from_numpy(value), torch.from_numpy(weight)).numpy()
    for head in range(heads):
        ratio = value[head] / weight.astype(np.float32)
        for i, density in enumerate(BITMAP_DENSITIES):
            mask = levels[head] <= i
            assert np.array_equal(mask, mask_at(value[head], weight, density))
            assert weight[mask].sum() <= density + ROUNDING
            if mask.any() and not mask.all():
                assert ratio[mask].min() >= ratio[~mask].max()
                # The best of what is left out does not fit any more.
                best = (ratio == ratio[~mask].max()) & ~mask
                assert weight[mask].sum() + weight[best].max() > density - ROUNDING


def test_a_picture_keeps_the_sums_of_rows() -> None:
    mass = scores_of(2, 23).mass
    for side in (1, 5, 23):
        found = pooled(mass, side)
        assert found.shape == (2, side, side)
        assert_near(found.sum(2), torch.ones(2, side), SUMS)
    assert_near(pooled(mass, 23), mass, SUMS)


def test_calls_count_by_their_items() -> None:
    sums = LayerSums(3)
    one, two = torch.tensor([[1.0], [2.0]]), torch.tensor([[4.0], [8.0]])
    sums.add([2, 0], {"left": one}, 1)
    sums.add([2, 0], {"left": two}, 2)
    sums.add([1], {"left": torch.tensor([[5.0]])}, 2)
    assert sums.arrays["left"][:, 0].tolist() == pytest.approx([6.0, 5.0, 3.0])
