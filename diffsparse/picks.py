"""Which heads of a layer have their blocks picked at denoising time, by which rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from diffsparse.entry import HeadEntry
from diffsparse.selection import OnlineSelection
from diffsparse.tokens import HeadSelection

__all__ = ["PickGroup", "Picks", "picks_of"]


@dataclass(frozen=True, eq=False)
class PickGroup:
    """Heads of a layer with one selection, one ``reuse`` and one tail.

    numbers: of the heads. places: the same, int64 ``[n]``, on the device of the layout.
    """

    selection: OnlineSelection
    reuse: float
    tail: str
    numbers: tuple[int, ...]
    places: torch.Tensor


@dataclass(frozen=True, eq=False)
class Picks:
    """The heads whose blocks are picked from q and k.

    shares: of every head of the layer, the most pairs of blocks that it keeps, over all pairs, text included; None of a
        head whose lists are final.
    varies: of every head, whether what it keeps depends on q and k.
    """

    groups: tuple[PickGroup, ...]
    shares: tuple[float | None, ...]
    varies: tuple[bool, ...]

    def to(self, device: torch.device | str) -> Picks:
        """The same with its tensors on ``device``."""
        return replace(self, groups=tuple(replace(g, places=g.places.to(device)) for g in self.groups))

    def heads(self, selection: HeadSelection) -> Picks | None:
        """Those of some heads, counted anew; None where none of them is picked for."""
        numbers = range(len(self.shares))[selection] if isinstance(selection, slice) else list(selection)
        groups = []
        for group in self.groups:
            mine = tuple(i for i, h in enumerate(numbers) if h in group.numbers)
            if mine:
                places = torch.tensor(mine, device=group.places.device)
                groups.append(replace(group, numbers=mine, places=places))
        if not groups:
            return None
        return Picks(tuple(groups), tuple(self.shares[h] for h in numbers), tuple(self.varies[h] for h in numbers))


def picks_of(entries: Sequence[HeadEntry], shares: Sequence[float | None]) -> Picks | None:
    """The heads of a layer that have an online selection; None where none has. ``shares``: as in :class:`Picks`."""
    found: dict[tuple[OnlineSelection, float, str], list[int]] = {}
    for h, entry in enumerate(entries):
        if entry.online is not None:
            found.setdefault((entry.online, entry.execution.reuse, entry.execution.tail), []).append(h)
    if not found:
        return None
    return Picks(
        groups=tuple(PickGroup(*key, tuple(n), torch.tensor(n)) for key, n in found.items()),
        shares=tuple(shares),
        varies=tuple(e.online is not None and not e.online.budget.is_fixed for e in entries),
    )
