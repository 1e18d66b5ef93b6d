"""The search: probe, trace, sensitivity, compose, validate, repair. Prompts go in, a sparsity plan comes out."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import diffsparse
from diffsparse.plan import SparsityPlan
from diffsparse.search.compose import Candidate
from diffsparse.search.config import FREE_SETTINGS, SearchConfig, thoroughness
from diffsparse.search.errors import BadInput, writing
from diffsparse.search.identity import model_identity
from diffsparse.search.layers import main_grid
from diffsparse.search.stages.compose import compose_plans, layer_costs
from diffsparse.search.stages.probe import run_probe
from diffsparse.search.stages.repair import repaired
from diffsparse.search.stages.report import measured, search_record
from diffsparse.search.stages.trace import run_trace
from diffsparse.search.stages.validate import validate
from diffsparse.search.store import SearchStore
from diffsparse.search.workspace import Workspace

__all__ = ["FREE_SETTINGS", "SearchConfig", "search_plan", "thoroughness"]

log = logging.getLogger("diffsparse")

# Two plans whose clips are no further apart in PSNR, in dB, cannot be told from each other by a few clips.
NOISE_DB = 0.5

# Counted up whenever what the store holds changes.
STORE_FORMAT = 5


def search_plan(
    pipe: Any,
    prompts: Sequence[str],
    config: SearchConfig,
    out: Path,
    *,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
    on_stage: Callable[[str, int, int], None] | None = None,
) -> SparsityPlan:
    """Search a plan and write it to ``out``, with ``search.sqlite`` (to go on after a kill) and the pictures' data.

    ``say`` receives the lines meant for the user (the estimate, what was chosen), ``on_stage`` a stage's name, how many
    of its parts are done, and of how many. What they raise ends the search; the same call then goes on where it was.
    Raises :class:`BadInput` for settings that cannot work, :class:`StoreMismatch` where ``out`` holds another search.
    """
    if not prompts:
        raise BadInput("a search needs at least one prompt")
    say = say or log.info
    out = Path(out)
    config = config.resolved(pipe)
    with SearchStore(out / "search.sqlite") as store:
        work = Workspace(pipe, tuple(prompts), config, store, progress, say, on_stage or (lambda *_: None))
        resumed = store.claim(
            {
                "format": STORE_FORMAT,
                "version": diffsparse.__version__,
                "architecture": work.architecture.fingerprint,
                **model_identity(pipe),
                "prompts": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
                **{k: v for k, v in asdict(config).items() if k not in FREE_SETTINGS},
            }
        )
        if resumed:
            say(f"going on with the search in {out}")
        return _run(work, out)


def _run(work: Workspace, out: Path) -> SparsityPlan:
    config, begin = work.config, time.perf_counter()
    run_probe(work)
    grid = main_grid(work.grids)
    _announce(work)
    costs = layer_costs(work)
    run_trace(work)
    candidates = compose_plans(work, costs)
    seconds = time.perf_counter() - begin
    chosen, quality = validate(work, candidates) if config.validation_prompts else (candidates[0], None)
    if config.repair:
        chosen, quality = _repaired(work, chosen, quality)
    plan = chosen.plan
    if quality is not None:
        plan.record["quality"] = quality
    about = search_record(work, grid, costs[grid])
    about["search"] |= plan.record["search"] | {"seconds": round(seconds, 1)}
    plan.record.update(about)
    about = plan.record["search"]
    work.say(
        f"chosen: {about['dense_steps']} of {about['of_steps']} steps dense, {about['phases']} phase(s), "
        f"whole-trajectory density {about['trajectory_density']:.3f}"
    )
    attention = measured(work, chosen)
    with writing(out, then="run the same command again: it goes on from what was measured"):
        plan.save_pretrained(out)
        attention.save(out)
    return plan


def _repaired(
    work: Workspace, chosen: Candidate, quality: dict[str, Any] | None
) -> tuple[Candidate, dict[str, Any] | None]:
    """The candidate with its repair, unless that is plainly worse on the prompts of validation.

    The repair was not fitted on them. A few tenths of a dB say nothing: what one clip gains, another one may lose.
    """
    mended = replace(chosen, plan=repaired(work, chosen.plan))
    if mended.plan.repair is None or quality is None:
        return mended, quality
    _, found = validate(work, [mended])
    after, before = (about["psnr_mean"] for about in (found, quality))
    if after < before - NOISE_DB:
        work.say(f"the repair is left out: the PSNR to dense is {before:.2f} dB without it, {after:.2f} dB with it")
        return chosen, quality
    work.say(f"PSNR to dense {before:.2f} dB without the repair, {after:.2f} dB with it")
    return mended, found | {"psnr_without_repair": before, "psnr_by_dense_steps": quality["psnr_by_dense_steps"]}


def _announce(work: Workspace) -> None:
    """Tell what will be searched, and how long that will take."""
    grid, dense = main_grid(work.grids), work.probe.dense
    work.say(f"{grid} = {grid.seq_len} tokens, {len(work.layers)} layers of {work.architecture.heads} heads")
    if dense:
        name, reason = next(iter(dense.items()))
        work.say(f"{len(dense)} other layers stay dense ({name}: {reason})")
    work.say(f"estimate: {_estimate(work) / 60:.1f} minutes, validation apart")


def _estimate(work: Workspace) -> float:
    """Seconds that the stages after the probe will take."""
    forward, branches, steps = work.probe.forward_seconds, work.probe.branches, work.config.trace_steps
    rest = sum(steps - s for s in {0, 3 * steps // 4})
    prompts, layers = len(work.traced()), len(work.layers)
    repair = max(2, prompts) * branches * steps if work.config.repair else 0
    return float(forward * (1.3 * prompts * branches * steps + 2 * branches * layers + branches * rest + repair) + 15)
