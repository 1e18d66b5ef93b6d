"""One global multiple-choice knapsack: exactly one option per item, least error within a budget of cost."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import coo_matrix

__all__ = ["Assignment", "InfeasibleBudget", "assign", "assign_within", "lagrangian", "most_held"]


class InfeasibleBudget(ValueError):
    """Even the cheapest options cost more than the budget."""


@dataclass(frozen=True)
class Assignment:
    """``choice``: the option of each item. ``error``, ``cost``: their sums. ``bound``: no assignment has less error."""

    choice: np.ndarray
    error: float
    cost: float
    bound: float


def _check(errors: list[np.ndarray], costs: list[np.ndarray], budget: float) -> None:
    for error, cost in zip(errors, costs, strict=True):
        if error.shape != cost.shape or error.ndim != 1 or len(error) == 0:
            raise ValueError("every item needs as many errors as costs, at least one")
        if not (np.isfinite(error).all() and np.isfinite(cost).all()):
            raise ValueError("errors and costs must be finite")
    least = sum(float(c.min()) for c in costs)
    if least > budget * (1 + 1e-9):
        raise InfeasibleBudget(f"the cheapest assignment costs {least:.6g}, the budget is {budget:.6g}")


def lagrangian(errors: list[np.ndarray], costs: list[np.ndarray], budget: float, iterations: int = 60) -> Assignment:
    """Within a few hundredths of a percent of the best on large problems, in milliseconds, with a bound beside it.

    Bisects the price of cost; at each price every item takes its best option by itself.
    """
    _check(errors, costs, budget)
    width = max(len(e) for e in errors)
    error = np.full((len(errors), width), np.inf)
    cost = np.zeros((len(errors), width))  # finite: a price of zero times infinity would be NaN
    for i, (e, c) in enumerate(zip(errors, costs, strict=True)):
        error[i, : len(e)], cost[i, : len(c)] = e, c
    rows = np.arange(len(errors))

    def at(price: float) -> tuple[np.ndarray, float, float]:
        # Equal prices go to the cheaper option, so that a high enough price always fits the budget.
        total = error + price * cost
        best = total.min(1, keepdims=True)
        tied = np.where(total <= best + 1e-12 * np.abs(best), cost, np.inf)
        choice = tied.argmin(1)
        return choice, float(error[rows, choice].sum()), float(cost[rows, choice].sum())

    choice, total_error, total_cost = at(0.0)
    bound = total_error
    if total_cost > budget:
        real = np.where(np.isfinite(error), cost, np.inf)
        cheapest = np.where(real == real.min(1, keepdims=True), error, np.inf).argmin(1)
        choice, total_error = cheapest, float(error[rows, cheapest].sum())
        total_cost = float(cost[rows, cheapest].sum())
        high = max(float(error[np.isfinite(error)].max()), 1e-300) / max(budget, 1e-12)
        while at(high)[2] > budget and high < 1e300:
            high *= 16
        # Useful prices span many orders of magnitude, so the bisection is geometric.
        low = high * 1e-24
        for _ in range(iterations):
            price = (low * high) ** 0.5
            candidate, candidate_error, candidate_cost = at(price)
            bound = max(bound, candidate_error + price * (candidate_cost - budget))
            if candidate_cost <= budget:
                high = price
                if candidate_error < total_error:
                    choice, total_error, total_cost = candidate, candidate_error, candidate_cost
            else:
                low = price
    return Assignment(choice, total_error, total_cost, min(bound, total_error))


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """What compiled code prints goes to stderr: our stdout may have to be one JSON object."""
    c_library = ctypes.CDLL(None) if os.name == "posix" else None
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        if c_library is not None:  # its buffer would be written later, to the stdout that is put back now
            c_library.fflush(None)
        os.dup2(saved, 1)
        os.close(saved)


def assign(errors: list[np.ndarray], costs: list[np.ndarray], budget: float, time_limit: float = 60.0) -> Assignment:
    """The best assignment by mixed-integer programming (HiGHS), to a gap of 1e-4; the Lagrangian one if that is better.

    ``errors``, ``costs``: per item, float ``[options]``. Raises :class:`InfeasibleBudget`.
    """
    quick = lagrangian(errors, costs, budget)
    sizes = np.array([len(e) for e in errors])
    first = np.concatenate([[0], np.cumsum(sizes)])
    flat_error, flat_cost = np.concatenate(errors), np.concatenate(costs)
    n = len(flat_error)
    item = np.repeat(np.arange(len(errors)), sizes)
    one_each = coo_matrix((np.ones(n), (item, np.arange(n))), shape=(len(errors), n)).tocsr()
    scale = max(float(flat_error.max()), 1e-300)
    with _stdout_to_stderr():
        result = milp(
            flat_error / scale,
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(flat_cost[None] / max(budget, 1e-12), -np.inf, 1),
            ],
            integrality=np.ones(n),
            bounds=(0, 1),
            # Presolve gains nothing here, and some versions of HiGHS print from it.
            options={"mip_rel_gap": 1e-4, "time_limit": time_limit, "presolve": False},
        )
    if result.x is None:
        return quick
    choice = np.array([int(result.x[a:b].argmax()) for a, b in zip(first[:-1], first[1:], strict=True)])
    error, cost = float(flat_error[first[:-1] + choice].sum()), float(flat_cost[first[:-1] + choice].sum())
    bound = max(quick.bound, float(result.mip_dual_bound or 0.0) * scale)
    if cost > budget * (1 + 1e-9) or error > quick.error:
        choice, error, cost = quick.choice, quick.error, quick.cost
    return Assignment(choice, error, cost, min(bound, error))


def most_held(sizes: list[np.ndarray], choice: np.ndarray, groups: int) -> float:
    """Bytes of the chosen options in the group that has most. Items go through the groups in turn."""
    held = np.array([size[i] for size, i in zip(sizes, choice, strict=True)])
    return float(held.reshape(-1, groups).sum(0).max())


def assign_within(
    errors: list[np.ndarray],
    costs: list[np.ndarray],
    budget: float,
    sizes: list[np.ndarray],
    groups: int,
    memory: float,
) -> Assignment | None:
    """:func:`assign` where the options of no group hold more than ``memory`` bytes; None where none was found.

    ``sizes``: bytes of each option, as :func:`most_held` counts them. Memory gets a price of its own, the lowest at
    which what is held fits: a Lagrangian relaxation.
    """
    free = assign(errors, costs, budget)

    def fits(found: Assignment) -> bool:
        return most_held(sizes, found.choice, groups) <= memory

    if fits(free):
        return free

    def at(price: float, solve: Callable[..., Assignment]) -> Assignment:
        found = solve([e + price * size for e, size in zip(errors, sizes, strict=True)], costs, budget)
        error = sum(float(e[i]) for e, i in zip(errors, found.choice, strict=True))
        return replace(found, error=error, bound=free.bound)

    high = max(free.error, 1e-300) / max(memory, 1.0)
    for _ in range(60):
        if fits(at(high, lagrangian)):
            break
        high *= 8
    low = high * 1e-12
    for _ in range(30):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if fits(at(middle, lagrangian)) else (middle, high)
    for _ in range(8):
        if fits(found := at(high, assign)):
            return found
        high *= 1.3
    return None
