"""What a search writes beside the plan: its record, and the attention that it measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import diffsparse
from diffsparse.grid import TokenGrid
from diffsparse.kernels import sparse_attention
from diffsparse.plan import SparsityPlan
from diffsparse.schedule import Schedule
from diffsparse.search.compose import Candidate
from diffsparse.search.environment import environment
from diffsparse.search.errors import writing
from diffsparse.search.facts import Facts
from diffsparse.search.inputs import contents
from diffsparse.search.layers import main_grid, switch_level
from diffsparse.search.load import shape_rule
from diffsparse.search.measured import HeadFigures, PooledAttention, plan_digest
from diffsparse.search.options import Option
from diffsparse.search.signature import SHORTENING
from diffsparse.search.stored_search import StoredSearch
from diffsparse.search.workspace import Workspace

__all__ = ["facts_of", "measured", "search_record", "traced_steps", "write_plan"]


def facts_of(work: Workspace, about: Mapping[str, Any]) -> Facts:
    """What plans without the pipeline need of it. ``about``: what else their record says of the model."""
    name = getattr(work.pipe, "name_or_path", None) or getattr(work.pipe.config, "_name_or_path", "")
    return Facts(
        architecture=work.architecture,
        config=work.config,
        num_prompts=work.num_prompts,
        switch=switch_level(work.pipe, work.trace_levels, work.trace_parts),
        # The folder's own name only: where a model lies on somebody's disk is nobody's business.
        model={"id": Path(str(name)).name, "pipeline": type(work.pipe).__name__, **about},
        inputs=_inputs(work),
        size=_size_that_ran(work, main_grid(work.grids)),
        environment=environment(work.device),
    )


def search_record(stored: StoredSearch) -> dict[str, Any]:
    """What a plan's record says of the search."""
    config, facts, grid = stored.config, stored.facts, main_grid(stored.grids)
    return {
        "model": dict(facts.model),
        "calibration": {
            **facts.inputs,
            "traced_prompts": len(stored.traced()),
            "seed": config.seed,
            "grid": str(grid),
            "steps": config.steps,
            "trace_steps": config.trace_steps,
            **{
                name: value
                for name in ("guidance_scale", "true_cfg_scale", "height", "width", "num_frames")
                if (value := facts.size.get(name, getattr(config, name))) is not None
            },
            **_also(stored),
        },
        "search": {
            "budget": config.budget,
            "density": config.density,
            "target": config.goal,
            "kernel": _kernel_version(),
        },
        "costs": stored.costs(grid).to_dict(),
        "environment": dict(facts.environment),
    }


def _also(stored: StoredSearch) -> dict[str, Any]:
    """The second size, where there is one."""
    also = stored.also
    if also is None:
        return {}
    sizes = {name: value for name in ("height", "width", "num_frames") if (value := getattr(also.config, name))}
    return {"also": {"grid": str(main_grid(also.grids)), **sizes}}


def write_plan(stored: StoredSearch, chosen: Candidate, seconds: float, out: Path) -> SparsityPlan:
    """Write a plan with its record, and the attention that was measured beside it. ``seconds``: what it took."""
    plan, about = chosen.plan, search_record(stored)
    about["search"] |= plan.record["search"] | {"seconds": round(seconds, 1)}
    plan.record.update(about)
    told = plan.record["search"]
    stored.say(
        f"chosen: {told['dense_steps']} of {told['of_steps']} steps dense, {told['phases']} phase(s), "
        f"whole-trajectory density {told['trajectory_density']:.3f}"
    )
    attention = measured(stored, chosen)
    with writing(out, then="run the same command again: it goes on from what was measured"):
        plan.save_pretrained(out)
        attention.save(out)
    return plan


def _inputs(work: Workspace) -> dict[str, Any]:
    """A hash of the inputs, with files by their content, and what they have beside a prompt."""
    found = contents(work.prompts)
    if all(one.is_plain for one in work.prompts):
        return {"prompts_sha256": hashlib.sha256("\n".join(found).encode()).hexdigest()}
    names = sorted({name for one in work.prompts for name in one.arguments})
    shares = {n: value for n in SHORTENING if (value := work.prompts[0].arguments.get(n)) is not None}
    return {"inputs_sha256": hashlib.sha256(json.dumps(found).encode()).hexdigest(), "inputs": names, **shares}


def _size_that_ran(work: Workspace, grid: TokenGrid) -> dict[str, int]:
    """Height and width in pixels where no option gives them and the pipeline takes them from its model.

    What the pipeline prepared latents for counts only where it agrees with the grid that was seen.
    """
    size, rule = work.probe.size, shape_rule(work.pipe)
    if size is None or size != (grid.height * rule.height, grid.width * rule.width):
        return {}
    return {"height": size[0], "width": size[1]}


def _kernel_version() -> str:
    return f"{sparse_attention.__module__} {diffsparse.__version__}"


def measured(work: StoredSearch, chosen: Candidate) -> PooledAttention:
    """Mean attention of every phase, layer and head, and what the chosen entries make of it."""
    plan = chosen.plan
    phases, heads = plan.schedule.num_phases, work.architecture.heads
    traced, orders = work.trace_levels, work.probe.orders
    members = [traced_steps(plan.schedule, traced, p) for p in range(phases)]
    pooled = np.zeros((phases, len(work.layers), heads, work.side, work.side), np.float16)
    kept = np.zeros((phases, len(work.layers), heads))
    for j, layer in enumerate(work.layers):  # what a layer has is read once
        for p in range(phases):
            pooled[p, j] = work.picture(layer, members[p])
            for head, option in enumerate(chosen.options[p][j]):
                kept[p, j, head] = _kept_mass(work, layer, head, option, members[p])
    figures = HeadFigures(chosen.error, kept, plan_digest(plan))
    by_layer = {layer: list(row) for layer, row in orders.items()}
    return PooledAttention(pooled, by_layer, main_grid(work.grids), plan.block_size, figures)


def traced_steps(schedule: Schedule, traced: list[float], phase: int) -> list[int]:
    """The traced steps of a phase; the one that is nearest to its middle where it has none."""
    found = [step for step, level in enumerate(traced) if schedule.phase(level) == phase]
    bounds = (schedule.sparse_below, *schedule.phase_bounds, schedule.dense_below)
    middle = (bounds[phase] + bounds[phase + 1]) / 2
    return found or [min(range(len(traced)), key=lambda step: abs(traced[step] - middle))]


def _kept_mass(work: StoredSearch, layer: str, head: int, option: Option, steps: list[int]) -> float:
    """Share of the attention weights that an option computes exactly."""
    if option.kind in ("dense", "skip"):
        return float(option.kind == "dense")
    table = work.table(work.grids[layer], work.orders[layer, head])
    return float(np.clip(1 - work.dropped(layer, head, table.place(option), steps), 0, 1))
