"""From scores to plans, with scores made up: what is recorded of a head is what its option was taken for."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from diffsparse.entry import TAILS
from diffsparse.grid import TokenGrid
from diffsparse.kernels.costs import CostTable
from diffsparse.order import RasterOrder
from diffsparse.patterns import Band
from diffsparse.pipelines.policy import ANY_MACHINE
from diffsparse.search.compose import Composer
from diffsparse.search.errors import BadInput
from diffsparse.search.options import Option, head_entry, head_options
from diffsparse.search.search import SearchConfig
from diffsparse.search.trial import Trial, distinct
from diffsparse.work import block_fill
from tests.search.made_up import GRID, LAYERS, LEVELS, TILE, TRACED, Scores, found


@pytest.mark.parametrize("changes", [{}, {"density": None, "budget": 0.4}, {"density": 0.25, "dense_steps": 1}])
def test_a_heads_error_is_that_of_the_option_that_was_chosen(changes: dict[str, Any]) -> None:
    search, candidates = found(3, **changes)
    kinds = set()
    for candidate in candidates:
        plan, error = candidate.plan, candidate.error
        assert error.shape == plan.index.shape and np.isfinite(error).all()
        assert (error >= 0).all() and (error <= 1).all()
        table = search.table(GRID, TILE)
        levels = np.array(LEVELS)
        growth = np.sqrt(np.interp(-levels, -np.array(TRACED), [4.0, 2.0, 1.0, 1.0]))
        push = -np.diff(levels, append=0.0) * growth
        for phase, j, head in np.ndindex(plan.index.shape):
            entry = plan.entries[plan.index[phase, j, head]]
            weights: dict[int, float] = {}
            for level, p in zip(levels, push, strict=True):
                if plan.schedule.phase(level) == phase:
                    step = int(abs(level - np.array(TRACED)).argmin())
                    weights[step] = weights.get(step, 0.0) + p
            scores = search.scores(LAYERS[j], head, weights)
            value = search.value(LAYERS[j], head, weights)
            same = [o for o in head_options(scores, table, bitmaps=True) if head_entry(o, value, table) == entry]
            kinds |= {option.kind for option in same}
            wanted = 0.0 if scores.energy == 0 else min(option.error for option in same) / scores.energy
            assert error[phase, j, head] == pytest.approx(wanted, rel=1e-6, abs=1e-12)
    assert len(kinds) > 1, "the budget leaves too little choice to tell anything"


def test_steps_are_told_by_their_levels() -> None:
    levels, calls = distinct([1.0, 0.7, 0.7, 0.2, 0.2, 0.0])
    assert levels.tolist() == [1.0, 0.7, 0.2, 0.0] and calls.tolist() == [1, 2, 2, 1]


@pytest.mark.parametrize("changes", [{"density": 0.5}, {"density": 0.4, "dense_steps": 2}])
def test_steps_that_call_the_model_twice_count_twice(changes: dict[str, Any]) -> None:
    """As Heun's do, all but the first: sparse steps and dense ones."""
    twice = [LEVELS[0], *np.repeat(LEVELS[1:], 2)]
    (candidate,) = found(levels=twice, **changes)[1]
    plan, about = candidate.plan, candidate.plan.record["search"]
    assert about["trajectory_density"] == pytest.approx(plan.trajectory_density(GRID, twice), abs=1e-12)
    assert changes["density"] - 0.1 < about["trajectory_density"] <= changes["density"]
    # The same plan costs another share where every step is one call.
    assert abs(plan.trajectory_density(GRID, LEVELS) - about["trajectory_density"]) > 1e-3
    (timed,) = found(levels=twice, density=None, budget=0.5)[1]
    assert 0.4 < timed.plan.record["search"]["predicted_attention_time"] <= 0.5 + 1e-9


