import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffsparse.search.assign import InfeasibleBudget, assign, lagrangian

items = st.lists(
    st.lists(st.tuples(st.floats(0, 10), st.floats(0.01, 5)), min_size=1, max_size=4), min_size=1, max_size=5
)


def split(problem):
    return [np.array([e for e, _ in item]) for item in problem], [np.array([c for _, c in item]) for item in problem]


def brute_force(errors, costs, budget):
    best = np.inf
    for choice in itertools.product(*(range(len(e)) for e in errors)):
        if sum(c[i] for c, i in zip(costs, choice, strict=True)) <= budget:
            best = min(best, sum(e[i] for e, i in zip(errors, choice, strict=True)))
    return best


@given(items, st.floats(0.3, 1.0))
@settings(max_examples=100, deadline=None)
def test_the_assignment_is_the_brute_force_optimum(problem, share):
    errors, costs = split(problem)
    low, high = sum(c.min() for c in costs), sum(c.max() for c in costs)
    budget = low + share * (high - low)
    found = assign(errors, costs, budget)
    best = brute_force(errors, costs, budget)
    assert found.cost <= budget * (1 + 1e-6)
    assert found.error <= best * (1 + 1e-3) + 1e-6
    assert found.bound <= best * (1 + 1e-6) + 1e-9
    assert found.error == pytest.approx(sum(e[i] for e, i in zip(errors, found.choice, strict=True)))


@given(items, st.floats(0.3, 1.0))
@settings(max_examples=100, deadline=None)
def test_the_lagrangian_keeps_the_budget_and_its_bound_holds(problem, share):
    errors, costs = split(problem)
    low, high = sum(c.min() for c in costs), sum(c.max() for c in costs)
    budget = low + share * (high - low)
    found = lagrangian(errors, costs, budget)
    assert found.cost <= budget * (1 + 1e-9)
    assert found.bound <= brute_force(errors, costs, budget) + 1e-6


def test_large_problems_come_close_to_the_bound():
    rng = np.random.default_rng(0)
    costs = [np.sort(rng.random(12)) for _ in range(400)]
    errors = [np.sort(rng.random(12) ** 3)[::-1].copy() for _ in range(400)]
    found = lagrangian(errors, costs, 100.0)
    assert found.cost <= 100
    assert found.error <= found.bound * 1.01


def test_a_budget_below_the_cheapest_is_named():
    with pytest.raises(InfeasibleBudget, match="costs 3, the budget is 2"):
        assign([np.zeros(1)] * 3, [np.ones(1)] * 3, 2.0)


def test_bad_tables_are_refused():
    with pytest.raises(ValueError, match="as many errors as costs"):
        lagrangian([np.zeros(2)], [np.zeros(3)], 1.0)
    with pytest.raises(ValueError, match="finite"):
        lagrangian([np.array([np.nan])], [np.zeros(1)], 1.0)


def test_many_items_alike_are_not_told_apart_by_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model whose heads are alike a closer assignment than this takes minutes, and gains a few 1e-4."""
    import diffsparse.search.assign as module

    monkeypatch.setattr(module, "milp", lambda *_, **__: pytest.fail("searched"))
    rng = np.random.default_rng(0)
    cost = np.linspace(0.05, 1, 40)
    alike = np.exp(rng.normal(0, 0.02, (1080, 1))) * (1 - cost) ** 2
    costs = [cost * (10, 20, 17)[i % 3] for i in range(1080)]
    found = assign(list(alike), costs, 0.3 * sum(c[-1] for c in costs))
    assert found.error <= (1 + module.GAP) * found.bound


def test_what_the_solver_prints_does_not_reach_stdout(monkeypatch, capfd):
    """HiGHS prints a line of its own from time to time, and stdout may have to be one JSON object."""
    import ctypes

    import diffsparse.search.assign as module

    solve = module.milp

    def chatty(*args, **kwargs):
        ctypes.CDLL(None).puts(b"from compiled code")
        return solve(*args, **kwargs)

    monkeypatch.setattr(module, "milp", chatty)
    print("before")
    # What the better price takes leaves no room for the better choice.
    found = assign([np.array([1.0, 0.0]), np.array([1.5, 0.0])], [np.array([0.0, 1.0]), np.array([0.0, 2.0])], 2.0)
    assert found.choice.tolist() == [0, 1]
    print("after")
    ctypes.CDLL(None).fflush(None)
    out, err = capfd.readouterr()
    assert out == "before\nafter\n"
    assert "from compiled code" in err
