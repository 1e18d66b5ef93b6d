"""Densities of single heads without building the block lists of a layer."""

from __future__ import annotations

import numpy as np

from diffsparse.density import TAIL_COST
from diffsparse.entry import HeadEntry
from diffsparse.grid import TokenGrid

__all__ = ["call_density", "kept_density"]


def kept_density(entry: HeadEntry, grid: TokenGrid, block_size: int) -> float:
    """Share of all query-key pairs that a head computes exactly, text included; tails not counted."""
    if entry.execution.mode == "skip":
        return 0.0
    visual = grid.visual_only()
    length = entry.order.partition(visual, block_size).lengths.astype(np.float64)
    mask = entry.pattern.block_mask(grid, entry.order, block_size)
    inside = float(length @ mask @ length)
    # Text rows and columns are always exact.
    return (inside + float(grid.seq_len) ** 2 - float(grid.num_visual) ** 2) / float(grid.seq_len) ** 2


def call_density(entry: HeadEntry, grid: TokenGrid, block_size: int) -> float:
    """What ``build_layout(grid, [entry], block_size).density`` is: kept pairs and the tail."""
    kept = kept_density(entry, grid, block_size)
    if entry.execution.mode == "skip" or kept >= 1.0:
        return min(1.0, kept)
    text = sum(-(-n // block_size) for n in (grid.text_before, grid.text_after))
    rows = entry.order.partition(grid.visual_only(), block_size).num_blocks + text
    return min(1.0, kept + TAIL_COST[entry.execution.tail] * rows / grid.seq_len)