@pytest.mark.parametrize("changes", [{}, {"dense_steps": 2}, {"dense_steps": 5}])
@pytest.mark.parametrize("name", ["budget", "density"])
def test_the_least_that_can_be_had_is_said_and_works(name: str, changes: dict[str, Any]) -> None:
    asked = {"budget": None, "density": None} | changes
    for share in (0.001, 0.01):
        with pytest.raises(BadInput, match=f"a {name} of {share} cannot be reached on this model") as caught:
            found(**asked | {name: share})
    said = re.search(r"the least is (0\.\d{3}), .*; ask for (0\.\d+) or more", str(caught.value))
    assert said is not None and "\n" not in str(caught.value)
    least, ask = float(said[1]), float(said[2])
    assert changes.get("dense_steps", 0) / 6 < least <= ask < least + 0.002
    with pytest.raises(BadInput, match="cannot be reached"):
        found(**asked | {name: least - 0.001})
    (candidate,) = found(**asked | {name: ask})[1]
    about = candidate.plan.record["search"]
    reached = about["predicted_attention_time" if name == "budget" else "trajectory_density"]
    assert least - 0.1 < reached <= ask + 1e-6


def test_a_budget_that_only_dense_attention_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scores, "silent", None)
    costs = CostTable.of_call("cpu", 1.0, (0.02, 0.1, 0.3, 0.6), {tail: (1.5, 1.5, 1.5, 1.5) for tail in TAILS})
    with pytest.raises(BadInput, match=r"a budget of 0\.5 cannot be reached .*: the cheapest plan is no cheaper"):
        found(costs=costs, density=None, budget=0.5)


def test_orders_that_fill_their_blocks_less_cost_more() -> None:
    grid, orders = TokenGrid(2, 15, 26), (RasterOrder(), TILE)
    full = [block_fill(order, grid, 64) for order in orders]
    assert full[0] > full[1]
    share = {tail: (0.1, 0.2, 0.4, 0.7) for tail in TAILS}
    costs = CostTable.of_call("cpu", 1.0, (0.02, 0.1, 0.3, 0.6), share, full[0])
    rest: Any = (np.full((len(TRACED), 2), 1.0), np.array([4.0, 2.0, 1.0, 1.0]), TRACED)
    of_heads = {(layer, head): orders[head] for layer in LAYERS for head in range(2)}
    for config in ({"budget": 0.5}, {"budget": None, "density": 0.5}):
        search = Scores(SearchConfig(steps=6, validation_prompts=0, **config))
        composer = Composer(search, LEVELS, dict.fromkeys(LAYERS, grid), of_heads, {grid: costs}, ANY_MACHINE, *rest)  # type: ignore[arg-type]
        option = Option(0.0, 0.2, "mean", "family", Band(0.1))
        first, second = (composer.pricing.cost(option, LAYERS[0], order) for order in orders)
        if "density" in config:
            assert first == second, "work is counted in real pairs"
        else:
            assert first == pytest.approx(costs.head_ratio(1, 0.2, "mean"))
            assert second == pytest.approx(costs.head_ratio(1, 0.2 * (full[0] / full[1]) ** 2, "mean"))
            assert second > first
        assert composer.pricing.cost(Option(0.0, 1.0, "none", "dense"), LAYERS[0], TILE) == 1.0


def test_heads_that_compute_all_or_nothing() -> None:
    (dense,) = found(density=1.0)[1]
    assert not dense.error.any()
    seen = set()
    for density in (0.3, 0.5, 0.7):
        (candidate,) = found(density=density)[1]
        for at in np.ndindex(candidate.plan.index.shape):
            entry = candidate.plan.entries[candidate.plan.index[at]]
            silent = at[1:] == (0, 1)
            if entry.is_dense or entry.execution.mode == "skip":
                seen.add((entry.is_dense, silent))
                assert candidate.error[at] == (0.0 if entry.is_dense or silent else 1.0)
    assert (False, True) in seen  # the head without an output is left out, and loses nothing by it


