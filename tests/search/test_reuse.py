"""Which outputs a search uses again: how fast they change, what that costs, and what there is room for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffsparse.pipelines import tap_attention
from diffsparse.plan import SparsityPlan
from diffsparse.reuse import computed_steps
from diffsparse.search.compose import Candidate
from diffsparse.search.drift import TOKENS, DriftMeter, holds_for
from diffsparse.search.errors import BadInput
from diffsparse.search.observe import final_latents
from diffsparse.search.perturb import stale_outputs
from diffsparse.search.search import SearchConfig, search_plan
from tests.search.made_up import GRID, LAYERS, found
from tests.search.tiny import PROMPTS, SHAPE, Cli, build_pipeline

LEVELS = np.linspace(1.0, 0.05, 20).tolist()
#: Of a head's outputs in :mod:`tests.search.made_up`: both branches, a row of 32 in 8 bits and its scale.
HEAD_BYTES = 2 * GRID.seq_len * 36


def roots(heads: int, dim: int) -> torch.Tensor:
    return torch.randn(heads, dim, dim, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tokens", [1, 37, TOKENS, 5 * TOKENS])
def test_a_steady_change_is_found_whatever_the_step(tokens: int) -> None:
    """Outputs that change by the same vector everywhere: the rate is its squared norm, times the tokens."""
    speed, root = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), roots(3, 8)
    meter, start = DriftMeter(), torch.randn(1, tokens, 3, 8)
    for step, level in enumerate([1.0, 0.9, 0.6, 0.55]):
        found = meter.add(step, ("t", "layer", 0), level, start + (1 - level) * speed, root)
        if step == 0:
            assert np.isnan(found).all()
            continue
        wanted = tokens * torch.einsum("hd,hde->he", speed, root).square().sum(-1)
        np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-2)  # of differences of floats


@pytest.mark.parametrize("in_one_batch", [True, False])
@pytest.mark.parametrize("swapped", [True, False])
def test_what_both_branches_of_guidance_share_counts_once(in_one_batch: bool, swapped: bool) -> None:
    """The rate times what guidance makes of an item's own error is the change of the guided output."""
    scale, gain = 5.0, 5.0**2 + 4.0**2
    generator = torch.Generator().manual_seed(0)
    common, apart = (torch.randn(1, 64, 2, 8, generator=generator) for _ in range(2))
    prompt, negative = common + 0.1 * apart, common - 0.1 * apart
    pair = [negative, prompt] if swapped else [prompt, negative]
    meter, eye = DriftMeter(scale), torch.eye(8).expand(2, 8, 8)
    for step, level in enumerate([0.5, 0.25]):
        outs = [step * x for x in pair]
        calls = [torch.cat(outs)] if in_one_batch else outs
        found = [meter.add(step, ("t", "layer", n), level, out, eye) for n, out in enumerate(calls)][-1]
    # Which of the items is the prompt's is not known: the mean over both orders counts.
    guided = [(b + scale * (a - b)).square().sum((0, 1, 3)) for a, b in (pair, pair[::-1])]
    wanted = (guided[0] + guided[1]) / 2 / gain / 0.25**2
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4)


@given(st.lists(st.floats(0.001, 1.0), min_size=1, max_size=12, unique=True))
def test_holds_are_ways_that_a_run_takes(levels: list[float]) -> None:
    levels = sorted((round(level, 6) for level in set(levels)), reverse=True)
    levels = [x for i, x in enumerate(levels) if i == 0 or levels[i - 1] - x > 1e-5]
    holds = holds_for(levels)
    assert len(levels) > 1 or not holds
    assert len({hold.computed for hold in holds}) == len(holds)
    for hold in holds:
        assert 0 < hold.reuse <= 1 and list(hold.computed) == computed_steps(levels, hold.reuse)
        assert hold.computed[0] and not all(hold.computed)
        last = levels[0]
        for level, computed, since in zip(levels, hold.computed, hold.since, strict=True):
            last = level if computed else last
            assert since == pytest.approx(last - level, abs=1e-12) and (since == 0) == computed
        # Levels that a model rounds a little decide nothing.
        assert computed_steps([x - 1e-7 for x in levels], hold.reuse) == list(hold.computed)


def reused(candidate: Candidate, layer: int) -> int:
    plan = candidate.plan
    return sum(plan.entries[i].execution.reuse > 0 for i in plan.index[:, layer].reshape(-1))


