"""Layouts drawn at random, for timing: what a kernel takes depends on how much is kept, hardly on what."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from diffsparse.entry import HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.layout import BlockLayout, build_layout
from diffsparse.order import TokenOrder

__all__ = ["random_rows"]


def random_rows(
    grid: TokenGrid, entries: Sequence[HeadEntry], block_size: int, density: float, *, shared: bool = False
) -> BlockLayout:
    """A layout in which every row of every head keeps the same number of blocks, drawn at random (seeded).

    ``shared``: all heads of an order keep the same blocks. Text rows and columns are kept on top.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    text = sum(-(-n // block_size) for n in (grid.text_before, grid.text_after))
    drawn: dict[TokenOrder, np.ndarray] = {}
    masks = []
    for entry in entries:
        n = text + len(entry.order.starts(grid.visual_only(), block_size)) - 1
        if shared and entry.order in drawn:
            masks.append(drawn[entry.order])
            continue
        count = max(1, round(density * n))
        mask = torch.zeros(n, n, dtype=torch.bool)
        mask.scatter_(1, torch.rand(n, n, generator=generator).topk(count, dim=1).indices, True)
        masks.append(drawn.setdefault(entry.order, mask.numpy()) if shared else mask.numpy())
    return build_layout(grid, entries, block_size, masks=masks)
