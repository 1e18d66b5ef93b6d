"""The attention calls of a generation, by which densities are known before anything runs sparse."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from diffsparse.entry import HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.pipelines import architecture_of, find_transformers
from diffsparse.plan import SparsityPlan
from diffsparse.search.errors import BadInput
from diffsparse.search.generate import GenerationSettings
from diffsparse.search.inputs import Input
from diffsparse.search.intact import eager
from diffsparse.search.observe import first_step
from diffsparse.work import head_work

__all__ = ["Trajectory", "find_trajectory"]


@dataclass(frozen=True)
class Trajectory:
    """``levels``: the noise level of every step. ``calls``: layer, heads and grid of each self-attention call of a
    step."""

    levels: tuple[float, ...]
    calls: tuple[tuple[str, int, TokenGrid], ...]
    _known: dict[tuple[HeadEntry, TokenGrid, int], float] = field(default_factory=dict, compare=False, repr=False)

    def dense_share(self, plan: SparsityPlan) -> float:
        """The share of the steps that the plan's schedule leaves dense."""
        phases = plan.schedule.phases(self.levels)
        return phases.count(None) / len(phases)

    def level_after(self, share: float) -> float:
        """The noise level below which a schedule is sparse whose dense steps, its first, are this share at most."""
        return min(1.0, self.levels[min(int(share * len(self.levels)), len(self.levels) - 1)])

    def density(self, plan: SparsityPlan) -> float | None:
        """Whole-trajectory density of a plan without reuse; None where it depends on queries and keys."""
        if plan.reuses or not all(self._is_fixed(entry, plan.block_size) for entry in plan.entries):
            return None
        work = done = 0.0
        for phase in plan.schedule.phases(self.levels):
            for layer, heads, grid in self.calls:
                pairs = float(heads) * grid.seq_len**2
                entries = None if phase is None else plan.layer_entries(phase, layer, heads)
                work += pairs
                if entries is None:
                    done += pairs
                else:
                    done += pairs * sum(self._density(entry, grid, plan) for entry in entries) / heads
        return done / work

    def _is_fixed(self, entry: HeadEntry, block_size: int) -> bool:
        """Whether a head's work is known: what a rule picks is, where it picks so many blocks and all are as long."""
        if entry.online is None:
            return True
        if not entry.online.budget.is_fixed or entry.online.cadence == "shrink":
            return False
        grids = {grid.visual_only() for _, _, grid in self.calls}
        lengths = [entry.order.partition(grid, block_size).lengths for grid in grids]
        return all(each.min() == each.max() for each in lengths)

    def _density(self, entry: HeadEntry, grid: TokenGrid, plan: SparsityPlan) -> float:
        if plan.online_repair is not None:
            return head_work(entry, grid, plan.block_size, plan.online_repair).density
        key = (entry, grid, plan.block_size)
        if key not in self._known:
            self._known[key] = head_work(entry, grid, plan.block_size).density
        return self._known[key]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "levels": list(self.levels),
            "calls": [[layer, heads, asdict(grid)] for layer, heads, grid in self.calls],
        }

    @classmethod
    def from_dict(cls, data: Any) -> Trajectory:
        """What :meth:`to_dict` gave."""
        calls = tuple((str(layer), int(heads), TokenGrid(**grid)) for layer, heads, grid in data["calls"])
        return cls(tuple(float(level) for level in data["levels"]), calls)


def find_trajectory(
    pipe: Any, source: Input, seed: int, settings: GenerationSettings, levels: tuple[float, ...]
) -> Trajectory:
    """Watches the first step of a generation, which is not carried on. ``levels``: of all its steps.

    Raises :class:`BadInput` where no self-attention call can be seen.
    """
    heads = {name: architecture_of(transformer).heads for name, transformer in find_transformers(pipe).items()}
    calls: list[tuple[str, int, TokenGrid]] = []

    def look(call: Any) -> None:
        calls.append((call.layer, heads[call.transformer], call.grid))

    try:
        with eager(pipe):
            unseen = first_step(pipe, source, seed, settings, look)
    except ValueError as error:  # the grid of a forward cannot be told
        raise BadInput(f"{type(pipe).__name__} cannot be compared: {error}") from error
    if not calls:
        why = "; ".join(f"{layer}: {reason}" for layer, reason in unseen.items()) or "it makes none"
        raise BadInput(f"{type(pipe).__name__} cannot be compared: no self-attention call is seen ({why})")
    return Trajectory(levels, tuple(calls))
