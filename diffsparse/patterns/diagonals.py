"""Diagonals: in latent space, and of the ordered sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from diffsparse.limits import MAX_INTEGER
from diffsparse.messages import shown
from diffsparse.order import BlockPartition
from diffsparse.patterns.base import Pattern, same
from diffsparse.patterns.boxes import Extent, check_extents, is_fraction, is_whole, separable_pairs

__all__ = ["Band", "Diagonals"]


@dataclass(frozen=True)
class Diagonals(Pattern):
    """Multi-diagonals in latent space: keys whose offset from the query lies near one of ``offsets``.

    ``offsets``: ``(f, h, w)`` vectors in latent units, taken with both signs. ``half_width``: latent units per axis, a
    float as a fraction of the axis, None for no bound.
    """

    offsets: tuple[tuple[int, int, int], ...] = ((0, 0, 0),)
    half_width: tuple[Extent, Extent, Extent] = (0, 0, 0)
    kind: ClassVar[str] = "diagonals"

    def __post_init__(self) -> None:
        if not isinstance(self.offsets, tuple):
            raise ValueError(f"diagonals' offsets are a tuple of (f, h, w); got {shown(self.offsets)}")
        for offset in self.offsets:
            if not isinstance(offset, tuple) or len(offset) != 3 or not all(is_whole(v, -MAX_INTEGER) for v in offset):
                raise ValueError(f"an offset of diagonals is three integers (f, h, w); got {shown(offset)}")
        check_extents("diagonals' half_width", self.half_width, 0)

    def pairs(self, queries: BlockPartition, keys: BlockPartition) -> np.ndarray:
        result = same(False, queries, keys)
        shape = queries.grid.shape
        widths = [
            n if e is None else (round(e * n) if isinstance(e, float) else e)
            for n, e in zip(shape, self.half_width, strict=True)
        ]
        signed = {tuple(s * v for v in offset) for offset in self.offsets for s in (1, -1)}
        for offset in sorted(signed):
            axes = [
                np.abs(np.arange(n)[None] - np.arange(n)[:, None] - shift) <= width
                for n, shift, width in zip(shape, offset, widths, strict=True)
            ]
            result |= separable_pairs(axes, queries, keys)
        return result

    def __str__(self) -> str:
        return f"diagonals({len(self.offsets)})"


@dataclass(frozen=True)
class Band(Pattern):
    """A band around the diagonal of the ordered sequence: positions at most ``half_width`` of all visual tokens apart.

    Together with an axis order this is the multi-diagonal mask of Sparse-VideoGen and Sparse-vDiT (arXiv 2506.03065).
    """

    half_width: float
    kind: ClassVar[str] = "band"

    def __post_init__(self) -> None:
        if not is_fraction(self.half_width):
            raise ValueError(f"a band's half_width is a fraction in [0, 1], got {shown(self.half_width)}")

    def pairs(self, queries: BlockPartition, keys: BlockPartition) -> np.ndarray:
        reach = self.half_width * queries.grid.num_visual
        q0, q1 = queries.start[:-1, None], queries.start[1:, None] - 1
        k0, k1 = keys.start[None, :-1], keys.start[None, 1:] - 1
        return np.maximum(np.maximum(k0 - q1, q0 - k1), 0) <= reach

    def __str__(self) -> str:
        return f"band({self.half_width:g})"


PATTERNS = (Diagonals, Band)
