"""How much work one head's call is, from its entry alone: no block lists are built."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from diffsparse.density import tail_density
from diffsparse.entry import HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.online import OnlineRepair
from diffsparse.order import TokenOrder

__all__ = ["HeadWork", "block_fill", "head_work"]


@dataclass(frozen=True)
class HeadWork:
    """What decides on a head's time and on its density.

    density: executed work over all query-key pairs, with the tail and the exact rows of an online repair. extra: the
    time that an online repair takes, over a dense head's. blocks: kept blocks over all pairs of blocks, which is what
    kernels multiply, short ones as a whole. gathered: the head's order is not the model's. Of these None where only a
    layout is known: kept: pairs computed exactly, over all. visual: the same of visual tokens alone. fill: how full the
    blocks of its order are (:func:`block_fill`). varies: a rule picks its blocks, and how many depends on q and k; the
    figures are the most that there may be.
    """

    density: float
    blocks: float
    tail: str
    gathered: bool
    skipped: bool
    numerics: str
    kept: float | None = None
    visual: float | None = None
    fill: float | None = None
    extra: float = 0.0
    varies: bool = False


@lru_cache(maxsize=256)
def block_fill(order: TokenOrder, grid: TokenGrid, block_size: int) -> float:
    """Visual tokens of a grid over what the blocks of an order have room for; 1 where all are full."""
    return grid.num_visual / (order.partition(grid, block_size).num_blocks * block_size)


def head_work(entry: HeadEntry, grid: TokenGrid, block_size: int, online: OnlineRepair | None = None) -> HeadWork:
    """Of one head on a grid, as ``build_layout(grid, [entry], block_size)`` has it, or that layout ``repaired``."""
    work = _unrepaired(entry, grid, block_size)
    if online is None:
        return work
    return replace(work, density=min(1.0, work.density + online.density(grid)), extra=online.time(grid))


def _unrepaired(entry: HeadEntry, grid: TokenGrid, block_size: int) -> HeadWork:
    execution, gathered = entry.execution, not entry.order.is_raster
    if execution.mode == "skip":
        return HeadWork(0.0, 0.0, execution.tail, gathered, True, execution.numerics, kept=0.0, visual=0.0)
    lengths = entry.order.partition(grid.visual_only(), block_size).lengths.astype(np.float64)
    mask = entry.pattern.block_mask(grid, entry.order, block_size)
    online = entry.online
    if online is not None:
        mask = online.budget.fullest(mask, lengths)
    tokens, visual, inside = float(grid.seq_len), float(grid.num_visual), len(lengths)
    blocks = inside + sum(-(-n // block_size) for n in (grid.text_before, grid.text_after))
    # Text rows and columns are always exact.
    pairs = float(lengths @ mask @ lengths)
    kept = (pairs + tokens**2 - visual**2) / tokens**2
    share = (int(np.count_nonzero(mask)) + blocks**2 - inside**2) / blocks**2
    tail = 0.0 if mask.all() else tail_density(execution.tail, blocks, grid.seq_len)
    return HeadWork(
        density=min(1.0, kept + tail),
        blocks=share,
        tail=execution.tail,
        gathered=gathered,
        skipped=False,
        numerics=execution.numerics,
        kept=kept,
        visual=pairs / visual**2,
        fill=block_fill(entry.order, grid, block_size),
        varies=online is not None and not online.budget.is_fixed,
    )
