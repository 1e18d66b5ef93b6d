"""Patterns made of patterns: ``|`` keeps what any part keeps, ``&`` what all keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from diffsparse.grid import TokenGrid
from diffsparse.messages import shown
from diffsparse.order import BlockPartition, TokenOrder
from diffsparse.patterns.base import Pattern

__all__ = ["Intersection", "Union"]


@dataclass(frozen=True)
class _Combined(Pattern):
    """Parts, and a ufunc that makes one mask of theirs."""

    parts: tuple[Pattern, ...]
    sign: ClassVar[str]
    combine: ClassVar[np.ufunc]

    def __post_init__(self) -> None:
        if not isinstance(self.parts, tuple) or not self.parts or not all(isinstance(p, Pattern) for p in self.parts):
            raise ValueError(f"{self.kind} takes a tuple of at least one pattern, got {shown(self.parts)}")

    @classmethod
    def of(cls, *patterns: Pattern) -> Self:
        """The patterns together; parts of one that is of this kind already become parts of the whole."""
        return cls(tuple(part for p in patterns for part in (p.parts if isinstance(p, cls) else (p,))))

    def block_mask(self, grid: TokenGrid, order: TokenOrder, block_size: int) -> np.ndarray:
        return self.combine.reduce([part.block_mask(grid, order, block_size) for part in self.parts])  # type: ignore[no-any-return]

    def pairs(self, queries: BlockPartition, keys: BlockPartition) -> np.ndarray:
        return self.combine.reduce([part.pairs(queries, keys) for part in self.parts])  # type: ignore[no-any-return]

    def check_order(self, order: TokenOrder) -> None:
        for part in self.parts:
            part.check_order(order)

    def is_carried(self, grid: TokenGrid, order: TokenOrder, block_size: int) -> bool:
        return any(part.is_carried(grid, order, block_size) for part in self.parts)

    @property
    def family(self) -> str:
        return self.sign.join(dict.fromkeys(part.family for part in self.parts))

    def parameters(self) -> list[tuple[str, Any]]:
        return [
            (f"{part.kind} {i}: {name}", value)
            for i, part in enumerate(self.parts)
            for name, value in part.parameters()
        ]


@dataclass(frozen=True)
class Union(_Combined):
    """Pairs that any part keeps."""

    kind: ClassVar[str] = "union"
    sign: ClassVar[str] = "|"
    combine: ClassVar[np.ufunc] = np.logical_or

    def __str__(self) -> str:
        return " | ".join(str(p) for p in self.parts)


@dataclass(frozen=True)
class Intersection(_Combined):
    """Pairs that all parts keep."""

    kind: ClassVar[str] = "intersection"
    sign: ClassVar[str] = "&"
    combine: ClassVar[np.ufunc] = np.logical_and

    def __str__(self) -> str:
        return " & ".join(f"({p})" if isinstance(p, Union) else str(p) for p in self.parts)


PATTERNS = (Union, Intersection)
