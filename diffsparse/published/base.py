"""What published methods have in common: how one is told, and the orders that they are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from diffsparse.entry import Execution, HeadEntry
from diffsparse.order import TileOrder, TokenOrder
from diffsparse.patterns import Full
from diffsparse.selection import OnlineSelection

__all__ = ["Published", "picked", "tiles"]


@dataclass(frozen=True)
class Published:
    """One method. ``entry``: what every head runs, from the method's options and the size of blocks. ``block_size`` and
    ``sparse_below``: the method's own. ``line``: what it does, and where it is from. ``repair_rows``: exact rows of an
    online repair, where the method has one."""

    line: str
    entry: Callable[..., HeadEntry]
    block_size: int
    sparse_below: float
    repair_rows: int | None = None


def tiles(block_size: int) -> TokenOrder:
    """Tiles of one frame that fill a block: 8 x 8, or 8 x 16."""
    return TileOrder(1, 8, 8) if block_size == 64 else TileOrder(1, 8, 16)


def picked(order: TokenOrder, rule: OnlineSelection, tail: str) -> HeadEntry:
    """A head whose rule picks among all blocks."""
    return HeadEntry(order, Full(), rule, Execution(tail=tail))
