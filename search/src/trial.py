"""The steps of a generation, and schedules of them that a search tries: dense first steps, and phases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffsparse.schedule import Schedule

__all__ = ["Trial", "distinct", "strides"]


def strides(levels: np.ndarray) -> np.ndarray:
    """How far each step of a generation moves: the difference to the next noise level, the last one being zero."""
    return -np.diff(levels, append=0.0)


def distinct(levels: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Steps of a generation from the noise levels of its model calls: each step's level, and its number of calls.

    Calls that follow each other at one level are a step. A scheduler may call the model twice in most steps (Heun), and
    guidance may do so in some. The sections of a long clip go through the same levels again: more calls of the same
    steps.
    """
    found: list[float] = []
    calls: list[int] = []
    for level in levels:
        if not found or level < found[-1] - 1e-6:
            found.append(float(level))
            calls.append(1)
        else:
            calls[int(np.abs(np.array(found) - level).argmin())] += 1
    return np.array(found), np.array(calls)


@dataclass(frozen=True)
class Trial:
    """A schedule to try: the phase of every step of a generation, None where it is dense.

    Phases are numbered from 0 in their order; none goes on after a dense step.
    """

    phase_of: tuple[int | None, ...]

    @classmethod
    def even(cls, steps: int, dense: int, phases: int, second: int = 0) -> Trial:
        """``dense`` first steps, and phases of about as many steps each. ``second``: where another expert takes over.

        Its layers are other ones of the same names, so that no phase holds steps of both where there are several.
        """
        sparse, first = steps - dense, second - dense
        if phases == 1 or first <= 0 or first >= sparse:
            found = [i * phases // sparse for i in range(sparse)]
        else:
            before = min(max(1, round(phases * first / sparse)), phases - 1, first)
            after = min(phases - before, sparse - first)
            found = [i * before // first for i in range(first)]
            found += [before + i * after // (sparse - first) for i in range(sparse - first)]
        return cls((*[None] * dense, *found))

    @property
    def phases(self) -> int:
        return 1 + max(phase for phase in self.phase_of if phase is not None)

    @property
    def dense(self) -> list[int]:
        """The steps that are dense."""
        return [step for step, phase in enumerate(self.phase_of) if phase is None]

    @property
    def sparse(self) -> list[int]:
        """The others."""
        return [step for step, phase in enumerate(self.phase_of) if phase is not None]

    def members(self, phase: int) -> list[int]:
        """The steps of a phase."""
        return [step for step, other in enumerate(self.phase_of) if other == phase]

    def schedule(self, levels: np.ndarray, switch: float | None, second: int) -> Schedule:
        """The same by noise level. ``levels``: of all steps. ``switch``, ``second``: the level and the step at which
        another expert takes over, or None and 0."""

        def before(step: int) -> float:
            if switch is not None and step == second:
                # Just below it, where the first expert still runs: ranges take in their upper end.
                return max(switch - 1e-6, float(levels[step]))
            return float((levels[step - 1] + levels[step]) / 2)

        steps = len(self.phase_of)
        first = self.sparse[0]
        starts = [step for step in self.sparse if step > first and self.phase_of[step] != self.phase_of[step - 1]]
        inner = [step for step in self.dense if step > first]
        begins = [step for step in inner if step - 1 not in inner]
        ends = [step + 1 for step in inner if step + 1 not in inner]
        pairs = [(before(i), before(j) if j < steps else 0.0) for i, j in zip(begins, ends, strict=True)]
        return Schedule(
            sparse_below=before(first) if first else 1.0,
            phase_bounds=tuple(before(step) for step in starts),
            dense_between=tuple(pairs),
        )
