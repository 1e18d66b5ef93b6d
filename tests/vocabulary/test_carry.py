"""Block masks carried over from the grid they were measured on to another."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffsparse.carry import best_pairs, carry_mask
from diffsparse.grid import TokenGrid
from diffsparse.order import AxisOrder, CurveOrder, PhaseOrder, RasterOrder, TileOrder, TokenOrder
from diffsparse.patterns import Window

ORDERS = (RasterOrder(), AxisOrder("HWF"), TileOrder(1, 4, 4), TileOrder(1, 8, 8), PhaseOrder("frame"), CurveOrder())
grids = st.builds(TokenGrid, st.integers(1, 5), st.integers(1, 13), st.integers(1, 13))


def density(mask: np.ndarray, grid: TokenGrid, order: TokenOrder, size: int) -> float:
    lengths = order.partition(grid, size).lengths.astype(float)
    return float(lengths @ mask @ lengths / lengths.sum() ** 2)


def plain_shares(source: TokenGrid, target: TokenGrid, order: TokenOrder, size: int) -> np.ndarray:
    """Share of each target block in each source block, from many points of the clip."""
    old, new = order.partition(source, size), order.partition(target, size)
    found = np.zeros((new.num_blocks, old.num_blocks))
    at: list[np.ndarray] = []
    for partition in (new, old):
        block = np.empty(partition.grid.num_visual, int)
        block[partition.permutation] = np.repeat(np.arange(partition.num_blocks), partition.lengths)
        at.append(block.reshape(partition.grid.shape))
    # Points in the middle of parts that no edge of either grid cuts.
    fine = [n * m for n, m in zip(source.shape, target.shape, strict=True)]
    for point in np.ndindex(*fine):
        a = tuple(i // m for i, m in zip(point, source.shape, strict=True))
        b = tuple(i // n for i, n in zip(point, target.shape, strict=True))
        found[at[0][a], at[1][b]] += 1
    return found / found.sum(1, keepdims=True)


@given(source=grids, target=grids, order=st.sampled_from(ORDERS), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_density_is_kept(source: TokenGrid, target: TokenGrid, order: TokenOrder, share: float, seed: int) -> None:
    size = 16
    n = order.num_blocks(source, size)
    mask = np.random.default_rng(seed).random((n, n)) < share
    carried = carry_mask(mask, source, target, order, size)
    m = order.num_blocks(target, size)
    assert carried.shape == (m, m) and carried.dtype == bool
    wanted, found = density(mask, source, order, size), density(carried, target, order, size)
    lengths = order.partition(target, size).lengths.astype(float)
    total = lengths.sum() ** 2
    # Short of it by less than the pair that no longer fits, above it by one pair a row.
    assert found > wanted - lengths.max() ** 2 / total - 1e-9
    assert found <= wanted + lengths.max() * lengths.sum() / total + 1e-9
    if mask.any(1).all():
        assert carried.any(1).all()
    if source == target:
        assert density(carried & ~mask, target, order, size) == 0


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_the_pairs_with_the_largest_shares_are_kept(order: TokenOrder) -> None:
    """Against shares that are counted point by point."""
    source, target, size = TokenGrid(2, 5, 6), TokenGrid(3, 4, 7), 8
    n = order.num_blocks(source, size)
    mask = np.random.default_rng(1).random((n, n)) < 0.4
    carried = carry_mask(mask, source, target, order, size)
    shares = plain_shares(source, target, order, size)
    score = shares @ mask @ shares.T
    best = score == score.max(1, keepdims=True)
    assert score[~carried].max() <= score[carried & ~best].min() + 1e-3


@pytest.mark.parametrize("target", [(3, 40, 24), (5, 24, 40), (9, 32, 32), (2, 17, 29), (1, 32, 32)], ids=str)
def test_a_shape_keeps_its_shape(target: tuple[int, int, int]) -> None:
    """A window that is a share of the clip, carried over, is nearly that window on the other grid."""
    order, window = TileOrder(1, 8, 8), Window(size=(None, 0.4, 0.4))
    source, other = TokenGrid(5, 32, 32), TokenGrid(*target)
    mask, wanted = window.block_mask(source, order, 64), window.block_mask(other, order, 64)
    carried = carry_mask(mask, source, other, order, 64)
    both, either = (carried & wanted).sum(), (carried | wanted).sum()
    chance = mask.mean() / (2 - mask.mean())
    assert both / either > 0.5 + 0.5 * chance, f"{both / either:.2f} of the pairs agree, {chance:.2f} by chance"
    assert carried.diagonal().mean() > 0.9


def test_blocks_of_another_size() -> None:
    order, grid = TileOrder(1, 8, 8), TokenGrid(2, 32, 32)
    mask = Window(size=(1, None, 0.5)).block_mask(grid, order, 64)
    carried = carry_mask(mask, grid, grid, order, 64, 128)
    n = order.num_blocks(grid, 128)
    assert carried.shape == (n, n)
    assert density(carried, grid, order, 128) == pytest.approx(density(mask, grid, order, 64), abs=2 / n)


def test_ties_are_spread_over_all_rows() -> None:
    """Pairs that score alike are taken from everywhere: by their index, the first rows would get them all."""
    score, lengths = np.full((64, 64), 0.5, np.float32), np.full(64, 16.0)
    score[:, 0] = 1
    kept = best_pairs(score, lengths, 0.25 * lengths.sum() ** 2)
    rows = kept.sum(1)
    assert kept[:, 0].all() and kept.mean() == pytest.approx(0.25, abs=1 / 64**2)
    assert abs(rows - 16).max() < 5 * 16**0.5, rows


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(3, 3\), tile\(1,8,8\) cuts 1x16x16 into 4 blocks"):
        carry_mask(np.eye(3, dtype=bool), TokenGrid(1, 16, 16), TokenGrid(1, 8, 8), TileOrder(1, 8, 8), 64)
