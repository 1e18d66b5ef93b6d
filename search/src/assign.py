"""One global multiple-choice knapsack: exactly one option per item, least error within a budget of cost."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import coo_matrix

__all__ = ["Assignment", "InfeasibleBudget", "assign", "assign_within", "lagrangian", "most_held"]

#: An assignment whose error is above the least by this share at most is as good as the best: errors are known to a few
#: percent, and where many heads are alike a closer one takes minutes.
GAP = 1e-3
#: Nodes of the search tree at most. Unlike a time, it gives the same assignment on every machine.
MOST_NODES = 1000
#: How many prices are tried; each halves the ways that are left, or more.
MOST_PRICES = 60


class InfeasibleBudget(ValueError):
    """Even the cheapest options cost more than the budget."""


@dataclass(frozen=True)
class Assignment:
    """``choice``: the option of each item. ``error``, ``cost``: their sums. ``bound``: no assignment has less error."""

    choice: np.ndarray
    error: float
    cost: float
    bound: float


@dataclass(frozen=True, eq=False)
class _Items:
    """Errors and costs, ``[items, options]`` each; where an item has fewer options the rest has an infinite error."""

    error: np.ndarray
    cost: np.ndarray

    @classmethod
    def of(cls, errors: list[np.ndarray], costs: list[np.ndarray]) -> _Items:
        for error, cost in zip(errors, costs, strict=True):
            if error.shape != cost.shape or error.ndim != 1 or len(error) == 0:
                raise ValueError("every item needs as many errors as costs, at least one")
        # Costs are finite everywhere: a price of zero times infinity would be NaN.
        found = cls(_padded(errors, np.inf), _padded(costs, 0.0))
        if not (np.isfinite(np.concatenate(errors)).all() and np.isfinite(found.cost).all()):
            raise ValueError("errors and costs must be finite")
        return found

    def check(self, budget: float) -> None:
        least = float(np.where(np.isfinite(self.error), self.cost, np.inf).min(1).sum())
        if least > budget * (1 + 1e-9):
            raise InfeasibleBudget(f"the cheapest assignment costs {least:.6g}, the budget is {budget:.6g}")

    def told(self, choice: np.ndarray, bound: float = -np.inf) -> Assignment:
        rows = np.arange(len(choice))
        return Assignment(choice, float(self.error[rows, choice].sum()), float(self.cost[rows, choice].sum()), bound)

    def at(self, price: float) -> Assignment:
        """Every item's best option where cost has a price. Its bound is that of all assignments at no budget."""
        # Equal prices go to the cheaper option, so that a high enough price always fits the budget.
        total = self.error + price * self.cost
        best = total.min(1, keepdims=True)
        return self.told(np.where(total <= best + 1e-12 * np.abs(best), self.cost, np.inf).argmin(1))

    def cheapest(self) -> Assignment:
        real = np.where(np.isfinite(self.error), self.cost, np.inf)
        return self.told(np.where(real == real.min(1, keepdims=True), self.error, np.inf).argmin(1))

    def solve(self, budget: float) -> tuple[Assignment, float]:
        """:func:`lagrangian`, and the price of cost at which its bound was found."""
        self.check(budget)
        over = self.at(0.0)
        if over.cost <= budget:
            return replace(over, bound=over.error), 0.0
        within, bound, at = self.cheapest(), over.error, 0.0
        for _ in range(MOST_PRICES):
            # Where both are as good, another one may be better; where none is, no price tells more.
            price = (within.error - over.error) / max(over.cost - within.cost, 1e-300)
            if not 0 < price < np.inf:
                break
            found = self.at(price)
            if (below := found.error + price * (found.cost - budget)) > bound:
                bound, at = below, price
            gain = (within.error + price * within.cost) - (found.error + price * found.cost)
            if found.cost > budget:
                over = found
            elif found.error < within.error:
                within = found
            if gain <= 1e-12 * abs(within.error + price * within.cost):
                break
        return self._filled(within, over, budget, bound), at

    def _filled(self, within: Assignment, over: Assignment, budget: float, bound: float) -> Assignment:
        """What the one leaves of the budget goes to options of the other, which are as good at the last price."""
        rows = np.arange(len(within.choice))
        more = self.cost[rows, over.choice] - self.cost[rows, within.choice]
        gain = self.error[rows, within.choice] - self.error[rows, over.choice]
        choice, left = within.choice.copy(), budget - within.cost
        for item in sorted(np.flatnonzero((more > 0) & (gain > 0)).tolist(), key=lambda i: -gain[i]):
            if more[item] <= left:
                choice[item], left = over.choice[item], left - float(more[item])
        found = self.told(choice)
        best = found if found.error < within.error and found.cost <= budget else within
        return replace(best, bound=min(bound, best.error))

    def worth_trying(self, budget: float, price: float, error: float) -> np.ndarray:
        """Which options an assignment of less than this ``error`` may have: bool ``[items, options]``.

        By how much each one raises the bound at a price of cost.
        """
        total = self.error + price * self.cost
        least = total.min(1, keepdims=True)
        return np.asarray(float(least.sum()) - price * budget + (total - least) <= error * (1 + 1e-9))


