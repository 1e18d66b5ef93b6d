"""Whatever the scheduler, the density that is predicted is the one that runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from diffsparse.entry import Execution, HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.order import TileOrder
from diffsparse.patterns import Window
from diffsparse.pipelines import sparse_attention, sparse_attention_summary
from diffsparse.plan import SparsityPlan
from diffsparse.schedule import Schedule
from diffsparse.search.generate import GenerationSettings
from diffsparse.search.observe import call_levels, final_latents
from diffsparse.search.search import SearchConfig, search_plan
from tests.search.tiny import PROMPTS, SHAPE, build_pipeline, fix_costs

GRID, TILE, STEPS = TokenGrid(3, 12, 12), TileOrder(1, 8, 8), 5
#: With their own settings; those whose last step is at noise level 0 are among them.
SCHEDULERS = {
    "flow matching, Euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "flow matching, to level 0": ("FlowMatchEulerDiscreteScheduler", {"shift_terminal": 1e-9}),
    "flow matching, Heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {"timestep_spacing": "linspace"}),
    "DPM++ Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "final_sigmas_type": "zero"}),
    "UniPC": ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "KDPM2": ("KDPM2DiscreteScheduler", {}),
}


def pipeline(scheduler: str) -> Any:
    name, settings = SCHEDULERS[scheduler]
    pipe = build_pipeline()
    pipe.scheduler = getattr(diffusers, name)(**settings)
    return pipe


def executed(pipe: Any, plan: SparsityPlan, steps: int) -> float:
    with sparse_attention(pipe, plan, backend="cpu"), torch.no_grad():
        final_latents(pipe, PROMPTS[1], 3, GenerationSettings(steps, 3.0, **SHAPE))
        density = sparse_attention_summary(pipe).density
    assert density is not None
    return density


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_what_a_plan_is_said_to_run_is_what_it_runs(scheduler: str) -> None:
    pipe = pipeline(scheduler)
    settings = GenerationSettings(STEPS, 3.0, **SHAPE)
    levels = call_levels(pipe, PROMPTS[0], 0, settings)
    assert "forward" not in pipe.transformer.__dict__
    assert len(levels) >= 2 * STEPS and all(0 <= level <= 1 for level in levels)  # two guidance branches
    near, far = (HeadEntry(TILE, Window((1, s, s)), execution=Execution(tail="mean")) for s in (0.2, 0.6))
    middle = sorted(set(levels))[len(set(levels)) // 2]
    for schedule in (
        Schedule(sparse_below=0.9, phase_bounds=(middle,)),  # down to the last step
        Schedule(sparse_below=0.95, dense_below=middle / 2, phase_bounds=(0.6,)),
        Schedule(dense_between=((middle, middle - 1e-4), (1e-5, 0.0)), phase_bounds=(0.6,)),  # the second holds no step
    ):
        plan = SparsityPlan.uniform(near, far, schedule=schedule)
        layers = ["blocks.0.attn1", "blocks.1.attn1"]
        assert executed(pipe, plan, STEPS) == pytest.approx(plan.trajectory_density(GRID, levels, layers, 2), abs=1e-9)


@pytest.mark.slow(reason="a whole search each")
@pytest.mark.parametrize("scheduler", ["DPM++ Karras", "Heun"])
def test_a_searched_plan_runs_the_density_that_was_asked_for(
    scheduler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pipeline(scheduler)
    fix_costs(monkeypatch)
    config = SearchConfig(
        budget=None, density=0.6, steps=STEPS, trace_steps=4, samples=1, trace_prompts=1, validation_prompts=0,
        guidance_scale=3.0, dense_steps=1, **SHAPE,
    )  # fmt: skip
    plan = search_plan(pipe, PROMPTS, config, tmp_path, progress=False, say=lambda line: None)
    said = plan.record["search"]["trajectory_density"]
    assert said == pytest.approx(executed(pipe, plan, STEPS), abs=1e-9)
    assert 0.55 < said <= 0.6
