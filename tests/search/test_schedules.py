"""Which schedules a search takes up: cuts into phases against all others, and dense steps anywhere."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffsparse.schedule import Schedule
from diffsparse.search.curves import HeadCurve
from diffsparse.search.drift import holds_for
from diffsparse.search.schedules import PRICES, Outlook, Weighed
from diffsparse.search.stages.report import traced_steps
from diffsparse.search.trial import Trial
from tests.search.made_up import GRID, LAYERS, composer

PRICE = np.array([1.0, 0.6, 0.4, 0.25, 0.1, 0.0])


def curves(weights: list[list[float]]) -> list[HeadCurve]:
    """Heads whose errors fall with the price as a power of it; ``weights``: of each at every traced step."""
    shape = np.array([0.0, 0.01, 0.05, 0.15, 0.4, 1.0])
    return [HeadCurve(np.outer(row, shape), PRICE, 1.0) for row in weights]


def outlook(weights: list[list[float]], push: list[float], reuse: bool = False, second: int = 0) -> Outlook:
    levels = np.linspace(1.0, 0.1, len(push))
    heads = [HeadCurve(h.errors, h.prices, h.whole, 0.1 * h.errors.max(1)) for h in curves(weights)]
    return Outlook(
        heads if reuse else curves(weights), np.array(push), np.ones(len(push), int), np.arange(len(push)),
        lambda members: holds_for(levels[members].tolist()) if reuse else [], second,
    )  # fmt: skip


def best_by_hand(weights: list[list[float]], push: list[float], dense: list[int], phases: int, price: float) -> float:
    """The least error and priced cost of all ways to cut the sparse steps into so many phases."""
    sparse = [step for step in range(len(push)) if step not in dense]

    def value(members: list[int]) -> float:
        total = 0.0
        for head in curves(weights):
            error = sum(push[i] * head.errors[i] for i in members)
            total += float((error + price * head.prices * len(members)).min())
        return total

    found = np.inf
    for inner in combinations(range(1, len(sparse)), phases - 1):
        runs = [sparse[a:b] for a, b in pairwise((0, *inner, len(sparse)))]
        if all(run[-1] - run[0] == len(run) - 1 for run in runs):
            found = min(found, sum(value(run) for run in runs))
    return found


@given(
    st.lists(st.lists(st.floats(0.01, 5), min_size=7, max_size=7), min_size=1, max_size=3),
    st.lists(st.floats(0.05, 1), min_size=7, max_size=7),
    st.sets(st.integers(0, 6), max_size=3),
    st.integers(1, 4),
    st.integers(0, len(PRICES) - 1),
)
@settings(max_examples=40, deadline=None)
def test_the_cut_is_the_best_of_all(
    weights: list[list[float]], push: list[float], dense: set[int], phases: int, price: int
) -> None:
    made = outlook(weights, push)
    least = made.least(sorted(dense), phases)[0]
    wanted = best_by_hand(weights, push, sorted(dense), phases, float(made.prices[price]))
    assert least[phases, price, -1] == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("budget", [0.2, 0.5, 0.8])
def test_what_is_foreseen_fits_the_budget_and_more_phases_are_no_worse(budget: float, reuse: bool) -> None:
    rng = np.random.default_rng(0)
    made = outlook(rng.random((4, 9)).tolist(), (rng.random(9) + 0.1).tolist(), reuse)
    found = made.cut([0], 5, budget)
    assert [weighed.trial.phases for weighed in found] == [1, 2, 3, 4, 5]
    assert all(weighed.trial.dense == [0] for weighed in found)
    errors = [weighed.error for weighed in found]
    # Outputs may serve within a phase only, so that there a further one has its price.
    assert reuse or (errors == sorted(errors, reverse=True) and errors[-1] < 0.99 * errors[0])
    cheaper = made.cut([0], 5, 0.7 * budget)
    assert all(a.error < b.error for a, b in zip(found, cheaper, strict=False))


def test_one_step_may_be_a_phase_and_phases_are_uneven() -> None:
    """All that counts is at the first step; the others are alike."""
    made = outlook([[50.0] + [0.1] * 9], [1.0] * 10)
    (_, two) = made.cut([], 2, 0.4)
    assert two.trial.phase_of == (0, *[1] * 9)


def test_no_phase_spans_two_experts() -> None:
    made = outlook([[1.0] * 8], [1.0] * 8, second=3)
    for weighed in made.cut([], 4, 0.5):
        assert weighed.trial.phase_of[2] != weighed.trial.phase_of[3]


def test_a_further_dense_step_is_where_it_pays() -> None:
    weights = [0.1] * 4 + [30.0] + [0.1] * 4 + [30.0]
    made = outlook([weights], [1.0] * 10)
    one = made.further([], made.cut([], 1, 0.4), 0.4)
    assert len(one) == 1 and one[0].dense in ([4], [9])
    even = outlook([[1.0] * 10], [1.0] * 10)
    assert even.further([], even.cut([], 1, 0.4), 0.4) == []


def test_no_budget_for_the_dense_steps() -> None:
    assert outlook([[1.0] * 4], [1.0] * 4).cut([0, 1], 2, 0.5) == []


@given(st.lists(st.booleans(), min_size=2, max_size=12), st.data())
@settings(deadline=None)
def test_a_schedule_has_the_steps_of_its_trial(dense: list[bool], data: Any) -> None:
    if all(dense):
        dense[0] = False
    phase, phase_of = -1, []
    for step, none in enumerate(dense):
        if none:
            phase_of.append(None)
            continue
        if phase < 0 or dense[step - 1] or data.draw(st.booleans()):
            phase += 1
        phase_of.append(phase)
    trial = Trial(tuple(phase_of))
    levels = np.linspace(1.0, 0.0, len(dense))
    schedule = trial.schedule(levels, None, 0)
    assert schedule.phases(levels.tolist()) == phase_of
    assert schedule.num_phases == trial.phases
    # At another number of steps each run of dense steps keeps one.
    few = schedule.phases([1.0, 0.55, 0.01])
    assert (None in few) == any(dense)


@pytest.mark.parametrize("memory", [0.0, 1e9])
def test_a_composer_takes_what_it_foresees(memory: float) -> None:
    made = composer(levels=np.linspace(1.0, 0.05, 12).tolist(), memory=memory, density=0.4)
    foreseen = made.outlook.cut([], 6, made.wanted)
    plan = made.plan(made.draft(0, scan := made.scan()), scan).plan
    about = plan.record["search"]
    assert about["dense_at"] == [] and about["dense_steps"] == 0
    chosen = plan.schedule.phases(made.levels.tolist())
    assert chosen in [list(weighed.trial.phase_of) for weighed in foreseen]
    even = made.trial(0, plan.schedule.num_phases)
    assert plan.schedule.num_phases > 1
    assert about["predicted_error"] <= 1.02 * made._least_error(even, made.items(even))


def test_a_composer_takes_a_dense_step_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    made = composer(levels=np.linspace(1.0, 0.05, 12).tolist(), density=0.5)
    trial = Trial((0, 0, 0, 0, None, 1, 1, 1, 1, 1, 1, None))
    monkeypatch.setattr(Outlook, "further", lambda *_: [trial])
    monkeypatch.setattr("diffsparse.search.compose.PHASE_GAIN", -9.0)
    candidate = made.plan(made.draft(0, scan := made.scan()), scan)
    plan, about = candidate.plan, candidate.plan.record["search"]
    assert about["dense_at"] == [4, 11] and about["dense_steps"] == 2
    assert plan.schedule.phases(made.levels.tolist()) == list(trial.phase_of)
    assert plan.trajectory_density(GRID, made.levels, LAYERS) == pytest.approx(about["trajectory_density"])
    assert 0.4 < about["trajectory_density"] <= 0.5
    assert isinstance(made.outlook.cut([], 2, 0.5)[0], Weighed)


def test_a_phase_without_a_traced_step_is_shown_by_the_nearest_one() -> None:
    schedule = Schedule(phase_bounds=(0.95, 0.6, 0.52))
    found = [traced_steps(schedule, [1.0, 0.7, 0.5, 0.2], phase) for phase in range(4)]
    assert found == [[0], [1], [2], [2, 3]]
