"""Fifth stage: whole generations on prompts that were not traced choose among the best plans."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffsparse.pipelines import sparse_attention as attached
from diffsparse.search import metrics
from diffsparse.search.compose import Candidate
from diffsparse.search.generate import generate_clip
from diffsparse.search.load import sparse_backend
from diffsparse.search.measured import plan_digest
from diffsparse.search.workspace import Workspace

__all__ = ["validate"]


def validate(work: Workspace, candidates: list[Candidate]) -> tuple[Candidate, dict[str, Any]]:
    """The candidate that comes closest to dense on prompts that were not traced, and what was measured for it.

    Predicted errors of plans with different numbers of dense steps are near each other; generations decide.
    """
    config = work.config
    settings = config.settings(config.steps)
    cases = [(prompt, config.seed + 1000) for prompt in work.prompts[len(work.traced()) :]]
    # Where every prompt was traced, another seed is the best there is.
    cases = (cases or [(work.prompts[0], config.seed + 1000)])[: config.validation_prompts]
    keys = [plan_digest(candidate.plan) for candidate in candidates]
    with work.bar(len(cases) * (1 + len(candidates)), "validate") as bar:
        for i, (prompt, seed) in enumerate(cases):
            if all(work.validation(i, key) is not None for key in keys):
                bar.update(1 + len(candidates))
                continue
            dense = work.dense_clip(i, lambda: generate_clip(work.pipe, prompt, seed, settings))  # noqa: B023
            bar.update()
            for key, candidate in zip(keys, candidates, strict=True):
                if work.validation(i, key) is not None:
                    bar.update()
                    continue
                with attached(work.pipe, candidate.plan, backend=sparse_backend(work.pipe, candidate.plan)):
                    clip = generate_clip(work.pipe, prompt, seed, settings)
                psnr = metrics.psnr(clip.frames, dense.frames)
                work.put_validation(i, key, psnr, dense.loop_seconds / clip.loop_seconds)
                bar.update()
    rows = {key: [row for i in range(len(cases)) if (row := work.validation(i, key)) is not None] for key in keys}
    means = [float(np.mean([row["psnr"] for row in rows[key]])) for key in keys]
    best = int(np.argmax(means))
    tried = {str(c.plan.record["search"]["dense_steps"]): m for c, m in zip(candidates, means, strict=True)}
    chosen = rows[keys[best]]
    return candidates[best], {
        "prompts": len(cases),
        "steps": config.steps,
        "psnr_mean": means[best],
        "psnr_worst": min(row["psnr"] for row in chosen),
        "psnr_by_dense_steps": tried,
        "loop_speedup": float(np.mean([row["speedup"] for row in chosen])),
    }
