"""Which step of a generation an attention call belongs to."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffsparse.search.errors import BadInput

__all__ = ["StepCounter"]


class StepCounter:
    """Finds the step of each attention call from its noise level, and counts the forwards within a step (guidance
    branches, experts).

    A generation that goes through its noise levels several times (the sections of a long clip) returns to its steps;
    a new level is then an error. ``levels``: of every step, descending. ``calls``: the most forwards that a step had
    in a row. ``step``: the last call's. ``changes``: how often the step changed.
    """

    def __init__(self) -> None:
        self.levels: list[float] = []
        self.calls = 0
        self.step = -1
        self.changes = -1
        self._forward = -1
        self._row = 0

    def update(self, call: Any) -> int:
        """Take note of an attention call; returns its step. Raises :class:`BadInput` for levels of no known step."""
        if call.forward == self._forward:
            return self.step
        self._forward = call.forward
        level = float(call.noise_level)
        if self.step >= 0 and abs(self.levels[self.step] - level) <= 1e-6:
            self._row += 1
        else:
            self.step, self._row = self._find(level), 1
            self.changes += 1
        self.calls = max(self.calls, self._row)
        return self.step

    def _find(self, level: float) -> int:
        if not self.levels or level < self.levels[-1]:
            self.levels.append(level)
            return len(self.levels) - 1
        known = int(np.abs(np.array(self.levels) - level).argmin())
        if abs(self.levels[known] - level) > 1e-4:
            raise BadInput(
                f"the noise level goes from {self.levels[self.step]:.3f} up to {level:.3f}, a level that no earlier "
                "step had; a search needs a generation whose noise only falls, or one that repeats its steps"
            )
        return known
