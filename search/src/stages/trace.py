"""Second stage: every step of a generation of each traced prompt is scored."""

from __future__ import annotations

import numpy as np

from diffsparse.search.drift import DriftMeter
from diffsparse.search.errors import BadInput
from diffsparse.search.observe import Tracer, record
from diffsparse.search.stages.probe import why_unseen
from diffsparse.search.workspace import Workspace

__all__ = ["run_trace"]


def run_trace(work: Workspace) -> None:
    """Score every step of a generation of each traced prompt."""
    todo = [p for p in work.traced() if not work.is_traced(p)]
    if not todo:
        return
    with work.bar(len(todo), "trace") as bar:
        for p in todo:
            _trace(work, p)
            bar.update()


def _trace(work: Workspace, p: int) -> None:
    """Step by step to disk: a generation of a large model has more scores than fit into memory."""
    seen: set[tuple[int, str]] = set()

    def put(step: int, layers: dict[str, dict[str, np.ndarray]]) -> None:
        for layer, arrays in layers.items():
            if layer in work.grids:
                work.put_head_arrays(p, step, layer, arrays)
                seen.add((step, layer))

    tracer = Tracer(
        work.pipe,
        work.config.block,
        work.config.seed + p,
        work.config.samples,
        work.probe.branches,
        work.orders,
        grids=dict(work.grids),  # a prompt must not bring another size
        drift=DriftMeter(work.config.true_cfg_scale or work.config.guidance_scale or 1.0),
        on_step=put,
    )
    settings = work.config.settings(work.config.trace_steps)
    recording = record(work.pipe, work.prompts[p], work.config.seed + p, settings, tracer)
    if p == 0:
        work.recording = recording
    tracer.flush()
    for step in sorted(tracer.parts):
        for layer in work.layers:
            if (step, layer) not in seen:
                raise BadInput(
                    f"{layer} cannot be searched at step {step} of prompt {p}: {why_unseen(tracer.unseen, layer)}"
                )
    work.put_trace(p, recording.levels, [sorted(tracer.parts[s]) for s in sorted(tracer.parts)])
