"""Fifth stage: whole generations on prompts that were not traced choose among the best plans."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import torch

from diffsparse.pipelines import sparse_attention as attached
from diffsparse.plan import SparsityPlan
from diffsparse.search import metrics
from diffsparse.search.columns import shorten
from diffsparse.search.compose import Candidate
from diffsparse.search.config import SearchConfig
from diffsparse.search.errors import BadInput
from diffsparse.search.generate import Clip, generate_clip
from diffsparse.search.inputs import Input
from diffsparse.search.load import sparse_backend
from diffsparse.search.measured import plan_digest
from diffsparse.search.observe import watched_updates
from diffsparse.search.sharing import share
from diffsparse.search.stored_search import StoredSearch, Tried
from diffsparse.search.workspace import Validation, Workspace

__all__ = ["cases", "held_out", "is_validated", "judged", "tried_plan", "validate"]

#: The first seed of validation is this much more than the search's own.
SEED_OFFSET = 1000


def held_out(work: Workspace) -> tuple[Input, ...]:
    """The prompts that are not traced."""
    return work.prompts[len(work.traced()) :]


def cases(work: Workspace, traced: int | None = None) -> list[tuple[Input, int]]:
    """Prompt and seed of every clip of validation. ``traced``: how many prompts are, before the probe has ended.

    Prompts that were not traced; where every one was, another seed is the best there is. A target is of several clips:
    it takes further seeds where there are too few prompts.
    """
    config, prompts = work.config, held_out(work) if traced is None else work.prompts[traced:]
    count = config.clips if config.goal is not None else min(config.clips, max(1, len(prompts)))
    pool = prompts or work.prompts
    return [(pool[i % len(pool)], config.seed + SEED_OFFSET + i // len(pool)) for i in range(count)]


def validate(
    work: Workspace, candidates: list[Candidate], least: float | None = None
) -> tuple[Candidate, dict[str, Any]]:
    """The candidate that comes closest to dense on prompts that were not traced, and what was measured for it.

    ``least``: of SSIM. After a clip on which every candidate falls below it no further ones are made; ``prompts`` of
    the result says how many there are.

    Predicted errors of plans with different numbers of dense steps are near each other; generations decide: by the
    mean PSNR, or by the worst clip's SSIM where that has a target.
    """
    clips = cases(work)
    keys = [plan_digest(candidate.plan) for candidate in candidates]
    plans = dict(zip(keys, (candidate.plan for candidate in candidates), strict=True))
    # Of a target clips are made one after another, or as many at once as there are ranks.
    count = 1 if work.ranks is None else work.ranks.count
    waves = range(0, len(clips), count) if least is not None else [0]
    for first in waves:
        wave = list(range(len(clips)))[first : first + count if least is not None else None]
        todo = [(i, [key for key in keys if work.validation(i, key) is None]) for i in wave]
        if any(missing for _, missing in todo):
            share(work, _make_clips, todo, plans)
        if least is not None and (below := [i for i in wave if _all_below(work, i, keys, least)]):
            clips = clips[: below[0] + 1]
            break
    return judged(work, candidates, len(clips))


def is_validated(stored: StoredSearch, plan: str, clips: int) -> bool:
    """Whether a plan (by its digest) ran on so many clips."""
    return all(stored.validation(i, plan) is not None for i in range(clips))


def tried_plan(chosen: Candidate, base: Candidate, config: SearchConfig) -> Tried:
    """What the record keeps of a validated plan. ``base``: without its repair. ``config``: it was composed for."""
    return Tried(
        plan_digest(chosen.plan),
        plan_digest(base.plan),
        config.budget,
        config.density,
        float(chosen.plan.record["search"]["predicted_attention_time"]),
        config.tried_plans,
    )


def judged(stored: StoredSearch, candidates: list[Candidate], clips: int) -> tuple[Candidate, dict[str, Any]]:
    """What :func:`validate` returns, of plans that ran on all of the first so many clips."""
    config, keys = stored.config, [plan_digest(candidate.plan) for candidate in candidates]
    rows = {key: [row for i in range(clips) if (row := stored.validation(i, key)) is not None] for key in keys}
    means = [float(np.mean([row.psnr for row in rows[key]])) for key in keys]
    worst = [min((row.ssim for row in rows[key] if row.ssim is not None), default=0.0) for key in keys]
    best = int(np.argmax(means if config.goal is None else worst))
    tried = {_named(c, candidates): m for c, m in zip(candidates, means, strict=True)}
    chosen = rows[keys[best]]
    similar = [row.ssim for row in chosen if row.ssim is not None]
    return candidates[best], {
        "prompts": clips,
        "steps": config.steps,
        "psnr_mean": means[best],
        "psnr_worst": min(row.psnr for row in chosen),
        **({"ssim_mean": float(np.mean(similar)), "ssim_worst": min(similar)} if len(similar) == len(chosen) else {}),
        "psnr_by_dense_steps": tried,
        "loop_speedup": float(np.mean([row.speedup for row in chosen])),
    }


def _make_clips(work: Workspace, todo: list[tuple[int, list[str]]], plans: dict[str, SparsityPlan]) -> None:
    """Measure the plans that are missing for each clip of validation, by their digests."""
    clips, settings = cases(work), work.config.settings(work.config.steps)
    each = work.config.steps
    assert each is not None  # the settings are resolved
    generations = sum(len(missing) + bool(missing) for _, missing in todo)
    done = 0
    with (
        work.bar(generations * each, "validate") as bar,
        watched_updates(work.pipe, lambda _: bar.update()),
    ):
        for i, missing in todo:
            if not missing:
                continue
            prompt, seed = clips[i]
            dense = work.dense_clip(i, partial(generate_clip, work.pipe, prompt, seed, settings))
            _check_dense(work, dense)
            bar.reach((done := done + 1) * each)
            for key in missing:
                with attached(work.pipe, plans[key], backend=sparse_backend(work.pipe, plans[key])):
                    clip = generate_clip(work.pipe, prompt, seed, settings)
                work.put_validation(i, key, _measured(work, clip, dense))
                bar.reach((done := done + 1) * each)


def _all_below(work: Workspace, case: int, keys: list[str], least: float) -> bool:
    """Whether every plan's SSIM on a clip is below ``least``."""
    rows = [work.validation(case, key) for key in keys]
    return all(row is not None and row.ssim is not None and row.ssim < least for row in rows)


