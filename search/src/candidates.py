"""The patterns that a search chooses from: resolution-free families on a few orders, beside measured bitmaps."""

from __future__ import annotations

from diffsparse.grid import TokenGrid
from diffsparse.order import AxisOrder, CurveOrder, RasterOrder, TileOrder, TokenOrder
from diffsparse.patterns import Band, Diagonals, Empty, GridStripes, Pattern, Radial, Sink, Window
from diffsparse.work import block_fill

__all__ = ["BITMAP_DENSITIES", "families", "flat_tile", "orders_for"]

# Kept shares of a head's block pairs that a bitmap may have; fine at the low end, where most heads end up.
BITMAP_DENSITIES = (0.0, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.16, 0.24, 0.35, 0.5, 0.7)


# An order whose blocks are less full than this is not tried: kernels pay for whole blocks.
LEAST_FILL = 0.8


# Tiles of a block's tokens, in one frame (the usual one first) and across frames.
_FLAT = {64: ((1, 8, 8), (1, 4, 16), (1, 16, 4)), 128: ((1, 8, 16), (1, 16, 8))}
_CUBE = {64: (4, 4, 4), 128: (2, 8, 8)}


def flat_tile(grid: TokenGrid, block_size: int) -> TileOrder:
    """The tile in one frame of which a grid's borders cut the least; of equals the usual one."""
    return max((TileOrder(*sides) for sides in _FLAT[block_size]), key=lambda tile: block_fill(tile, grid, block_size))


def orders_for(grid: TokenGrid, block_size: int) -> list[TokenOrder]:
    """Orders worth trying on a grid, the usual winner first; only those that fill their blocks, that one apart."""
    orders: list[TokenOrder] = [flat_tile(grid, block_size), RasterOrder()]
    if grid.frames > 1:
        orders += [TileOrder(*_CUBE[block_size]), AxisOrder("HWF")]
    orders.append(CurveOrder())
    return [orders[0], *(order for order in orders[1:] if block_fill(order, grid, block_size) >= LEAST_FILL)]


def families(grid: TokenGrid) -> list[Pattern]:
    """Resolution-free patterns of all families over a range of densities."""
    found: list[Pattern] = [Empty()]
    frame_extents: tuple[float | int | None, ...] = (1, 0.5, None) if grid.frames > 1 else (None,)
    for t in frame_extents:
        for space in (0.1, 0.2, 0.3, 0.5, 0.75):
            found.append(Window((t, space, space)))
        found += [Window((t, 0.15, None)), Window((t, None, 0.15))]
    if grid.frames > 1:
        found += [Window((1, None, None)), Sink(frames=1), Sink(frames=1) | Window((1, None, None))]
        found += [Radial(decay=decay) for decay in (0.05, 0.2, 0.6)]
        # The same site, seen one or two frames away: the multi-diagonals of a panning or moving picture.
        found.append(Diagonals(((0, 0, 0), (1, 0, 0), (2, 0, 0)), (0, 0.05, 0.05)))
        found.append(GridStripes("frame", key_phases=(0.125, 0.375, 0.625, 0.875)))
    else:  # rows instead of frames
        found += [Radial(decay=decay) for decay in (0.1, 0.3, 1.0)]
        found.append(Diagonals(((0, 0, 0), (0, 1, 0), (0, 2, 0)), (0, 0.05, 0.05)))
        found.append(GridStripes("row", key_phases=(0.125, 0.375, 0.625, 0.875)))
    found += [Band(0.02), Band(0.06), Band(0.15)]
    return found
