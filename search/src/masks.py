"""Masks of measured blocks: the best pairs of blocks by what they are worth per unit of work, at several densities."""

from __future__ import annotations

import numpy as np
import torch

from diffsparse.search.candidates import BITMAP_DENSITIES

__all__ = ["levels_of", "mask_at"]

#: Pairs that are sorted at once.
_SORTED = 2**24


def levels_of(value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The sparsest mask that computes each pair, by its place in ``BITMAP_DENSITIES``, or their number.

    value: ``[H, NB, NB]``, what a pair is worth. weight: ``[NB, NB]``, its share of the work. Returns uint8
    ``[H, NB, NB]``. The mask of a density has the pairs of the most value per work that fit into it; of equals the
    first.
    """
    heads, blocks, _ = value.shape
    densities = torch.tensor(BITMAP_DENSITIES, dtype=torch.float64, device=value.device)
    flat, work = value.reshape(heads, -1).float(), weight.reshape(-1).double()
    found = torch.empty(heads, blocks * blocks, dtype=torch.uint8, device=value.device)
    count = max(1, _SORTED // (blocks * blocks))
    for first in range(0, heads, count):
        part = slice(first, first + count)
        order = (flat[part] / work.float()).argsort(stable=True, dim=1, descending=True)
        used = work[order].cumsum(1)
        # Sums of many shares end a little above or below 1.
        level = torch.bucketize(used - 1e-9, densities).to(torch.uint8)
        found[part].scatter_(1, order, level)
    return found.view(heads, blocks, blocks)


def mask_at(value: np.ndarray, weight: np.ndarray, density: float) -> np.ndarray:
    """The best mask of at most ``density``: bool ``[NB, NB]`` for ``value`` and ``weight`` of that shape.

    The pairs of the most value per work, of equals the first, as long as they fit.
    """
    ratio, work = np.divide(value, weight.astype(np.float32)).reshape(-1), weight.reshape(-1)
    # To sort all pairs takes most of the time, and what fits whatever its work is needs no order.
    sure = min(int(density / work.max()), ratio.size)
    mask = ratio > np.partition(ratio, ratio.size - sure)[ratio.size - sure] if sure else np.zeros(ratio.size, bool)
    used, share = float(work[mask].sum()), float(work.sum()) / ratio.size
    wanted = sure
    while True:
        wanted += 64 + int(1.5 * max(density - used, 0.0) / share)
        if wanted < ratio.size:
            rest = np.flatnonzero((ratio >= np.partition(ratio, -wanted)[-wanted]) & ~mask)
        else:
            rest = np.flatnonzero(~mask)
        rest = rest[np.argsort(-ratio[rest], kind="stable")]
        total = used + np.cumsum(work[rest])
        count = int(np.searchsorted(total - 1e-9, density, side="right"))
        if count < len(rest) or wanted >= ratio.size:
            mask[rest[:count]] = True
            return mask.reshape(value.shape)
