"""Orders that a search tries."""

from __future__ import annotations

import numpy as np
import pytest

from diffsparse.grid import TokenGrid
from diffsparse.order import AxisOrder, CurveOrder, RasterOrder, TileOrder
from diffsparse.search.candidates import LEAST_FILL, flat_tile, orders_for
from diffsparse.work import block_fill


@pytest.mark.parametrize(
    ("grid", "block_size", "sides"),
    [
        ((5, 32, 32), 64, (1, 8, 8)),  # all divide it: the usual one
        ((21, 45, 80), 128, (1, 8, 16)),
        ((21, 30, 52), 128, (1, 16, 8)),
        ((21, 30, 52), 64, (1, 16, 4)),
    ],
)
def test_the_tile_that_borders_cut_least(grid: tuple[int, int, int], block_size: int, sides: tuple[int, ...]) -> None:
    found = flat_tile(TokenGrid(*grid), block_size)
    assert found == TileOrder(*sides) and np.prod(sides) == block_size
    tiles = np.prod(-(-np.array(grid) // np.array(sides)))
    assert block_fill(found, TokenGrid(*grid), block_size) == pytest.approx(np.prod(grid) / (tiles * block_size))


def test_orders_that_leave_blocks_empty_are_not_tried() -> None:
    assert orders_for(TokenGrid(5, 32, 32), 64) == [TileOrder(1, 8, 8), RasterOrder(), AxisOrder("HWF"), CurveOrder()]
    assert block_fill(TileOrder(4, 4, 4), TokenGrid(5, 32, 32), 64) < LEAST_FILL
    assert orders_for(TokenGrid(1, 64, 64), 64) == [TileOrder(1, 8, 8), RasterOrder(), CurveOrder()]
