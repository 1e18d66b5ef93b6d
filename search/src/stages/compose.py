"""Fourth stage: what everything costs on this device, and the plans that are best by what was measured."""

from __future__ import annotations

from functools import partial

from diffsparse.grid import TokenGrid
from diffsparse.kernels.costs import CostTable
from diffsparse.pipelines.policy import Machine, compute_dtype, machine_for
from diffsparse.search.compose import Candidate, Composer
from diffsparse.search.cost import measure_costs
from diffsparse.search.layers import switch_level
from diffsparse.search.stages.sensitivity import amplification, effects, reference
from diffsparse.search.workspace import Workspace

__all__ = ["compose_plans", "composer_of", "layer_costs"]


def layer_costs(work: Workspace) -> dict[TokenGrid, CostTable]:
    """Costs on every grid of a layer, measured where a search has not measured them yet."""
    dtype = next(work.transformer.parameters()).dtype
    shape = (work.architecture.heads, work.probe.head_dim)
    found: dict[TokenGrid, CostTable] = {}
    for grid in dict.fromkeys(work.grids.values()):
        order = work.layer_orders(grid)[0]
        measure = partial(measure_costs, grid, *shape, order, work.config.block_size, work.device, dtype)
        found[grid] = work.costs(grid, measure)
    return found


def run_machine(work: Workspace) -> Machine:
    """What a run on this machine goes by, under ``backend="auto"``."""
    dtype = compute_dtype(work.transformer, work.device)
    return work.machine(lambda: machine_for("auto", work.device, dtype, work.architecture.head_dim))


def composer_of(work: Workspace, costs: dict[TokenGrid, CostTable]) -> Composer:
    """What makes plans of everything that was measured. What the sensitivity stage lacks is measured here."""
    entries, predicted = reference(work)
    layers = effects(work, entries, predicted)
    growth = amplification(work, entries, (layers * predicted).sum(1))
    traced = work.trace_levels
    switch = switch_level(work.pipe, traced, work.trace_parts)
    machine = run_machine(work)
    return Composer(work, work.call_levels(), work.grids, work.orders, costs, machine, layers, growth, traced, switch)


def compose_plans(work: Workspace, composer: Composer) -> list[Candidate]:
    """The best plans, best first: as many as validation is to choose among."""
    with work.bar(1, "assign") as bar:
        candidates = composer.candidates(work.config.tried_plans)
        bar.update()
    return candidates
