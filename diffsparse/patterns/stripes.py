"""Stripes of one phase of a stride."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from diffsparse.grid import TokenGrid
from diffsparse.messages import shown
from diffsparse.order import BlockPartition, stride_tokens
from diffsparse.patterns.base import Pattern
from diffsparse.patterns.boxes import block_any, is_fraction, is_whole

__all__ = ["GridStripes"]


@dataclass(frozen=True)
class GridStripes(Pattern):
    """The grid head of MMInference (arXiv 2504.16083, Algorithm 1).

    Tokens of one phase of a stride see all tokens, or are seen by all.

    Keeps (q, k) where ``k mod stride`` is a key phase or ``q mod stride`` is a query phase, in row-major token indices.
    ``stride`` as in :class:`PhaseOrder`; phases are fractions of the stride in ``[0, 1)``.
    """

    stride: int | str = "frame"
    key_phases: tuple[float, ...] = ()
    query_phases: tuple[float, ...] = ()
    kind: ClassVar[str] = "grid"

    def __post_init__(self) -> None:
        if not (self.stride in ("frame", "row") or is_whole(self.stride, 1)):
            raise ValueError(f"a grid's stride is 'frame', 'row' or an integer of at least 1; got {shown(self.stride)}")
        for phases in (self.key_phases, self.query_phases):
            if not isinstance(phases, tuple) or not all(is_fraction(phase) and phase < 1 for phase in phases):
                raise ValueError(f"a grid's phases are a tuple of fractions in [0, 1); got {shown(phases)}")

    def phase_tokens(self, phases: tuple[float, ...], grid: TokenGrid) -> np.ndarray:
        """Which tokens (row-major) lie on the given phases: bool ``[num_visual]``."""
        stride = stride_tokens(self.stride, grid)
        sites = [int(round(phase * stride, 9)) for phase in phases]
        return np.isin(np.arange(grid.num_visual) % stride, sites)

    def pairs(self, queries: BlockPartition, keys: BlockPartition) -> np.ndarray:
        rows = block_any(self.phase_tokens(self.query_phases, queries.grid), queries)
        columns = block_any(self.phase_tokens(self.key_phases, keys.grid), keys)
        return rows[:, None] | columns[None]

    def __str__(self) -> str:
        return f"grid({self.stride}, {len(self.query_phases)}q, {len(self.key_phases)}k)"


PATTERNS = (GridStripes,)