def _check_dense(work: Workspace, dense: Clip) -> None:
    """Before a plan is measured against it."""
    about = f"the dense clip of {shorten(dense.prompt, 60)!r}"
    if not torch.isfinite(dense.frames).all():
        raise BadInput(f"{about} has pixels that are no numbers, so no plan can be held to it; try another --dtype")
    if work.config.goal is not None and min(size := tuple(dense.frames.shape[2:])) < metrics.SSIM_WINDOW:
        raise BadInput(
            f"{about} is {size[0]}x{size[1]}: a target is of SSIM, which needs at least {metrics.SSIM_WINDOW} pixels "
            "a side; give a larger size, or a budget or density"
        )


def _measured(work: Workspace, clip: Clip, dense: Clip) -> Validation:
    speedup = dense.loop_seconds / clip.loop_seconds
    psnr, ssim = metrics.psnr(clip.frames, dense.frames), metrics.ssim(clip.frames, dense.frames)
    if math.isfinite(psnr):
        return Validation(psnr, ssim, speedup)
    # Such a plan must lose, and the record holds numbers only.
    work.say(f"a plan's clip of {shorten(clip.prompt, 60)!r} has pixels that are no numbers: it counts as 0 dB, SSIM 0")
    return Validation(0.0, None if ssim is None else 0.0, speedup)


def _named(candidate: Candidate, candidates: list[Candidate]) -> str:
    """A plan by its dense steps, and that it uses no outputs again where others do.

    They are counted; which ones they are is told where they are not the first.
    """
    steps = candidate.plan.record["search"]["dense_at"]
    dense = str(len(steps))
    if steps != list(range(len(steps))):
        dense += f" (steps {', '.join(str(step + 1) for step in steps)})"
    alone = not candidate.plan.reuses and any(other.plan.reuses for other in candidates)
    return f"{dense}, without reuse" if alone else dense