def _padded(rows: list[np.ndarray], rest: float) -> np.ndarray:
    sizes = np.array([len(row) for row in rows])
    found = np.full((len(rows), int(sizes.max())), rest)
    found[np.arange(found.shape[1]) < sizes[:, None]] = np.concatenate(rows)
    return found


def lagrangian(errors: list[np.ndarray], costs: list[np.ndarray], budget: float) -> Assignment:
    """Within a few hundredths of a percent of the best on large problems, in milliseconds, with a bound beside it.

    At each price of cost every item takes its best option by itself. Two prices lead to the next one, at which the
    assignments at both are as good as each other (Kelley's cutting planes in one dimension).
    """
    return _Items.of(errors, costs).solve(budget)[0]


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
    """The best assignment by mixed-integer programming (HiGHS), to :data:`GAP`; the Lagrangian one if that is better.

    ``errors``, ``costs``: per item, float ``[options]``. Raises :class:`InfeasibleBudget`.
    """
    every = _Items.of(errors, costs)
    quick, price = every.solve(budget)
    if quick.error - quick.bound <= GAP * quick.error:  # as near as the other one would have to come
        return quick
    # Of a large problem that leaves few options.
    kept = every.worth_trying(budget, price, quick.error)
    sizes = kept.sum(1)
    first = np.concatenate([[0], np.cumsum(sizes)])
    flat_error, flat_cost, place = every.error[kept], every.cost[kept], np.nonzero(kept)[1]
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
            options={"mip_rel_gap": GAP, "time_limit": time_limit, "node_limit": MOST_NODES, "presolve": False},
        )
    if result.x is None:
        return quick
    chosen = [int(result.x[a:b].argmax()) + a for a, b in zip(first[:-1], first[1:], strict=True)]
    found = every.told(place[chosen])
    best = quick if found.cost > budget * (1 + 1e-9) or found.error > quick.error else found
    bound = max(quick.bound, float(result.mip_dual_bound or 0.0) * scale)
    return replace(best, bound=min(bound, best.error))


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
    every, held = _Items.of(errors, costs), _padded(sizes, 0.0)

    def at(price: float) -> Assignment:
        return replace(every, error=every.error + price * held).solve(budget)[0]

    def best(price: float) -> Assignment:
        found = assign([e + price * size for e, size in zip(errors, sizes, strict=True)], costs, budget)
        return replace(every.told(found.choice), bound=free.bound)

    high = max(free.error, 1e-300) / max(memory, 1.0)
    for _ in range(60):
        if fits(at(high)):
            break
        high *= 8
    low = high * 1e-12
    for _ in range(30):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if fits(at(middle)) else (middle, high)
    for _ in range(8):
        if fits(found := best(high)):
            return found
        high *= 1.3
    return None
