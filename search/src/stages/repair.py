"""Last stage: what the chosen plan's heads get wrong is fitted, on the traced prompts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from diffsparse.pipelines import tap_attention
from diffsparse.plan import SparsityPlan
from diffsparse.repair import Repair
from diffsparse.search.compose import Candidate
from diffsparse.search.measured import plan_digest
from diffsparse.search.observe import final_latents, watched_updates
from diffsparse.search.repair import RepairTap, fit_repair
from diffsparse.search.stages.validate import validate
from diffsparse.search.workspace import Workspace

__all__ = ["NOISE_DB", "mended", "repaired"]

#: Two plans whose clips are no further apart in PSNR, in dB, cannot be told from each other by a few clips.
NOISE_DB = 0.5


def mended(work: Workspace, chosen: Candidate, quality: dict[str, Any]) -> tuple[Candidate, dict[str, Any]]:
    """The candidate with its repair, unless that is plainly worse on the clips of validation, and its quality.

    The repair was not fitted on them. A few tenths of a dB say nothing: what one clip gains, another one may lose.
    """
    found = replace(chosen, plan=repaired(work, chosen.plan))
    if found.plan.repair is None:
        return found, quality
    _, about = validate(work, [found])
    after, before = (each["psnr_mean"] for each in (about, quality))
    if after < before - NOISE_DB:
        work.say(f"the repair is left out: the PSNR to dense is {before:.2f} dB without it, {after:.2f} dB with it")
        return chosen, quality
    work.say(f"PSNR to dense {before:.2f} dB without the repair, {after:.2f} dB with it")
    return found, about | {"psnr_without_repair": before, "psnr_by_dense_steps": quality["psnr_by_dense_steps"]}


def repaired(work: Workspace, plan: SparsityPlan) -> SparsityPlan:
    """The plan with its repair, fitted on generations of the traced prompts that run with the plan.

    The plan as it is where no head gains by one.
    """
    digest = plan_digest(plan)
    if (known := work.repair(digest)) is None:
        known = _fit(work, plan)
        work.put_repair(digest, known)
    arrays, share = known
    if not arrays:
        return plan
    found = Repair(**arrays)
    work.say(f"repair: {found.num_heads} heads, {share:.0%} of their squared error is left")
    return replace(plan, repair=found)


def _fit(work: Workspace, plan: SparsityPlan) -> tuple[dict[str, np.ndarray], float]:
    config, prompts = work.config, work.traced()
    tap = RepairTap(plan, seed=config.seed)
    # The two halves of cross-validation are of different prompts, or of different noise where there is one prompt.
    runs = [(p, config.seed + p) for p in prompts]
    runs += [(prompts[0], config.seed + 1)] if len(runs) == 1 else []
    # A generation as short as those that were traced may have no step in a short phase.
    some = set(plan.schedule.phases(work.trace_levels))
    short = some >= set(range(plan.schedule.num_phases))
    settings = work.settings(config.trace_steps) if short else config.settings(config.steps)
    each = config.trace_steps if short else config.steps
    assert each is not None  # the settings are resolved
    with work.bar(len(runs) * each, "repair") as bar, watched_updates(work.pipe, lambda _: bar.update()):
        for i, (prompt, seed) in enumerate(runs):
            tap.half = i * 2 // len(runs)
            with tap_attention(work.pipe, tap):
                final_latents(work.pipe, work.prompts[prompt], seed, settings)
            bar.reach((i + 1) * each)
    found, share = fit_repair(plan, tap.sums)
    return ({} if found is None else found.to_parts()), share
