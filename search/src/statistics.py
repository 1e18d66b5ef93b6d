"""Means of paired per-clip values with an interval, by scipy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Mean", "mean_of"]

CONFIDENCE = 0.95
#: With fewer values an interval says next to nothing: of two it is 12.7 times as wide as their standard error.
LEAST_FOR_INTERVAL = 6


@dataclass(frozen=True)
class Mean:
    """Mean of ``n`` values and the 95% t interval of that mean (None for fewer than six values).

    The clips are taken as independent draws; those that share a prompt are not quite.
    """

    mean: float
    low: float | None
    high: float | None
    minimum: float
    maximum: float
    n: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def mean_of(values: Sequence[float | None]) -> Mean | None:
    """The mean of the values that are finite numbers; None where there is none."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    if not known:
        return None
    n = len(known)
    mean = math.fsum(known) / n
    low = high = None
    if n >= LEAST_FOR_INTERVAL:
        from scipy import stats

        error = float(stats.sem(known))
        low, high = (mean, mean) if error == 0 else (float(b) for b in stats.t.interval(CONFIDENCE, n - 1, mean, error))
    return Mean(mean, low, high, min(known), max(known), n)
