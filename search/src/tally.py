"""What is kept of an attention call's scores: the error that each option of a head leaves.

Scores have a value for every pair of blocks, head, tail and call. That is far too much to keep for a large model, so a
call's scores are summed up where they are made: over the masks of all families, and over measured masks of several
densities. A measured mask is made of prompts before this one, so that what it leaves is what it leaves of a prompt that
it was not made from. The map that masks are made from is kept for one tail of each head, added up over calls
(:mod:`diffsparse.search.parts`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from diffsparse.search.candidates import BITMAP_DENSITIES
from diffsparse.search.options import FamilyTable
from diffsparse.search.scored import CallScores

__all__ = ["LayerSums", "pooled", "sum_up"]

#: Block pairs that are summed up together.
PIECE = 1024


def sum_up(
    scores: CallScores, table: FamilyTable, levels: Sequence[torch.Tensor | None] = (), side: int | None = None
) -> dict[str, torch.Tensor]:
    """Sums over a call's scores of ``H`` heads with the same order, on their device.

    ``levels``: of the measured masks, uint8 ``[H, NB, NB]`` each, :func:`~diffsparse.search.masks.levels_of` what they
    are made from; None where nothing is to be measured of one, whose sums are 0. ``side``: bins of the picture, where
    there is to be one.

    Returns fp32 arrays. ``left`` ``[H, tails, options]``: squared error with only an option's pairs computed.
    The options are all families, and each of ``levels`` at all densities.
    ``dropped`` ``[H, options]``: share of the attention weights that it does not compute. ``energy`` ``[H]``,
    ``summed``, ``true`` and ``repaired`` ``[H, tails, L]`` as :class:`CallScores` has them. ``pooled``
    ``[H, side, side]``.
    """
    tails, heads = scores.error.shape[:2]
    error = scores.error.reshape(tails, heads, -1)
    share = table.device_weight(error.device).sum(1).to(error.dtype)
    mass = (scores.mass * share[:, None]).reshape(heads, -1)
    families, densities = table.num_families, len(BITMAP_DENSITIES)
    options = families + len(levels) * densities
    left = torch.zeros(heads, tails, options, device=error.device)
    dropped = torch.zeros(heads, options, device=error.device)
    both = torch.cat([error, mass[None]])
    sums = _long_product(both.flatten(0, 1), table.dropped_pairs(error.device).float()).unflatten(0, (tails + 1, heads))
    left[:, :, table.places], dropped[:, table.places] = sums[:-1].transpose(0, 1), sums[-1]
    for scale, level in enumerate(levels):
        if level is None:
            continue
        flat = level.reshape(heads, -1)
        sums = torch.stack([(both * (flat > i)).sum(2) for i in range(densities)], 2)  # [tails + 1, H, densities]
        place = slice(families + scale * densities, families + (scale + 1) * densities)
        left[:, :, place], dropped[:, place] = sums[:-1].transpose(0, 1), sums[-1]
    found = {
        "left": left,
        "dropped": dropped.clamp(0, 1),
        "energy": scores.energy,
        "summed": scores.summed.transpose(0, 1),
        "true": scores.true.transpose(0, 1),
        "repaired": scores.repaired.transpose(0, 1),
    }
    return found if side is None else found | {"pooled": pooled(scores.mass, side)}


def _long_product(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """``rows [R, N] @ columns [N, C]`` for few rows and columns and a large N.

    In pieces of N: a GPU takes such a product as one long sum on few of its multiprocessors.
    """
    count = rows.shape[1] // PIECE
    whole = count * PIECE
    pieces = rows[:, :whole].unflatten(1, (count, PIECE)).transpose(0, 1) @ columns[:whole].unflatten(0, (count, PIECE))
    return pieces.sum(0) + rows[:, whole:] @ columns[whole:]


def pooled(mass: torch.Tensor, side: int) -> torch.Tensor:
    """Pool ``[H, NB, NB]`` to ``[H, side, side]``, keeping rows' sums: queries are averaged, keys are summed."""
    blocks = mass.shape[1]
    edges = np.linspace(0, blocks, side + 1).astype(int)
    bins = torch.zeros(blocks, side, device=mass.device, dtype=mass.dtype)
    bins[torch.arange(blocks), torch.from_numpy(np.searchsorted(edges, np.arange(blocks), side="right") - 1)] = 1.0
    return (bins / bins.sum(0)).T @ mass @ bins


@dataclass
class LayerSums:
    """Means over the calls of one step of a layer, each weighted by its items, on the host.

    ``arrays``: as :func:`sum_up` has them, for all heads.
    """

    heads: int
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    items: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.items = np.zeros(self.heads)

    def add(self, heads: Sequence[int], found: dict[str, torch.Tensor], items: int) -> None:
        """A call's sums of some of the heads."""
        which = list(heads)
        share = items / (self.items[which] + items)
        self.items[which] += items
        for name, tensor in found.items():
            new = tensor.float().cpu().numpy()
            known = self.arrays.setdefault(name, np.zeros((self.heads, *new.shape[1:]), np.float32))
            known[which] += share.reshape(-1, *[1] * (new.ndim - 1)).astype(np.float32) * (new - known[which])
