"""When sparse attention runs: dense ranges, phases and dense layers, keyed by noise level and never by step index."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from diffsparse.messages import shown

__all__ = ["Schedule"]


@dataclass(frozen=True)
class Schedule:
    """Which denoising steps and layers stay dense, and the phases whose entries may differ.

    Noise levels are ``timestep / num_train_timesteps`` in [0, 1], 1 at the start; for flow matching that is sigma.
    Intervals are closed above, so a level equal to a bound belongs to the lower interval.

    ``sparse_below``: steps at a higher level than this run dense.
    ``dense_below``: steps at this level or below run dense again; 0 means none, not even a last step at level 0.
    ``phase_bounds``: descending levels between phases; ``n`` bounds make ``n + 1`` phases.
    ``dense_layers``: names of layers that always run dense.

    >>> schedule = Schedule(sparse_below=0.9, phase_bounds=(0.5,))
    >>> [schedule.phase(level) for level in (1.0, 0.9, 0.6, 0.5, 0.0)]
    [None, 0, 0, 1, 1]
    """

    sparse_below: float = 1.0
    dense_below: float = 0.0
    phase_bounds: tuple[float, ...] = ()
    dense_layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("phase_bounds", "dense_layers"):
            if not isinstance(getattr(self, name), tuple):
                raise ValueError(f"a schedule's {name} is a tuple, got {shown(getattr(self, name))}")
        if not all(isinstance(layer, str) for layer in self.dense_layers):
            raise ValueError(f"a schedule's dense_layers are names of layers, got {shown(self.dense_layers)}")
        levels = (self.sparse_below, *self.phase_bounds, self.dense_below)
        if any(isinstance(v, bool) or not isinstance(v, (int, float)) or not 0 <= v <= 1 for v in levels):
            raise ValueError(f"a schedule's noise levels lie in [0, 1]; got {shown(levels)}")
        if self.phase_bounds and list(levels) != sorted(set(levels), reverse=True):
            raise ValueError(f"phase bounds descend strictly between sparse_below and dense_below; got {shown(levels)}")

    @property
    def num_phases(self) -> int:
        """One more than there are bounds between phases."""
        return len(self.phase_bounds) + 1

    def phase(self, noise_level: float) -> int | None:
        """The phase of a step, or None where it runs dense."""
        # Schedulers like Euler and DPM++ end with a step at level 0, which is a step like any other.
        if noise_level > self.sparse_below or 0 < self.dense_below >= noise_level:
            return None
        return sum(noise_level <= bound for bound in self.phase_bounds)

    def phases(self, noise_levels: Iterable[float]) -> list[int | None]:
        """The phase of each step of a trajectory."""
        return [self.phase(level) for level in noise_levels]
