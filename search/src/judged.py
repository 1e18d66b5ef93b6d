"""Traces of several prompts at once: each prompt's scores by itself, its masks judged afterwards, all added in order.

A prompt's measured masks are judged by what masks of the prompts *before* it leave, so that one process traces prompts
one after another. Where prompts are traced at once, those masks come too late. Then everything else is kept apart, and
when all maps are there the recorded generation is gone through once more, step by step in any order, only to judge. A
step's latent and its samples are the same then, and so are the sums, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diffsparse.order import TokenOrder
from diffsparse.pipelines import tap_attention
from diffsparse.search.observe import Recording, Tracer, final_latents, recomputing
from diffsparse.search.parts import EarlierMasks, put_prompt
from diffsparse.search.scored import CallScores
from diffsparse.search.sharing import discard
from diffsparse.search.steps import StepCounter
from diffsparse.search.store import SearchStore
from diffsparse.search.tally import LayerSums, sum_up
from diffsparse.search.workspace import Workspace

__all__ = ["add_up", "judge", "put_maps"]

#: What masks leave, of :func:`~diffsparse.search.tally.sum_up`.
JUDGED = ("left", "dropped")


def put_maps(work: Workspace, prompts: Sequence[int], path: Path) -> None:
    """Write a file with the maps of the prompts before each of ``prompts``, the first of which comes next."""
    assert work.apart is not None
    discard(path)
    with SearchStore(path) as store:
        for i, prompt in enumerate(prompts):
            store.take(work.store, (f"map/{prompt}/", "carried/"))
            for part, layer in work.apart.parts(prompt - 1) if i else []:
                if f"map/{prompt}/{part}/{layer}" in store:
                    continue
                maps = zip(work.heads_of(layer), work.apart.part(prompt - 1, part, layer)[1], strict=True)
                total = {order: value.to(work.device).float() for order, value in maps}
                for order, value in work.maps(part, layer, prompt - 1, work.device, store).items():
                    total[order] += value
                store.put_arrays(f"map/{prompt}/{part}/{layer}", work.coded(layer, total))


class _Judge:
    """A sink that keeps what masks of earlier prompts leave of the steps of one."""

    def __init__(self, work: Workspace, prompt: int, maps: SearchStore) -> None:
        assert work.apart is not None
        self.work, self.prompt, self.apart = work, prompt, work.apart
        self._earlier = EarlierMasks(work, prompt, maps)
        self._sums: dict[int, dict[str, LayerSums]] = {}

    def wants(self, step: int, layer: str) -> bool:
        return layer in self.work.grids

    def add(
        self, step: int, layer: str, order: TokenOrder, heads: Sequence[int], scores: CallScores, items: int
    ) -> None:
        table = self.work.table(self.work.grids[layer], order)
        levels = self._earlier.levels(self.work.part(step), layer, order, scores.error.device)
        sums = self._sums.setdefault(step, {}).setdefault(layer, LayerSums(self.work.architecture.heads))
        sums.add(heads, sum_up(scores, table, levels), items)

    def add_drift(self, step: int, layer: str, drift: np.ndarray) -> None:
        """Known already."""

    def flush(self) -> None:
        """Write every step."""
        for step, layers in self._sums.items():
            found: dict[str, np.ndarray] = {}
            for layer, sums in layers.items():
                first = self.work.table(self.work.grids[layer], self.work.head_orders[layer][0]).num_families
                found |= {f"{name}/{layer}": sums.arrays[name][..., first:] for name in JUDGED}
            self.apart.put_judged(self.prompt, step, found)
        self._sums = {}


def judge(work: Workspace, items: list[list[tuple[int, int]]], path: Path) -> None:
    """Judge masks at steps of prompts, ``(prompt, step)``. ``path``: of :func:`put_maps`."""
    places = [place for item in items for place in item]
    with work.bar(len(places), "judge") as bar, SearchStore(path, reading=True) as maps:
        for prompt in dict.fromkeys(prompt for prompt, _ in places):
            recording = work.recordings[prompt].on(work.device)
            sink = _Judge(work, prompt, maps)
            for step in [step for of, step in places if of == prompt]:
                _judge_step(work, prompt, step, recording, sink)
                bar.update()


def _judge_step(work: Workspace, prompt: int, step: int, recording: Recording, sink: _Judge) -> None:
    counter = StepCounter()
    counter.levels = list(recording.levels)
    tracer = Tracer(
        work.pipe,
        work.config.block,
        work.config.seed + prompt,
        work.probe.samples,
        work.probe.branches,
        work.orders,
        counter=counter,
        grids=dict(work.grids),
        sink=sink,
        ladder=False,
    )
    settings = work.settings(work.config.trace_steps)
    with recomputing(work.pipe, recording, _calls(work, recording, step)), tap_attention(work.pipe, tracer):
        final_latents(work.pipe, work.prompts[prompt], work.config.seed + prompt, settings)
    sink.flush()


def _calls(work: Workspace, recording: Recording, step: int) -> set[int]:
    """A step's model calls. Where a generation comes back to a part of its steps, those of the first time."""
    found: set[int] = set()
    left: set[int] = set()
    now: int | None = None
    for call, (at, _) in enumerate(recording.outputs):
        if (part := work.part(at)) != now:
            left |= set() if now is None else {now}
            now = part
        if at == step and part not in left:
            found.add(call)
    return found


def add_up(work: Workspace, prompt: int) -> None:
    """Add a prompt that was kept apart, and judged, to the prompts before it."""
    assert work.apart is not None
    levels, transformers = work.apart.trace(prompt)
    judged = [work.apart.judged(prompt, step) for step in range(len(levels))]
    for part, layer in work.apart.parts(prompt):
        if (known := work.traced_in(part, layer)) > prompt:
            continue
        sums, maps = work.apart.part(prompt, part, layer)
        steps = sums.pop("steps").tolist()
        first = work.table(work.grids[layer], work.head_orders[layer][0]).num_families
        for name in JUDGED:
            sums[name][..., first:] = np.stack([judged[step][f"{name}/{layer}"] for step in steps])
        put_prompt(work, part, layer, known, sums, dict(zip(work.heads_of(layer), maps, strict=True)))
    work.put_trace(prompt, levels, transformers)
