"""Second stage: every step of a generation of each traced prompt is scored."""

from __future__ import annotations

import numpy as np

from diffsparse.search.apart import Apart
from diffsparse.search.drift import DriftMeter
from diffsparse.search.errors import BadInput
from diffsparse.search.judged import add_up, judge, put_maps
from diffsparse.search.observe import Tracer, record, watched_updates
from diffsparse.search.parts import PromptSums
from diffsparse.search.sharing import discard, rank_file, share
from diffsparse.search.stages.probe import why_unseen
from diffsparse.search.workspace import Workspace

__all__ = ["run_trace", "trace_prompts"]


def run_trace(work: Workspace) -> None:
    """Score every step of a generation of each traced prompt."""
    todo = [p for p in work.traced() if not work.is_traced(p)]
    if work.apart is not None and work.ranks is not None:
        # As many at once as there are ranks: the first of them is judged where it is traced.
        for at in range(0, len(todo), work.ranks.count):
            _trace_shared(work, work.apart, todo[at : at + work.ranks.count])
    elif todo:
        _trace_all(work, todo)


def trace_prompts(work: Workspace, prompts: list[int], label: str) -> None:
    """Score every step of a generation of each of them, one after another. ``label``: of the bar."""
    _trace_all(work, prompts, label=label)


def _trace_all(work: Workspace, prompts: list[int], apart: tuple[int, ...] = (), label: str = "trace") -> None:
    """``apart``: those whose predecessors are traced at the same time."""
    steps = work.config.trace_steps
    with work.bar(len(prompts) * steps, label) as bar, watched_updates(work.pipe, lambda _: bar.update()):
        for i, p in enumerate(prompts, 1):
            if p in apart and work.apart is not None and work.apart.is_traced(p):
                # Its scores are there; judging its masks takes its generation.
                settings = work.settings(steps)
                recording = record(work.pipe, work.prompts[p], work.config.seed + p, settings, None)
                work.recordings[p] = recording.on("cpu")
            else:
                _trace(work, p, p in apart)
            bar.reach(i * steps)


def _trace_shared(work: Workspace, apart: Apart, todo: list[int]) -> None:
    """One prompt for each rank at most, then the steps at which masks of the prompts before are judged."""
    assert work.ranks is not None
    first, *others = todo
    kept = tuple(todo) if apart.parts(first) else tuple(others)
    # Those that are judged already, by a search that was killed after that, are only added.
    missing = [p for p in todo if not (p in kept and apart.is_traced(p) and not apart.left_to_judge(p))]
    if missing:
        share(work, _trace_all, missing, kept)
    places = [(p, step) for p in kept for step in apart.left_to_judge(p)]
    if places:
        path = rank_file(work.store, "maps")
        put_maps(work, kept, path)
        share(work, _exchange, list(range(work.ranks.count)), sorted({p for p, _ in places}), missing)
        shares = np.array_split(np.arange(len(places)), work.ranks.count)
        share(work, judge, [[places[i] for i in which] for which in shares], path)
        discard(path)
    for p in kept:
        add_up(work, p)
        apart.remove_prompt(p)
    work.recordings.clear()


def _exchange(work: Workspace, _: list[int], prompts: list[int], traced: list[int]) -> None:
    """Recordings, so that every rank has those of all ``prompts``. ``traced``: as they were shared out."""
    assert work.ranks is not None
    for p in prompts:
        source = traced.index(p) % work.ranks.count
        work.recordings[p] = work.ranks.give(work.recordings.get(p), source)


def _trace(work: Workspace, p: int, apart: bool = False) -> None:
    """Part by part to disk: a generation of a large model has more scores than fit into memory."""
    sums = PromptSums(work, p, work.apart if apart else None)
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
    if apart:
        work.recordings[p] = recording.on("cpu")
    sums.flush()
    for step in sorted(tracer.parts):
        for layer in work.layers:
            if (step, layer) not in sums.seen:
                raise BadInput(
                    f"{layer} cannot be searched at step {step} of prompt {p}: {why_unseen(tracer.unseen, layer)}"
                )
    transformers = [sorted(tracer.parts[s]) for s in sorted(tracer.parts)]
    if apart:
        assert work.apart is not None
        work.apart.put_trace(p, recording.levels, transformers)
    else:
        work.put_trace(p, recording.levels, transformers)
