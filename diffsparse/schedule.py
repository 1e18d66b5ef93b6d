"""When sparse attention runs: dense steps, phases and dense layers, keyed by noise level and never by step index."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    ``dense_between``: further intervals ``(high, low)`` of levels whose steps run dense, from noisy to clean and apart
    from each other; one whose ``low`` is 0 has level 0, too. A phase may lie on both sides of one.

    A generation of more steps has more of them in such an interval, and the same share of its way is dense. One of
    fewer steps may have none there, and would lose what the interval is for. So where an interval holds no step, the
    step that passes through it runs dense: the last one above it. Which one that is follows from the levels of the
    whole generation; a transformer that runs without a scheduler has only the steps that lie inside.

    >>> schedule = Schedule(sparse_below=0.9, phase_bounds=(0.5,))
    >>> [schedule.phase(level) for level in (1.0, 0.9, 0.6, 0.5, 0.0)]
    [None, 0, 0, 1, 1]
    >>> middle = Schedule(dense_between=((0.6, 0.5),))
    >>> middle.phases([1.0, 0.8, 0.6, 0.4, 0.2]), middle.phases([1.0, 0.7, 0.3])
    ([0, 0, None, 0, 0], [0, None, 0])
    """

    sparse_below: float = 1.0
    dense_below: float = 0.0
    phase_bounds: tuple[float, ...] = ()
    dense_layers: tuple[str, ...] = ()
    dense_between: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        for name in ("phase_bounds", "dense_layers", "dense_between"):
            if not isinstance(getattr(self, name), tuple):
                raise ValueError(f"a schedule's {name} is a tuple, got {shown(getattr(self, name))}")
        if not all(isinstance(layer, str) for layer in self.dense_layers):
            raise ValueError(f"a schedule's dense_layers are names of layers, got {shown(self.dense_layers)}")
        if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in self.dense_between):
            raise ValueError(f"a schedule's dense_between has pairs (high, low), got {shown(self.dense_between)}")
        levels = (self.sparse_below, *self.phase_bounds, self.dense_below)
        edges = tuple(level for pair in self.dense_between for level in pair)
        for some in (levels, edges):
            if any(isinstance(v, bool) or not isinstance(v, (int, float)) or not 0 <= v <= 1 for v in some):
                raise ValueError(f"a schedule's noise levels lie in [0, 1]; got {shown(some)}")
        if self.phase_bounds and list(levels) != sorted(set(levels), reverse=True):
            raise ValueError(f"phase bounds descend strictly between sparse_below and dense_below; got {shown(levels)}")
        if list(edges) != sorted(set(edges), reverse=True):
            raise ValueError(
                f"dense_between has pairs (high, low) that descend strictly, and so do the pairs; got "
                f"{shown(self.dense_between)}"
            )

    @property
    def num_phases(self) -> int:
        """One more than there are bounds between phases."""
        return len(self.phase_bounds) + 1

    def phase(self, noise_level: float, passing: Sequence[float] = ()) -> int | None:
        """The phase of a step, or None where it runs dense. ``passing``: of its generation, see :meth:`passing`."""
        # Schedulers like Euler and DPM++ end with a step at level 0, which is a step like any other.
        if noise_level > self.sparse_below or 0 < self.dense_below >= noise_level:
            return None
        if any(_lies_in(noise_level, pair) for pair in self.dense_between):
            return None
        if any(abs(noise_level - level) <= 1e-6 for level in passing):
            return None
        return sum(noise_level <= bound for bound in self.phase_bounds)

    def dense_steps(self, form: str = "g") -> list[str]:
        """Which steps run dense, in words; none where all are sparse. ``form``: of the levels.

        >>> Schedule(sparse_below=0.9, dense_between=((0.6, 0.5),)).dense_steps()
        ['above noise level 0.9', 'at noise level 0.6 to 0.5']
        """
        found = [f"above noise level {self.sparse_below:{form}}"] if self.sparse_below < 1 else []
        found += [f"at noise level {high:{form}} to {low:{form}}" for high, low in self.dense_between]
        return found + ([f"at noise level {self.dense_below:{form}} and below"] if self.dense_below else [])

    def passing(self, noise_levels: Iterable[float]) -> tuple[float, ...]:
        """Levels of the steps that run dense because they pass through an interval that holds no step.

        ``noise_levels``: of all steps of a generation, in any order.
        """
        if not self.dense_between:
            return ()
        levels = list(noise_levels)
        empty = [pair for pair in self.dense_between if not any(_lies_in(level, pair) for level in levels)]
        above = [[level for level in levels if level > high] for high, _ in empty]
        return tuple(dict.fromkeys(min(some) for some in above if some))

    def phases(self, noise_levels: Iterable[float]) -> list[int | None]:
        """The phase of each step of a trajectory."""
        levels = list(noise_levels)
        passing = self.passing(levels)
        return [self.phase(level, passing) for level in levels]


def _lies_in(level: float, pair: tuple[float, float]) -> bool:
    high, low = pair
    return low < level <= high or (low == 0 == level)
