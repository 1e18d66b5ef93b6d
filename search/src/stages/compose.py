"""Fourth stage: what everything costs on this device, and the plans that are best by what was measured."""

from __future__ import annotations

from diffsparse.grid import TokenGrid
from diffsparse.kernels.costs import CostTable
from diffsparse.pipelines.policy import Machine, compute_dtype, machine_for
from diffsparse.search.compose import Candidate, Composer
from diffsparse.search.cost import MEASUREMENTS, measure_costs
from diffsparse.search.errors import BadInput
from diffsparse.search.layers import switch_level
from diffsparse.search.stages.sensitivity import amplification, effects, reference, reuse_factor
from diffsparse.search.trial import distinct
from diffsparse.search.workspace import Workspace

__all__ = ["compose_plans", "composer_of", "layer_costs", "reuse_memory"]

#: Outputs that are kept on a CPU where nothing else is asked for.
CPU_BYTES = 1e9
#: In generations of fewer steps too much changes from one to the next: there sparser outputs of every step are better.
LEAST_STEPS = 12


def layer_costs(work: Workspace) -> dict[TokenGrid, CostTable]:
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
    return {grid: work.costs(grid) for grid in grids}


def run_machine(work: Workspace) -> Machine:
    """What a run on this machine goes by, under ``backend="auto"``."""
    dtype = compute_dtype(work.transformer, work.device)
    return work.machine(lambda: machine_for("auto", work.device, dtype, work.architecture.head_dim))


def reuse_memory(work: Workspace) -> float:
    """Bytes of outputs that a run may keep. Raises :class:`BadInput` where what is asked for holds no layer's."""
    asked, probe = work.config.reuse_memory, work.probe
    if asked is None:
        return probe.peak_bytes / 4 if probe.peak_bytes else CPU_BYTES
    largest = max(grid.seq_len for grid in work.grids.values())
    layer = work.architecture.heads * largest * (probe.head_dim + 4) * probe.branches * probe.items
    if 0 < asked * 1e9 < layer:
        raise BadInput(
            f"a reuse memory of {asked:g} GB holds less than one layer's outputs, which are {layer / 1e9:.3g} GB here; "
            "ask for more, or for 0 to compute all outputs at every step"
        )
    return asked * 1e9


def composer_of(work: Workspace, costs: dict[TokenGrid, CostTable]) -> Composer:
    """What makes plans of everything that was measured. What the sensitivity stage lacks is measured here."""
    entries, predicted = reference(work)
    layers = effects(work, entries, predicted)
    growth = amplification(work, entries, (layers * predicted).sum(1))
    traced = work.trace_levels
    switch = switch_level(work.pipe, traced, work.trace_parts)
    machine = run_machine(work)
    memory = reuse_memory(work)
    if len(distinct(work.call_levels())[0]) < LEAST_STEPS:
        memory = 0.0
    factor = reuse_factor(work, layers, growth, memory) if memory else 1.0
    return Composer(
        work,
        work.call_levels(),
        work.grids,
        work.orders,
        costs,
        machine,
        layers,
        growth,
        traced,
        switch,
        memory=memory,
        items=work.probe.branches * work.probe.items,
        reuse_factor=factor,
    )


def compose_plans(work: Workspace, composer: Composer) -> list[Candidate]:
    """The best plans, best first: as many as validation is to choose among."""
    with work.bar(1, "assign") as bar:
        candidates = composer.candidates(work.config.tried_plans)
        bar.update()
    return candidates
