"""A plan that was composed, and what it was before its masks were made."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diffsparse.plan import SparsityPlan
from diffsparse.search.assign import Assignment
from diffsparse.search.items import Items
from diffsparse.search.options import Option
from diffsparse.search.trial import Trial

__all__ = ["Candidate", "Draft"]


@dataclass(frozen=True, eq=False)
class Candidate:
    """A plan, the error of every head's entry, float ``[phases, layers, heads]``, and the options they were made from.

    Predicted, of the head's output through the output projection: squared, relative to the dense output's square.
    """

    plan: SparsityPlan
    error: np.ndarray
    options: list[list[list[Option]]]

    @property
    def predicted_error(self) -> float:
        return float(self.plan.record["search"]["predicted_error"])


@dataclass(frozen=True, eq=False)
class Draft:
    """What a plan's heads choose, before its masks are made. ``room``: for what is not dense, in dense head calls."""

    trial: Trial
    items: Items
    result: Assignment
    room: float

    @property
    def error(self) -> float:
        return self.result.error
