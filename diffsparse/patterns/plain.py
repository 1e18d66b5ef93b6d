"""Everything, and nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from diffsparse.order import BlockPartition
from diffsparse.patterns.base import Pattern, same

__all__ = ["Empty", "Full"]


@dataclass(frozen=True)
class Full(Pattern):
    """Every pair."""

    kind: ClassVar[str] = "full"

    def pairs(self, queries: BlockPartition, keys: BlockPartition) -> np.ndarray:
        return same(True, queries, keys)


@dataclass(frozen=True)
class Empty(Pattern):
    """No visual pair: with a tail, attention over block summaries alone."""

    kind: ClassVar[str] = "empty"

    def pairs(self, queries: BlockPartition, keys: BlockPartition) -> np.ndarray:
        return same(False, queries, keys)


PATTERNS = (Full, Empty)
