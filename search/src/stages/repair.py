"""Last stage: what the chosen plan's heads get wrong is fitted, on the traced prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from diffsparse.pipelines import tap_attention
from diffsparse.plan import SparsityPlan
from diffsparse.repair import Repair
from diffsparse.search.compose import Candidate
from diffsparse.search.measured import plan_digest
from diffsparse.search.observe import call_levels, final_latents, watched_updates
from diffsparse.search.repair import ErrorSums, RepairTap, add_sums, fit_repair
from diffsparse.search.sharing import share
from diffsparse.search.stages.validate import validate
from diffsparse.search.stored_search import StoredSearch
from diffsparse.search.workspace import Workspace

__all__ = ["NOISE_DB", "better_with_repair", "mended", "repaired", "with_repair"]

#: Two plans whose clips are no further apart in PSNR, in dB, cannot be told from each other by a few clips.
NOISE_DB = 0.5
#: Generations that a repair may be fitted on, by their steps over those that are traced; then as long as any.
LENGTHS = (1.0, 1.5, 2.0, 3.0)


def mended(work: Workspace, chosen: Candidate, quality: dict[str, Any]) -> tuple[Candidate, dict[str, Any]]:
    """The candidate with its repair, unless that is plainly worse on the clips of validation, and its quality.

    The repair was not fitted on them. A few tenths of a dB say nothing: what one clip gains, another one may lose.
    """
    found = replace(chosen, plan=repaired(work, chosen.plan))
    if found.plan.repair is None:
        return found, quality
    return better_with_repair(work, chosen, quality, found, validate(work, [found])[1])


def better_with_repair(
    stored: StoredSearch, chosen: Candidate, quality: dict[str, Any], found: Candidate, about: dict[str, Any]
) -> tuple[Candidate, dict[str, Any]]:
    """The better one of a plan and the same with its repair, and what validation says of it."""
    after, before = (each["psnr_mean"] for each in (about, quality))
    if after < before - NOISE_DB:
        stored.say(f"the repair is left out: the PSNR to dense is {before:.2f} dB without it, {after:.2f} dB with it")
        return chosen, quality
    stored.say(f"PSNR to dense {before:.2f} dB without the repair, {after:.2f} dB with it")
    return found, about | {"psnr_without_repair": before, "psnr_by_dense_steps": quality["psnr_by_dense_steps"]}


def repaired(work: Workspace, plan: SparsityPlan) -> SparsityPlan:
    """The plan with its repair, fitted on generations of the traced prompts that run with the plan.

    The plan as it is where no head gains by one.
    """
    digest = plan_digest(plan)
    if (known := work.repair(digest)) is None:
        known = _fit(work, plan, digest)
        work.put_repair(digest, known)
    return with_repair(work, plan, *known)


def with_repair(stored: StoredSearch, plan: SparsityPlan, arrays: dict[str, np.ndarray], left: float) -> SparsityPlan:
    """The plan with a repair that was fitted for it. ``left``: the share of the error that it leaves."""
    if not arrays:
        return plan
    found = Repair(**arrays)
    stored.say(f"repair: {found.num_heads} heads, {left:.0%} of their squared error is left")
    return replace(plan, repair=found)


def _fit(work: Workspace, plan: SparsityPlan, digest: str) -> tuple[dict[str, np.ndarray], float]:
    config, prompts = work.config, work.traced()
    # The two halves of cross-validation are of different prompts, or of different noise where there is one prompt.
    runs = [(p, config.seed + p) for p in prompts]
    runs += [(prompts[0], config.seed + 1)] if len(runs) == 1 else []
    places = [(i, i * 2 // len(runs), prompt, seed) for i, (prompt, seed) in enumerate(runs)]
    # Sums of a run by itself, added in the order of the runs: so they are the same whoever makes them.
    sums: dict[tuple[int, str], ErrorSums] = {}
    if (apart := work.apart) is None:
        for _, found in _error_sums(work, places, plan):
            add_sums(sums, found)
    else:
        missing = [place for place in places if not apart.has_errors(digest, place[0])]
        share(work, _store_sums, missing, plan, digest)
        for i, *_ in places:
            add_sums(sums, apart.errors(digest, i))
        apart.remove_errors()
    with work.bar(len(sums), "repair maps") as bar:
        # Elsewhere there may be no float64.
        device = work.device if work.device.type == "cuda" else "cpu"
        fitted, left = fit_repair(plan, sums, device=device, fitted_one=bar.update)
    return ({} if fitted is None else fitted.to_parts()), left


def _store_sums(work: Workspace, places: list[tuple[int, int, int, int]], plan: SparsityPlan, digest: str) -> None:
    assert work.apart is not None
    for i, found in _error_sums(work, places, plan):
        work.apart.put_errors(digest, i, found)


def fitting_steps(work: Workspace, plan: SparsityPlan) -> int:
    """Steps of a generation that a repair is fitted on: few, but each phase has one.

    As many as were traced where that will do; all of a generation that the plan is for have one in each phase.
    """
    most, phases = work.config.steps, set(range(plan.schedule.num_phases))
    assert most is not None  # the settings are resolved
    for length in LENGTHS:
        steps = round(length * work.config.trace_steps)
        if steps >= most:
            break
        levels = work.trace_levels
        if length > 1:
            levels = call_levels(work.pipe, work.prompts[0], work.config.seed, work.settings(steps))
        if phases <= set(plan.schedule.phases(levels)):
            return steps
    return most


def _error_sums(
    work: Workspace, places: list[tuple[int, int, int, int]], plan: SparsityPlan
) -> Iterator[tuple[int, dict[tuple[int, str], ErrorSums]]]:
    """Of generations with the plan: each one's number, and what sampled queries get wrong in it.

    ``places``: numbers, halves of cross-validation, prompts and seeds.
    """
    config = work.config
    each = fitting_steps(work, plan)
    settings = config.settings(each) if each == config.steps else work.settings(each)
    with work.bar(len(places) * each, "repair") as bar, watched_updates(work.pipe, lambda _: bar.update()):
        for done, (i, half, prompt, seed) in enumerate(places, 1):
            tap = RepairTap(plan, seed=config.seed + i, half=half)
            with tap_attention(work.pipe, tap):
                final_latents(work.pipe, work.prompts[prompt], seed, settings)
            yield i, tap.sums
            bar.reach(done * each)
