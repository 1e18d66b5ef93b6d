"""Fourth stage: what everything costs on this device, and the plans that are best by what was measured."""

from __future__ import annotations

from diffsparse.pipelines.policy import compute_dtype, machine_for
from diffsparse.search.compose import Candidate, Composer
from diffsparse.search.cost import MEASUREMENTS, measure_costs
from diffsparse.search.errors import BadInput
from diffsparse.search.stages.sensitivity import amplification, effects, reference, reuse_factor
from diffsparse.search.stored_search import StoredSearch
from diffsparse.search.trial import distinct
from diffsparse.search.workspace import Workspace

__all__ = ["compose_plans", "composer_of", "layer_costs", "measure_rest", "reuse_memory"]

#: Outputs that are kept on a CPU where nothing else is asked for.
CPU_BYTES = 1e9
#: In generations of fewer steps too much changes from one to the next: there sparser outputs of every step are better.
LEAST_STEPS = 12


def layer_costs(work: Workspace) -> None:
    """Costs on every grid of a layer, measured where a search has not measured them yet."""
    dtype = next(work.transformer.parameters()).dtype
    shape = (work.architecture.heads, work.probe.head_dim)
    grids = dict.fromkeys(work.grids.values())
    todo = [grid for grid in grids if not work.has_costs(grid)]
    if todo:
        with work.bar(len(todo) * MEASUREMENTS, "costs") as bar:
            for i, grid in enumerate(todo, 1):
                order = work.layer_orders(grid)[0]
                work.put_costs(
                    grid,
                    measure_costs(grid, *shape, order, work.config.block, work.device, dtype, bar.update),
                )
                bar.reach(i * MEASUREMENTS)


def reuse_memory(stored: StoredSearch) -> float:
    """Bytes of outputs that a run may keep. Raises :class:`BadInput` where what is asked for holds no layer's."""
    asked, probe = stored.config.reuse_memory, stored.probe
    if len(distinct(stored.call_levels())[0]) < LEAST_STEPS:
        return 0.0
    if asked is None:
        return probe.peak_bytes / 4 if probe.peak_bytes else CPU_BYTES
    largest = max(grid.seq_len for grid in stored.grids.values())
    layer = stored.architecture.heads * largest * (probe.head_dim + 4) * probe.branches * probe.items
    if 0 < asked * 1e9 < layer:
        raise BadInput(
            f"a reuse memory of {asked:g} GB holds less than one layer's outputs, which are {layer / 1e9:.3g} GB here; "
            "ask for more, or for 0 to compute all outputs at every step"
        )
    return asked * 1e9


def measure_rest(work: Workspace) -> None:
    """Measure what the search lacks to compose plans: the sensitivity stage, and what kernels do on this machine."""
    if not work.has_machine:
        dtype = compute_dtype(work.transformer, work.device)
        work.put_machine(machine_for("auto", work.device, dtype, work.architecture.head_dim))
    if (known := work.sensitivity()) is None:
        entries, predicted = reference(work)
        layers = effects(work, entries, predicted)
        known = layers, amplification(work, entries, (layers * predicted).sum(1))
        work.put_sensitivity(*known)
    if memory := reuse_memory(work):
        reuse_factor(work, *known, memory)


def composer_of(stored: StoredSearch) -> Composer:
    """What makes plans of everything that was measured."""
    known, factor = stored.sensitivity(), stored.reuse_factor
    assert known is not None  # everything is measured
    memory = reuse_memory(stored)
    return Composer(
        stored,
        stored.call_levels(),
        stored.grids,
        stored.orders,
        {grid: stored.costs(grid) for grid in dict.fromkeys(stored.grids.values())},
        stored.machine,
        *known,
        stored.trace_levels,
        stored.facts.switch,
        memory=memory,
        items=stored.probe.branches * stored.probe.items,
        reuse_factor=1.0 if factor is None or not memory else factor,
    )


def compose_plans(stored: StoredSearch, composer: Composer, count: int) -> list[Candidate]:
    """The best plans, best first."""
    with stored.bar(1, "assign") as bar:
        candidates = composer.candidates(count)
        bar.update()
    return candidates
