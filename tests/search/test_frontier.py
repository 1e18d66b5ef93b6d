"""The walk along the frontier, with made-up clips: few tries, and never a plan that was not validated."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffsparse.search.frontier import GAP, Curve, Tried, best_of, next_budget

TRIES = 4


def curve(low: float = 0.1, high: float = 0.9, steepness: float = 5.0) -> Curve:
    budgets = np.geomspace(low, high, 16)
    return Curve(budgets, 3.0 * np.exp(-steepness * budgets), budgets)


def walk(ssim: Callable[[float], float], target: float, predicted: Curve, tries: int = TRIES) -> list[Tried]:
    found: list[Tried] = []
    while (budget := next_budget(found, target, predicted, tries)) is not None:
        assert len(found) < tries
        found.append(Tried(budget, ssim(budget)))
    return found


def power_law(predicted: Curve, scale: float, power: float) -> Callable[[float], float]:
    return lambda budget: max(0.0, 1 - scale * float(np.exp(power * predicted.log_error(budget))))


laws = st.tuples(st.floats(0.02, 0.4), st.floats(2.0, 14.0), st.floats(0.01, 3.0), st.floats(0.25, 1.2))


@given(laws, st.floats(0.8, 0.99))
@settings(deadline=None, max_examples=300)
def test_a_power_law_is_followed_to_the_cheapest_budget_that_holds(
    law: tuple[float, float, float, float], target: float
) -> None:
    low, steepness, scale, power = law
    predicted = curve(low, steepness=steepness)
    ssim = power_law(predicted, scale, power)
    tried = walk(ssim, target, predicted)
    budgets = np.linspace(low, 0.9, 4000)
    keeps = [b for b in budgets if ssim(b) >= target]
    if not keeps:
        assert all(point.ssim < target for point in tried) and tried[-1].budget <= 0.9
        return
    best = tried[best_of(tried, target)]
    assert best.ssim >= target
    # The aim leaves a tenth of the loss, which costs this much at most on a curve as flat as this; then the last step.
    allowed = np.log(1 / 0.9) / power / steepness
    assert best.budget <= keeps[0] + allowed + 0.2 * (0.9 - low)


@given(laws, st.floats(0.85, 0.97))
@settings(deadline=None, max_examples=100)
def test_on_the_whole_little_is_given_away(law: tuple[float, float, float, float], target: float) -> None:
    """With eight tries instead of four nothing is worse, and what is found is near the best."""
    low, steepness, scale, power = law
    predicted = curve(low, steepness=steepness)
    ssim = power_law(predicted, scale, power)
    few, many = (walk(ssim, target, predicted, tries) for tries in (4, 8))
    if ssim(few[best_of(few, target)].budget) >= target:
        found = many[best_of(many, target)]
        assert found.ssim >= target and found.budget <= few[best_of(few, target)].budget + 1e-12


@given(st.integers(0, 10**6), laws, st.floats(0.5, 1.0), st.floats(0.0, 0.05), st.integers(1, 7))
@settings(deadline=None, max_examples=300)
def test_whatever_the_clips_say(
    seed: int, law: tuple[float, float, float, float], target: float, noise: float, tries: int
) -> None:
    """Noise on every clip: budgets stay on the curve, no one is tried twice, and the best one was tried."""
    low, steepness, scale, power = law
    predicted, random = curve(low, steepness=steepness), np.random.default_rng(seed)
    law_of = power_law(predicted, scale, power)
    tried = walk(lambda b: float(np.clip(law_of(b) + noise * random.normal(), 0, 1)), target, predicted, tries)
    budgets = [point.budget for point in tried]
    assert 1 <= len(tried) <= tries and len(set(budgets)) == len(budgets)
    assert all(predicted.budgets[0] <= b <= predicted.budgets[-1] for b in budgets)
    best = tried[best_of(tried, target)]
    holding = [point for point in tried if point.ssim >= target]
    if holding:
        assert best.ssim >= target and best.budget == min(point.budget for point in holding)
    else:
        assert best.ssim == max(point.ssim for point in tried)
        # It gave up for want of tries, or because the dearest plan there is fails, too.
        assert len(tried) == tries or max(budgets) == predicted.budgets[-1]


@given(laws, st.floats(0.12, 0.88))
@settings(deadline=None, max_examples=200)
def test_a_cliff_is_found_from_both_sides(law: tuple[float, float, float, float], edge: float) -> None:
    """Clips that are equal above a budget and broken below say nothing of how near it is."""
    predicted = curve(0.1, steepness=law[1])
    tried = walk(lambda b: 1.0 if b >= edge else 0.3, 0.95, predicted, tries=12)
    best = tried[best_of(tried, 0.95)]
    failing = [point.budget for point in tried if point.budget < edge]
    assert best.budget >= edge and best.ssim == 1.0
    assert best.budget - max(failing, default=0.1) <= max(2 * GAP, 0.3) * best.budget


def test_the_ends() -> None:
    predicted = curve()
    low, high = (float(predicted.budgets[i]) for i in (0, -1))
    everything = walk(lambda b: 1.0, 0.95, predicted)
    assert everything[best_of(everything, 0.95)].budget == low
    nothing = walk(lambda b: 0.2, 0.95, predicted)
    assert nothing[-1].budget == high and len(nothing) <= TRIES
    exact = walk(lambda b: 1 - 1e-4 * (1 - b), 1.0, predicted)
    assert exact[-1].budget == high, "only dense attention keeps a target of 1"
    (alone,) = walk(lambda b: 0.2, 0.95, Curve(np.array([0.97]), np.array([0.1]), np.array([0.9])))
    assert alone.budget == 0.97
    assert [point.budget for point in walk(lambda b: 0.94, 0.95, predicted, tries=1)] == [0.4]


def test_a_model_without_errors_is_walked_too() -> None:
    predicted = Curve(np.array([0.1, 0.3, 0.9]), np.zeros(3), np.array([0.1, 0.3, 0.9]))
    assert walk(lambda b: 1.0, 0.95, predicted)[-1].budget == 0.1
    for ssim in (0.1, 0.949):
        assert walk(lambda b, s=ssim: s, 0.95, predicted)[-1].budget == 0.9  # type: ignore[misc]


def test_the_nearest_counts_where_nothing_holds() -> None:
    tried = [Tried(0.4, 0.8), Tried(0.9, 0.93), Tried(0.7, 0.93), Tried(0.8, 0.92)]
    assert best_of(tried, 0.95) == 2
    assert best_of(tried, 0.75) == 0


def test_a_curve_runs_down() -> None:
    rising = np.array([0.1, 0.2])
    for budgets, errors in ((rising[::-1], rising), (rising, rising), (rising, rising[:1]), (rising[:0], rising[:0])):
        with pytest.raises(ValueError, match="curve"):
            Curve(budgets, errors, budgets)


@pytest.mark.parametrize(
    ("densities", "first"),
    [
        ([0.1, 0.3, 0.5, 0.9], 0.25),  # half-way between two budgets
        ([0.4, 0.5, 0.6, 0.9], 0.1),
        ([0.6, 0.7, 0.8, 0.9], 0.1),
        ([0.05, 0.1, 0.2, 0.3], 0.8),  # a machine on which little is bought by the largest budget
        ([0.5, 0.3, 0.5, 0.9], 0.1),  # a plan with more dense steps may buy less: the least budget counts
    ],
)
def test_the_walk_begins_where_a_density_is_bought(densities: list[float], first: float) -> None:
    budgets = np.array([0.1, 0.2, 0.3, 0.8])
    assert Curve(budgets, 1 - budgets, np.array(densities)).first() == pytest.approx(first)


def test_a_curve_is_read_both_ways() -> None:
    predicted = curve()
    for budget in (0.1, 0.15, 0.4, 0.77, 0.9):
        assert predicted.budget(predicted.log_error(budget)) == pytest.approx(budget)
    assert predicted.budget(10.0) == pytest.approx(0.1) and predicted.budget(-50.0) == pytest.approx(0.9)


def test_few_steps_begin_at_a_higher_density() -> None:
    budgets = np.linspace(0.1, 0.9, 9)
    few, many = (Curve(budgets, 1 - budgets, budgets, steps).first() for steps in (8, 20))
    assert few == pytest.approx(0.5) and many == pytest.approx(0.4)


@pytest.mark.parametrize("noise", [-0.02, 0.0, 0.02])
def test_two_near_misses_do_not_send_the_last_try_far_away(noise: float) -> None:
    """Clips of the two points may differ by as much as the points: what they say of the slope is little."""
    predicted = curve()
    ssim = power_law(predicted, 0.05 * float(np.exp(-0.9 * predicted.log_error(0.6))), 0.9)
    assert ssim(0.6) == pytest.approx(0.95)
    tried = [Tried(0.43, ssim(0.43)), Tried(0.5, ssim(0.5) + noise)]
    last = next_budget(tried, 0.95, predicted, 3)
    assert last is not None and 0.6 <= last <= 0.8
