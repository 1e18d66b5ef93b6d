"""Second stage: every step of a generation of each traced prompt is scored."""

from __future__ import annotations

from diffsparse.search.drift import DriftMeter
from diffsparse.search.errors import BadInput
from diffsparse.search.observe import Tracer, record, watched_updates
from diffsparse.search.parts import PromptSums
from diffsparse.search.stages.probe import why_unseen
from diffsparse.search.workspace import Workspace

__all__ = ["run_trace"]


def run_trace(work: Workspace) -> None:
    """Score every step of a generation of each traced prompt."""
    todo = [p for p in work.traced() if not work.is_traced(p)]
    if not todo:
        return
    steps = work.config.trace_steps
    with work.bar(len(todo) * steps, "trace") as bar, watched_updates(work.pipe, lambda _: bar.update()):
        for i, p in enumerate(todo, 1):
            _trace(work, p)
            bar.reach(i * steps)


def _trace(work: Workspace, p: int) -> None:
    """Part by part to disk: a generation of a large model has more scores than fit into memory."""
    sums = PromptSums(work, p)
    tracer = Tracer(
        work.pipe,
        work.config.block,
        work.config.seed + p,
        work.probe.samples,
        work.probe.branches,
        work.orders,
        grids=dict(work.grids),  # a prompt must not bring another size
        drift=DriftMeter(work.config.true_cfg_scale or work.config.guidance_scale or 1.0),
        sink=sums,
        ladder=p == 0,  # a ratio that hardly depends on the prompt
    )
    settings = work.settings(work.config.trace_steps)
    recording = record(work.pipe, work.prompts[p], work.config.seed + p, settings, tracer)
    if p == 0:
        work.recording = recording
    sums.flush()
    for step in sorted(tracer.parts):
        for layer in work.layers:
            if (step, layer) not in sums.seen:
                raise BadInput(
                    f"{layer} cannot be searched at step {step} of prompt {p}: {why_unseen(tracer.unseen, layer)}"
                )
    work.put_trace(p, recording.levels, [sorted(tracer.parts[s]) for s in sorted(tracer.parts)])
