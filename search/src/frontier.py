"""The walk along the frontier: which budgets are tried on the way to the cheapest plan that keeps a target.

Nothing is generated here. A point is a plan that was validated at a budget; what the next one may cost follows from the
points before it and from the error that the measurements predict at every budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["FIRST_DENSITY", "MOST_BUDGET", "Curve", "Tried", "best_of", "next_budget"]

#: Tried first is the budget that buys a plan of this density. A clip keeps what its density keeps, while a budget buys
#: more or less of it on each machine. Plans at it were near enough to dense to say something of cheaper ones, and
#: cheap enough to be kept.
FIRST_DENSITY = 0.4
#: The same of generations of at most so many steps, in which each step counts for more.
FEW_STEPS, FEW_STEPS_DENSITY = 12, 0.5
#: A plan that takes more of the dense attention's time than this is not worth its name, so none is tried.
MOST_BUDGET = 0.9
#: What a clip loses, 1 - SSIM, goes with this power of the predicted error until two points say more. On
#: examples/tiny_wan (8 steps) it went with 0.94 from a budget of 0.4 to 0.188, and with 0.84 from there to 0.082.
POWER = 0.9
#: How far from it a power may well be, and how far off the line the logarithm of a clip's loss may: with these, two
#: points that are near each other say little of the power, and two far apart say it.
POWER_SPREAD, LOSS_SPREAD = 0.3, 0.15
#: Powers that two points may say.
POWERS = (0.25, 1.5)
#: Budgets are chosen for this share of the loss that is allowed: one that misses by a hair is a try for nothing.
AIM = 0.9
#: The same for the last try while nothing holds: it must not miss.
LAST_AIM = 0.7
#: Budgets that are nearer to each other than this share are not worth a further try.
GAP = 0.04
#: Of what lies between a budget that fails and one that holds, a try leaves at least this share on either side.
EDGE = 0.15
#: Losses below it are equal clips, to the last bits.
_LEAST_LOSS = 1e-6


@dataclass(frozen=True)
class Tried:
    """A validated point: its budget, and the SSIM of the worst clip."""

    budget: float
    ssim: float


@dataclass(frozen=True, eq=False)
class Curve:
    """What is predicted of the best plan at each budget: float ``[points]`` each.

    Budgets rise, errors do not. ``densities``: of the whole trajectory, about; they need not rise everywhere.
    ``steps``: of a generation.
    """

    budgets: np.ndarray
    errors: np.ndarray
    densities: np.ndarray
    steps: int = FEW_STEPS + 1

    def __post_init__(self) -> None:
        shapes = {self.budgets.shape, self.errors.shape, self.densities.shape}
        if self.budgets.ndim != 1 or len(shapes) != 1 or not len(self.budgets):
            raise ValueError("a curve needs as many errors and densities as budgets, at least one")
        if (np.diff(self.budgets) <= 0).any() or (np.diff(self.errors) > 0).any():
            raise ValueError("along a curve the budgets rise, and no error does")

    @property
    def _logs(self) -> np.ndarray:
        # Dense plans have no error at all.
        return np.log(np.maximum(self.errors, 1e-9 * max(float(self.errors[0]), 1e-290)))

    def log_error(self, budget: float) -> float:
        return float(np.interp(budget, self.budgets, self._logs))

    def budget(self, log_error: float) -> float:
        """The least budget with this error or less; the largest of all where none has."""
        logs = self._logs
        at = int(np.argmax(logs <= log_error)) if (logs <= log_error).any() else len(logs) - 1
        if at == 0 or logs[at] > log_error:
            return float(self.budgets[at])
        share = (logs[at - 1] - log_error) / (logs[at - 1] - logs[at])
        return float(self.budgets[at - 1] + share * (self.budgets[at] - self.budgets[at - 1]))

    def first(self) -> float:
        """The least budget that buys the density that is tried first; the largest of all where none does."""
        wanted = FEW_STEPS_DENSITY if self.steps <= FEW_STEPS else FIRST_DENSITY
        enough = self.densities >= wanted
        at = int(np.argmax(enough))
        if not enough.any() or at == 0:
            return float(self.budgets[at if enough.any() else -1])
        low, high = float(self.densities[at - 1]), float(self.densities[at])
        share = (wanted - low) / (high - low)
        return float(self.budgets[at - 1] + share * (self.budgets[at] - self.budgets[at - 1]))


def best_of(tried: Sequence[Tried], target: float) -> int:
    """Number of the cheapest point that keeps the target; of the one that comes nearest to it where none does."""
    holding = [i for i, point in enumerate(tried) if point.ssim >= target]
    if holding:
        return min(holding, key=lambda i: tried[i].budget)
    return max(range(len(tried)), key=lambda i: (tried[i].ssim, -tried[i].budget))


def next_budget(tried: Sequence[Tried], target: float, curve: Curve, tries: int) -> float | None:
    """The budget to try next, within the curve's, or None where a further try is not worth it.

    ``tries``: how many there may be in all. Budgets are multiples of a thousandth, or the ends of the curve.
    """
    low, high = float(curve.budgets[0]), float(curve.budgets[-1])
    if len(tried) >= tries:
        return None
    if not tried:
        return _rounded(curve.first(), low, high)
    holding = [point for point in tried if point.ssim >= target]
    if not holding:
        last = max(tried, key=lambda point: point.budget)
        if last.budget >= high:
            return None
        guess = _guess(tried, last, target, curve, LAST_AIM if len(tried) == tries - 1 else AIM)
        # Nearly the same budget again would fail again.
        return _rounded(max(guess, last.budget + EDGE * (high - last.budget)), low, high)
    ceiling = min(holding, key=lambda point: point.budget)
    failing = [point for point in tried if point.budget < ceiling.budget]
    floor = max((point.budget for point in failing), default=low)
    if ceiling.budget - floor <= GAP * ceiling.budget:
        return None
    guess = _guess(tried, ceiling, target, curve, AIM)
    if guess > (1 - GAP) * ceiling.budget:
        return None
    room = EDGE * (ceiling.budget - floor)
    # The least budget of all may be tried itself; one that has failed may not.
    return _rounded(min(max(guess, floor + room if failing else low), ceiling.budget - room), low, high)


def _rounded(budget: float, low: float, high: float) -> float:
    return min(max(round(budget, 3), low), high)


def _loss(ssim: float) -> float:
    return float(np.log(max(1 - ssim, _LEAST_LOSS)))


def _guess(tried: Sequence[Tried], start: Tried, target: float, curve: Curve, aim: float) -> float:
    """The budget whose worst clip should lose ``aim`` times what it may, seen from a point."""
    wanted = float(np.log(max(aim * (1 - target), _LEAST_LOSS)))
    x, y, power = curve.log_error(start.budget), _loss(start.ssim), POWER
    others = [p for p in tried if p is not start and abs(curve.log_error(p.budget) - x) > 1e-9]
    if across := [p for p in others if (p.ssim >= target) != (start.ssim >= target)]:
        # Between the two: whatever the noise, the target lies there.
        other = min(across, key=lambda p: abs(p.budget - start.budget))
        power = (_loss(other.ssim) - y) / (curve.log_error(other.budget) - x)
    elif others:
        # Beyond all of them: as the line that is likeliest, of which the power is known beforehand, about.
        xs = np.array([x, *(curve.log_error(p.budget) for p in others)])
        ys = np.array([y, *(_loss(p.ssim) for p in others)])
        away = xs - xs.mean()
        trust = (LOSS_SPREAD / POWER_SPREAD) ** 2
        power = float((away @ ys + trust * POWER) / (away @ away + trust))
        y = float(ys.mean() + power * (x - xs.mean()))
    return curve.budget(x + (wanted - y) / float(np.clip(power, *POWERS)))
