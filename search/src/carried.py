"""Scores and masks of one size, carried over to another one, as a plan's masks are (:mod:`diffsparse.carry`)."""

from __future__ import annotations

import torch

from diffsparse.carry import block_shares
from diffsparse.grid import TokenGrid
from diffsparse.order import TokenOrder
from diffsparse.search.candidates import BITMAP_DENSITIES
from diffsparse.search.options import FamilyTable

__all__ = ["Carry", "joined_values"]

# Shares are ranked in steps this fine, as a run does.
_STEPS = 1 << 12


class Carry:
    """From the blocks of one grid to those of another, both in one order.

    ``source``, ``target``: the tables of the grids, of blocks of the same size.
    """

    def __init__(self, source: FamilyTable, target: FamilyTable, device: torch.device | str = "cpu") -> None:
        grids: tuple[TokenGrid, TokenGrid, TokenOrder, int] = (
            source.grid, target.grid, source.order, source.block_size,
        )  # fmt: skip
        self.shares = torch.from_numpy(block_shares(*grids)).to(device)
        self.source_work, self.target_work = (
            torch.from_numpy(table.weight).to(device).float() for table in (source, target)
        )

    def values(self, value: torch.Tensor) -> torch.Tensor:
        """What pairs of blocks are worth, float ``[H, m, m]`` to ``[H, n, n]``: by the pairs of tokens they have."""
        return self.shares @ (value.float() / self.source_work) @ self.shares.T * self.target_work

    def levels(self, level: torch.Tensor) -> torch.Tensor:
        """Masks of all densities, as :func:`~diffsparse.search.masks.levels_of` has them: uint8 ``[H, n, n]``.

        A run carries each mask by itself. Here each one holds the sparser ones, as before, and has its density.
        """
        count = len(BITMAP_DENSITIES)
        blocks = len(self.target_work)
        found = torch.full((len(level), blocks, blocks), count, dtype=torch.uint8, device=level.device)
        work = self.target_work.double().reshape(-1)
        # Of pairs that score alike any may be kept: in the order of their index the first rows would get all.
        draw = torch.rand(blocks * blocks, generator=torch.Generator().manual_seed(0)).to(level.device) / (2 * _STEPS)
        for head in range(len(level)):
            for i in range(count):
                mask = level[head] <= i
                if not mask.any():
                    continue
                score = self.shares @ mask.float() @ self.shares.T
                before = found[head] < i
                ranked = ((score * _STEPS).floor() / _STEPS).reshape(-1) + draw + 2 * before.reshape(-1)
                order = ranked.argsort(stable=True, descending=True)
                wanted = float(self.source_work.double()[mask].sum())
                kept = torch.zeros(blocks * blocks, dtype=torch.bool, device=level.device)
                kept[order] = work[order].cumsum(0) <= wanted + 1e-7
                kept = kept.view(blocks, blocks)
                if mask.any(1).all():
                    kept[torch.arange(blocks, device=kept.device), score.argmax(1)] = True
                found[head][kept & ~before] = i
        return found


def joined_values(own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """What pairs of blocks are worth at two sizes together, ``[H, n, n]``, both on one grid: each size counts alike."""
    total, against = (x.sum((1, 2), keepdim=True) for x in (own, other))
    return own + other * torch.where(against > 0, total / against, 0.0)