@pytest.mark.parametrize("density", [0.3, 0.5, 0.7])
def test_a_plan_that_came_out_too_dense_is_made_again(density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffsparse.search.compose.DENSITY_MARGIN", -0.06)  # as if costs were told too low
    (candidate,) = found(density=density, dense_steps=1)[1]
    assert density - 0.1 < candidate.plan.trajectory_density(GRID, LEVELS) <= density
    assert candidate.plan.record["search"]["trajectory_density"] <= density


def test_layers_weigh_what_their_grids_hold() -> None:
    """One layer sees text, the other does not: the density is that of all pairs of tokens of both."""
    grids = {LAYERS[0]: TokenGrid(2, 16, 16, text_after=256), LAYERS[1]: GRID}
    share = {tail: (0.1, 0.2, 0.4, 0.7) for tail in TAILS}
    costs = {
        grid: CostTable.of_call("cpu", seconds, (0.02, 0.1, 0.3, 0.6), share)
        for grid, seconds in zip(grids.values(), (3.0, 1.0), strict=True)
    }
    orders = {(layer, head): TILE for layer in LAYERS for head in range(2)}
    rest: Any = (np.full((len(TRACED), 2), 1.0), np.array([4.0, 2.0, 1.0, 1.0]), TRACED)
    for config in ({"budget": None, "density": 0.5}, {"budget": 0.5}):
        search = Scores(SearchConfig(steps=6, validation_prompts=0, **config))
        composer = Composer(search, LEVELS, grids, orders, costs, ANY_MACHINE, *rest)
        (candidate,) = composer.candidates(1)
        plan, about = candidate.plan, candidate.plan.record["search"]
        done = total = 0.0
        for level in LEVELS:
            phase = plan.schedule.phase(level)
            for layer, grid in grids.items():
                layout = None if phase is None else plan.layout(phase, layer, 2, grid)
                work = float(grid.seq_len**2)
                done, total = done + work * (1.0 if layout is None else layout.density), total + work
        assert about["trajectory_density"] == pytest.approx(done / total, abs=1e-6)
        if config["budget"] is None:
            assert 0.4 < done / total <= 0.5
        else:
            assert composer.weight == {LAYERS[0]: 1.0, LAYERS[1]: pytest.approx(1 / 3)}
            assert about["predicted_attention_time"] <= 0.5 + 1e-9


@pytest.mark.parametrize("phases", [1, 2, 3, 4, 6])
def test_no_phase_spans_two_experts_where_there_are_several(phases: int) -> None:
    for steps, dense, second in ((6, 0, 2), (6, 1, 2), (6, 0, 5), (12, 3, 7), (6, 2, 2), (6, 3, 2), (6, 0, 0)):
        if phases > steps - dense:
            continue
        trial = Trial.even(steps, dense, phases, second)
        assert len(trial.phase_of) == steps and trial.dense == list(range(dense)) and trial.phases <= phases
        sparse = trial.phase_of[dense:]
        changes = np.diff(np.array(sparse, int))
        assert sparse[0] == 0 and ((changes == 0) | (changes == 1)).all()
        if phases > 1 and dense < second:
            assert trial.phase_of[second - 1] != trial.phase_of[second]


def test_steps_take_the_scores_of_the_expert_that_runs_them() -> None:
    """The second one takes over at 0.65, nearer to the traced step of the first."""
    search = Scores(SearchConfig(budget=None, density=0.5, steps=12, validation_prompts=0))
    levels = np.linspace(1, 0.05, 12).tolist()
    orders = {(layer, head): TILE for layer in LAYERS for head in range(2)}
    costs = CostTable.of_call("cpu", 1.0, (0.02, 0.1, 0.3, 0.6), {tail: (0.1, 0.2, 0.4, 0.7) for tail in TAILS})
    rest: Any = (np.full((len(TRACED), 2), 1.0), np.array([4.0, 2.0, 1.0, 1.0]), TRACED)
    composer = Composer(
        search, levels, dict.fromkeys(LAYERS, GRID), orders, {GRID: costs}, ANY_MACHINE, *rest, switch=0.65
    )
    assert ((composer.levels >= 0.65) == (composer.bins < 2)).all()
    assert (composer.levels[composer.second - 1] >= 0.65) and composer.levels[composer.second] < 0.65
    plan = composer.plan(composer.draft(0, scan := composer.scan()), scan).plan
    bounds = plan.schedule.phase_bounds
    assert not bounds or any(bound == pytest.approx(0.65, abs=1e-5) for bound in bounds)
