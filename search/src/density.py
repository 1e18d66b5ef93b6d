"""Densities of single heads without building the block lists of a layer."""

from __future__ import annotations

from diffsparse.entry import HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.online import OnlineRepair
from diffsparse.work import head_work

__all__ = ["call_density", "kept_density"]


def kept_density(entry: HeadEntry, grid: TokenGrid, block_size: int) -> float:
    """Share of all query-key pairs that a head computes exactly, text included; tails not counted."""
    kept = head_work(entry, grid, block_size).kept
    assert kept is not None
    return kept


def call_density(entry: HeadEntry, grid: TokenGrid, block_size: int, online: OnlineRepair | None = None) -> float:
    """What ``build_layout(grid, [entry], block_size).density`` is: kept pairs, tail, and an online repair's rows."""
    return head_work(entry, grid, block_size, online).density