@pytest.mark.parametrize("changes", [{"density": 0.3}, {"density": None, "budget": 0.35}])
def test_heads_that_hardly_change_are_used_again(changes: dict[str, Any]) -> None:
    (without,), (candidate,) = (found(1, levels=LEVELS, memory=m, **changes)[1] for m in (0.0, 1e9))
    before, after = (c.plan.record["search"] for c in (without, candidate))
    assert not without.plan.reuses
    assert reused(candidate, 1) > reused(candidate, 0)
    assert after["predicted_error"] < before["predicted_error"]
    asked = changes["density"] or changes["budget"]
    spent = "trajectory_density" if changes["density"] else "predicted_attention_time"
    assert after[spent] <= asked * (1 + 1e-6)
    assert candidate.plan.trajectory_density(GRID, LEVELS, LAYERS) == pytest.approx(after["trajectory_density"])


@pytest.mark.parametrize("heads", [0.5, 1, 2.5, 4])
def test_what_is_kept_fits_into_the_memory(heads: float) -> None:
    (free,), (candidate,) = (found(1, levels=LEVELS, memory=m, density=0.3)[1] for m in (1e9, heads * HEAD_BYTES))
    plan = candidate.plan
    most = max(sum(plan.entries[i].execution.reuse > 0 for i in phase.reshape(-1)) for phase in plan.index)
    assert most <= heads
    assert candidate.plan.record["search"]["reuse_bytes"] == most * HEAD_BYTES <= heads * HEAD_BYTES
    assert candidate.plan.record["search"]["predicted_error"] >= 0.999 * free.plan.record["search"]["predicted_error"]


def test_one_of_several_plans_uses_nothing_again() -> None:
    _, candidates = found(3, levels=LEVELS, memory=1e9, density=0.3)
    assert [c.plan.reuses for c in candidates] == [True, True, False]
    errors = [c.plan.record["search"]["predicted_error"] for c in candidates]
    assert errors[0] == min(errors)


def config(**changes: Any) -> SearchConfig:
    options = {"density": 0.4, "steps": 12, "trace_steps": 6, "guidance_scale": 4.0, "candidates": 2, **SHAPE}
    return SearchConfig(**(options | {"repair": False} | changes))


@pytest.fixture(scope="module")
def pipe() -> Any:
    return build_pipeline()


def test_a_tap_that_changes_nothing_and_one_that_does(pipe: Any) -> None:
    settings = config().settings(6)
    dense = final_latents(pipe, PROMPTS[0], 0, settings)
    layers = ("blocks.0.attn1", "blocks.1.attn1")
    change = {}
    for share in (0.0, 0.5):
        tap, changed = stale_outputs(layers, share, 1)
        with tap_attention(pipe, tap):
            change[share] = float((final_latents(pipe, PROMPTS[0], 0, settings) - dense).square().sum())
        assert changed == [2, 4]
    assert change[0.0] == 0 < change[0.5]


def test_a_search_measures_it_and_a_run_does_it(pipe: Any, tmp_path: Path) -> None:
    plan = search_plan(pipe, PROMPTS, config(), tmp_path, progress=False)
    about = plan.record["search"]
    assert about["reuse_factor"] > 0 and about["reuse_factor"] != 1
    again = search_plan(pipe, PROMPTS, config(reuse_memory=0.0), tmp_path, progress=False)
    assert not again.reuses and again.record["search"]["reuse_bytes"] == 0
    both = search_plan(pipe, PROMPTS, config(validation_prompts=0), tmp_path, progress=False)
    assert both.reuses, "random outputs hardly change from step to step"
    saved = SparsityPlan.from_pretrained(tmp_path)
    pipe.enable_sparse_attention(saved, backend="cpu")
    try:
        final_latents(pipe, PROMPTS[0], 1, config().settings(12))
        ran = pipe.sparse_attention_summary().transformers["transformer"]
    finally:
        pipe.disable_sparse_attention()
    assert ran.reused_heads > 0
    assert 0 < ran.reuse_bytes <= both.record["search"]["reuse_bytes"]
    assert ran.density == pytest.approx(both.record["search"]["trajectory_density"], abs=1e-6)


def test_generations_of_few_steps_compute_everything(pipe: Any, tmp_path: Path) -> None:
    plan = search_plan(pipe, PROMPTS, config(steps=8, validation_prompts=0), tmp_path, progress=False)
    assert not plan.reuses


@pytest.mark.parametrize("memory", [-1.0, float("nan"), float("inf"), "1"])
def test_memories_that_are_none(memory: Any) -> None:
    with pytest.raises(BadInput, match="a reuse memory is a number of GB of at least 0, got"):
        config(reuse_memory=memory)


def test_a_memory_below_one_layer(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"1e-05 GB holds less than one layer's outputs, which are \S+ GB here"):
        search_plan(pipe, PROMPTS, config(reuse_memory=1e-5), tmp_path, progress=False)


def test_the_command_refuses_a_memory_below_zero(cli: Cli, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n")
    code, _, error = cli("search", "nowhere", "--prompts", prompts, "--out", tmp_path / "plan", "--reuse-memory", "-1")
    assert code == 2 and "-1" in error and len(error.strip().splitlines()) == 1
