"""Windows around each query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from diffsparse.grid import TokenGrid
from diffsparse.order import BlockPartition
from diffsparse.patterns.base import Pattern
from diffsparse.patterns.boxes import Extent, check_axes, check_extents, resolve_extent, separable_pairs

__all__ = ["Window", "axis_neighbourhood"]


def axis_neighbourhood(n: int, window: int, stride: int = 1, dilation: int = 1) -> np.ndarray:
    """Generalised neighbourhood attention along one axis: bool ``[n, n]`` (query, key).

    Queries of one stride group share their leader's window, which is shifted inwards at borders, so that every query
    has the same number of keys. With a dilation the rule holds inside each residue class. GNA (arXiv 2504.16922), 3.1.
    """
    allowed = np.zeros((n, n), bool)
    for residue in range(min(dilation, n)):
        members = np.arange(residue, n, dilation)
        m = len(members)
        w = min(window, m)
        left, right = w // 2, w // 2 + w % 2 - 1
        q = np.arange(m)
        leader = np.minimum(q // stride * stride + stride // 2, m - 1)
        centre = np.clip(leader, left, m - 1 - right)
        inside = (q[None] >= (centre - left)[:, None]) & (q[None] <= (centre + right)[:, None])
        allowed[np.ix_(members, members)] = inside
    return allowed


@dataclass(frozen=True)
class Window(Pattern):
    """Generalised neighbourhood attention: a window per axis, clamped at borders (GNA, arXiv 2504.16922, 3.1).

    ``size`` per axis ``(t, h, w)``: an integer in latent units, a float as a fraction of the axis, or None for all of
    it; more than the axis means all of it. ``stride``: queries in groups of so many share one window. ``dilation``: a
    query sees keys that many apart.
    """

    size: tuple[Extent, Extent, Extent]
    stride: tuple[int, int, int] = (1, 1, 1)
    dilation: tuple[int, int, int] = (1, 1, 1)
    kind: ClassVar[str] = "window"

    def __post_init__(self) -> None:
        check_extents("a window's size", self.size, 1)
        check_axes("a window's stride", self.stride, 1)
        check_axes("a window's dilation", self.dilation, 1)

    def axis_masks(self, grid: TokenGrid) -> list[np.ndarray]:
        """Per axis, which keys each query sees: three bool ``[n, n]``."""
        return [
            axis_neighbourhood(n, resolve_extent(size, n), stride, dilation)
            for n, size, stride, dilation in zip(grid.shape, self.size, self.stride, self.dilation, strict=True)
        ]

    def pairs(self, queries: BlockPartition, keys: BlockPartition) -> np.ndarray:
        return separable_pairs(self.axis_masks(queries.grid), queries, keys)

    def __str__(self) -> str:
        text = "x".join("all" if v is None else f"{v:g}" for v in self.size)
        if self.stride != (1, 1, 1):
            text += "/" + "x".join(map(str, self.stride))
        if self.dilation != (1, 1, 1):
            text += "*" + "x".join(map(str, self.dilation))
        return f"window({text})"


PATTERNS = (Window,)
