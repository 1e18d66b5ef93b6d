"""Keys that every query sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from diffsparse.messages import shown
from diffsparse.order import BlockPartition
from diffsparse.patterns.base import Pattern
from diffsparse.patterns.boxes import block_any, is_fraction, is_whole

__all__ = ["Columns", "Sink"]


@dataclass(frozen=True)
class Columns(Pattern):
    """Vertical stripes: keys inside any of ``boxes`` are seen by every query.

    A box is ``(f0, f1, h0, h1, w0, w1)`` in fractions of the axes, upper ends exclusive.
    """

    boxes: tuple[tuple[float, float, float, float, float, float], ...]
    kind: ClassVar[str] = "columns"

    def __post_init__(self) -> None:
        if not isinstance(self.boxes, tuple):
            raise ValueError(f"columns' boxes are a tuple of (f0, f1, h0, h1, w0, w1); got {shown(self.boxes)}")
        for box in self.boxes:
            six = isinstance(box, tuple) and len(box) == 6 and all(is_fraction(v) for v in box)
            if not six or any(not box[2 * a] < box[2 * a + 1] for a in range(3)):
                raise ValueError(f"a column box is six fractions f0<f1, h0<h1, w0<w1 in [0, 1]; got {shown(box)}")

    def pairs(self, queries: BlockPartition, keys: BlockPartition) -> np.ndarray:
        hit = np.zeros(len(keys.boxes), bool)
        for box in self.boxes:
            inside = np.ones(len(keys.boxes), bool)
            for axis, n in enumerate(keys.grid.shape):
                # Rounded to 1e-9 so that k/n, written as a decimal fraction, lands on k again.
                low, high = np.floor(round(box[2 * axis] * n, 9)), np.ceil(round(box[2 * axis + 1] * n, 9)) - 1
                inside &= (keys.boxes[:, 2 * axis + 1] >= low) & (keys.boxes[:, 2 * axis] <= high)
            hit |= inside
        blocks = np.zeros(keys.num_blocks, bool)
        np.logical_or.at(blocks, keys.owner, hit)
        return np.broadcast_to(blocks, (queries.num_blocks, keys.num_blocks)).copy()

    def __str__(self) -> str:
        return f"columns({len(self.boxes)})"


@dataclass(frozen=True)
class Sink(Pattern):
    """Attention sink: the first ``frames`` frames, or the first ``tokens`` visual tokens, are keys of every query."""

    frames: int = 0
    tokens: int = 0
    kind: ClassVar[str] = "sink"

    def __post_init__(self) -> None:
        given = (self.frames, self.tokens)
        if not all(is_whole(v) for v in given) or (self.frames > 0) == (self.tokens > 0):
            raise ValueError(f"a sink is frames > 0 or tokens > 0, one of the two, in integers; got {shown(given)}")

    def pairs(self, queries: BlockPartition, keys: BlockPartition) -> np.ndarray:
        n = self.tokens or self.frames * keys.grid.tokens_per_frame
        hit = block_any(np.arange(keys.grid.num_visual) < n, keys)
        return np.broadcast_to(hit, (queries.num_blocks, keys.num_blocks)).copy()

    def __str__(self) -> str:
        return f"sink({self.frames} frames)" if self.frames else f"sink({self.tokens} tokens)"


PATTERNS = (Columns, Sink)
