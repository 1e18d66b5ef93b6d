"""What heads cost: kernels multiply whole blocks, however few tokens are in them."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from diffsparse.entry import TAILS, HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.kernels.costs import CostTable
from diffsparse.layout import build_layout
from diffsparse.order import AxisOrder, RasterOrder, TileOrder, TokenOrder
from diffsparse.patterns import Band, Pattern, Window
from diffsparse.search.cost import measure_costs
from diffsparse.search.density import kept_density
from diffsparse.search.observe import error_left
from diffsparse.work import HeadWork, block_fill, head_work

DENSITIES = (0.02, 0.1, 0.3, 0.6)


def proportional(full: float | None) -> CostTable:
    """Time is as the number of block pairs, on an order whose blocks were so full."""
    share = DENSITIES if full is None else tuple(d / full**2 for d in DENSITIES)
    return CostTable.of_call("cpu", 1.0, DENSITIES, {tail: share for tail in TAILS}, full)


def relative(costs: CostTable, density: float, tail: str, fill: float | None = None) -> float:
    """Time of a head over dense, by its kept pairs and by how full its blocks are."""
    head = HeadWork(density, density, tail, False, False, "auto", kept=density, visual=density, fill=fill)
    return costs.over_dense([head], 432)


@pytest.mark.parametrize("pattern", [Window((None, 0.3, 0.3)), Window((1, 0.5, 0.5)), Band(0.1)])
@pytest.mark.parametrize("order", [TileOrder(1, 8, 16), TileOrder(1, 16, 8), TileOrder(2, 8, 8), AxisOrder("HWF")])
@pytest.mark.parametrize("measured_on", [TileOrder(1, 8, 16), RasterOrder()])
def test_cost_is_that_of_the_blocks_multiplied(pattern: Pattern, order: TokenOrder, measured_on: TokenOrder) -> None:
    grid, block = TokenGrid(5, 30, 52), 128
    entry = HeadEntry(order, pattern)
    multiplied = len(build_layout(grid, [entry], block).index.col_idx) * block**2 / grid.seq_len**2
    costs = proportional(block_fill(measured_on, grid, block))
    found = costs.over_dense([head_work(entry, grid, block)], grid.seq_len)
    # A pattern may keep more of the short blocks than there are on average, or fewer: here by up to 18%.
    assert found == pytest.approx(multiplied, rel=0.2)
    if block_fill(order, grid, block) < 0.8:
        assert kept_density(entry, grid, block) < 0.8 * multiplied, "what the density alone says"


def test_a_plan_that_does_not_say_how_full_blocks_were() -> None:
    costs = CostTable.from_dict({k: v for k, v in proportional(0.8).to_dict().items() if k != "fill"})
    assert costs.fill is None
    assert relative(costs, 0.2, "none", 0.5) == relative(costs, 0.2, "none") == relative(costs, 0.2, "none", 1.0)
    same = proportional(0.8)
    assert CostTable.from_dict(same.to_dict()) == same
    assert relative(same, 0.2, "mean", 0.8) == relative(same, 0.2, "mean") < relative(same, 0.2, "mean", 0.7)
    assert relative(same, 0.6, "mean", 0.3) == 1.0, "never above dense"
    assert relative(same, 1.0, "none", 1.0) == 1.0, "what keeps all runs dense"


def test_what_is_measured_says_how_full_its_blocks_are() -> None:
    grid, order = TokenGrid(2, 9, 12), TileOrder(1, 8, 8)
    found = measure_costs(grid, 1, 16, order, 64, torch.device("cpu"), torch.float32, seconds=0.0)
    assert found.fill == block_fill(order, grid, 64) == pytest.approx(9 * 12 / (4 * 64))


def test_error_left_by_so_many_block_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    error = torch.rand(2, 3, 6, 6, generator=generator)
    for pairs in (0, 1, 7, 36, 50):
        left = error_left(error, pairs)
        assert left.shape == (2, 3)
        for t, h in product(range(2), range(3)):
            best = float(error[t, h].flatten().sort(descending=True).values[pairs:].sum())
            assert float(left[t, h]) == pytest.approx(best, abs=1e-5)
    # The same error spread over more blocks, for they are less full: as many pairs leave more of it.
    few, many = torch.full((1, 1, 10, 10), 1 / 100), torch.full((1, 1, 14, 14), 1 / 196)
    assert float(error_left(few, 8)) == pytest.approx(1 - 8 / 100)
    assert float(error_left(many, 8)) == pytest.approx(1 - 8 / 196)
