"""Second stage: every step of a generation of each traced prompt is scored."""

from __future__ import annotations

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
            tracer = Tracer(
                work.pipe,
                work.config.block_size,
                work.config.seed + p,
                work.config.samples,
                work.probe.branches,
                work.orders,
                grids=dict(work.grids),  # a prompt must not bring another size
                drift=DriftMeter(work.config.true_cfg_scale or work.config.guidance_scale or 1.0),
            )
            recording = record(
                work.pipe,
                work.prompts[p],
                work.config.seed + p,
                work.config.settings(work.config.trace_steps),
                tracer,
            )
            if p == 0:
                work.recording = recording
            for step, layers in tracer.steps.items():
                for layer in work.layers:
                    if layer not in layers:
                        raise BadInput(
                            f"{layer} cannot be searched at step {step} of prompt {p}: "
                            f"{why_unseen(tracer.unseen, layer)}"
                        )
                    work.put_head_arrays(p, step, layer, layers[layer])
            work.put_trace(p, recording.levels, [sorted(tracer.parts[s]) for s in sorted(tracer.parts)])
            bar.update()
