"""Fifth stage of a search for quality: a few validated points lead to the sparsest plan that keeps the target."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from diffsparse.quality import quality_line
from diffsparse.search.assign import InfeasibleBudget, lagrangian
from diffsparse.search.compose import WORTH_TRYING, Candidate, Composer
from diffsparse.search.errors import BadInput
from diffsparse.search.frontier import MOST_BUDGET, Curve, Tried, best_of, next_budget
from diffsparse.search.items import Items
from diffsparse.search.stages.compose import compose_plans
from diffsparse.search.stages.repair import mended, repaired
from diffsparse.search.stages.validate import cases, held_out, tried_plan, validate
from diffsparse.search.workspace import Workspace

__all__ = ["error_curve", "search_target"]

#: Budgets at which the error is predicted; between them it is interpolated.
CURVE_POINTS = 16


@dataclass(frozen=True, eq=False)
class _Point:
    """A plan that was validated at a budget, and what was measured."""

    budget: float
    candidate: Candidate
    quality: dict[str, Any]

    @property
    def tried(self) -> Tried:
        return Tried(self.budget, self.quality["ssim_worst"])

    def to_dict(self) -> dict[str, float]:
        """``clips``: of validation; a plan that misses the target on one is tried on no further ones."""
        return {
            "budget": self.budget,
            "density": self.candidate.plan.record["search"]["trajectory_density"],
            "clips": self.quality["prompts"],
            "ssim_worst": self.quality["ssim_worst"],
            "loop_speedup": self.quality["loop_speedup"],
        }


def search_target(work: Workspace, composer: Composer) -> tuple[Candidate, dict[str, Any]]:
    """The sparsest plan whose every clip of validation keeps the target, with its repair, and its ``quality``.

    The nearest one that was tried where none keeps it. Raises :class:`BadInput` where no plan is cheaper than dense.
    """
    goal = work.config.goal
    assert goal is not None
    curve = error_curve(composer)
    points: list[_Point] = []
    while (budget := next_budget([p.tried for p in points], goal, curve, work.config.tries)) is not None:
        # Where the first plan does not gain by its repair, the others get none.
        fit = work.config.fits_repair and (not points or points[0].candidate.plan.repair is not None)
        points.append(_validated(work, composer, budget, fit, compare=not points))
        work.say(f"point {len(points)}: {_told(points[-1], goal)}")
    chosen = _best(work, points, goal)
    plan, reached = chosen.candidate.plan, chosen.tried.ssim >= goal
    quality = chosen.quality | {
        "target": goal,
        "reached": reached,
        "density": plan.record["search"]["trajectory_density"],
        "held_out": bool(held_out(work)),
    }
    plan.record["search"] |= {"target": goal, "points": [point.to_dict() for point in points]}
    work.say(str(quality_line({"quality": quality})))
    if not reached:
        dearest = max(point.budget for point in points)
        what = "even one" if dearest >= float(curve.budgets[-1]) else "one"
        work.say(
            f"nothing sparse that was tried keeps the target, {what} at a budget of {dearest:g}: the nearest is kept; "
            "ask for a lower --target, try more --points, or leave the model dense"
        )
    return chosen.candidate, quality


def _best(work: Workspace, points: list[_Point], goal: float) -> _Point:
    """The best of the points, validated on every clip; one that missed the target was not validated further."""
    while (point := points[(at := best_of([p.tried for p in points], goal))]).quality["prompts"] < len(cases(work)):
        points[at] = replace(point, quality=validate(work, [point.candidate])[1])
    return point


def _told(point: _Point, goal: float) -> str:
    found = point.to_dict()
    verb = "keeps" if found["ssim_worst"] >= goal else "misses"
    return (
        f"budget {found['budget']:g}, density {found['density']:.3f}: worst SSIM {found['ssim_worst']:.4f} {verb} "
        f"the target of {goal:g}, loop {found['loop_speedup']:.3g}x"
    )


def _validated(work: Workspace, composer: Composer, budget: float, fit: bool, compare: bool) -> _Point:
    """``fit``: with a repair. ``compare``: with and without it, on all clips."""
    config = composer.at(budget).config
    candidates, goal = compose_plans(work, composer.at(budget), work.config.tried_plans), work.config.goal
    if not fit:
        chosen, quality = validate(work, candidates, goal)
        base = chosen
    elif len(candidates) > 1 or compare:
        base, quality = validate(work, candidates)
        chosen, quality = mended(work, base, quality)
    else:
        base = candidates[0]
        chosen = replace(base, plan=repaired(work, base.plan))
        _, quality = validate(work, [chosen], goal)
    work.put_tried(tried_plan(chosen, base, config))
    return _Point(budget, chosen, quality)


def error_curve(composer: Composer) -> Curve:
    """What is predicted of the best plan with one phase, from the least budget there is to the most that is tried.

    Raises :class:`BadInput` where the least is dense attention's own time.
    """
    least, dense_steps = composer.least(), composer.config.dense_steps
    if least > 1 - 1e-9:
        why = "".join(f" ({reason})" for reason in sorted(composer.pricing.reasons))
        steps = f" with {dense_steps} dense steps; ask for fewer, or" if dense_steps else ";"
        raise BadInput(f"no plan is cheaper than dense attention on this model{why}{steps} leave it dense")
    least = min(math.ceil(least * 1000 + 1e-6) / 1000, 1.0)
    most = max(MOST_BUDGET, least)
    budgets = np.unique(np.geomspace(least, most, CURVE_POINTS))
    errors, densities = np.full(len(budgets), np.inf), np.ones(len(budgets))
    for dense in range(composer.steps) if dense_steps is None else [dense_steps]:
        rooms = [composer.at(float(b)).room(list(range(dense))) for b in budgets]
        if rooms[-1] <= 0:
            break
        items = composer.items(composer.trial(dense, 1))
        found, kept = np.full(len(budgets), np.inf), np.ones(len(budgets))
        for i, room in enumerate(rooms):
            try:
                best = lagrangian(items.errors, items.prices, room) if room > 0 else None
            except InfeasibleBudget:
                continue
            if best is not None:
                found[i], kept[i] = best.error, _density(composer, dense, items, best.choice)
        # With more steps dense, and less for the others, it is not worth trying anywhere.
        if not (found <= 4 * WORTH_TRYING * errors).any():
            break
        errors, densities = np.minimum(errors, found), np.where(found < errors, kept, densities)
    if not np.isfinite(errors).all():
        raise BadInput(f"no plan at a budget of {budgets[int(np.argmax(~np.isfinite(errors)))]:.3f} can be made")
    return Curve(budgets, np.minimum.accumulate(errors), densities, composer.steps)


def _density(composer: Composer, dense: int, items: Items, choice: np.ndarray) -> float:
    """About what the options make of the whole trajectory: without tails, text and what is used again."""
    work = np.array(items.whole)
    kept = np.array([options[int(i)].density for options, i in zip(items.options, choice, strict=True)])
    share = composer.attention(slice(dense)) / composer.attention()
    return float(share + (1 - share) * (kept * work).sum() / work.sum())
