"""The phase of a step where that depends on the other steps of its generation."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from diffsparse.schedule import Schedule

__all__ = ["PhaseFinder"]

# A model may get its timestep in bf16, so that a level and the scheduler's own differ by so much.
_ROUNDING = 5e-3


class PhaseFinder:
    """Finds phases by the steps of a pipeline's scheduler, which it reads once a generation."""

    def __init__(self) -> None:
        self._timesteps: weakref.ref[torch.Tensor] | None = None
        self._levels: list[float] = []

    def of(self, schedule: Schedule, scheduler: Any) -> Callable[[float], int | None]:
        """The phase at a noise level, or None where the step runs dense.

        By the level alone where no step passes through a dense interval, and where the scheduler's steps do not tell.
        """
        if not schedule.dense_between:
            return schedule.phase
        levels = self._read(scheduler)
        passing = schedule.passing(levels)
        if not passing:
            return schedule.phase

        def phase(level: float) -> int | None:
            nearest = min(levels, key=lambda known: abs(known - level))
            return schedule.phase(nearest if abs(nearest - level) <= _ROUNDING else level, passing)

        return phase

    def _read(self, scheduler: Any) -> list[float]:
        timesteps = getattr(scheduler, "timesteps", None)
        if not isinstance(timesteps, torch.Tensor) or timesteps.ndim != 1:
            return []
        if self._timesteps is None or self._timesteps() is not timesteps:
            steps = int(scheduler.config.get("num_train_timesteps", 1000))
            self._timesteps = weakref.ref(timesteps)
            self._levels = [t / steps for t in timesteps.tolist()]
        return self._levels
