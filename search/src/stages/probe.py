"""First stage: three steps of one generation tell the grids, the time of a model call, and every head's best order."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from diffsparse.entry import TAILS
from diffsparse.order import TokenOrder
from diffsparse.search.call import denoisers, sizes_seen
from diffsparse.search.errors import BadInput
from diffsparse.search.observe import Tracer, first_step, record, watched_updates
from diffsparse.search.workspace import Probe, Workspace

__all__ = ["prompts_for", "run_probe", "why_unseen"]

#: Queries of a block that are measured in a step, for calls of fewer tokens: of more blocks fewer tell enough.
SAMPLES = ((20_000, 12), (60_000, 6), (math.inf, 4))
#: Steps of the generation that is looked at first.
PROBE_STEPS = 3
#: How many prompts are traced where their dense generations take at most so many seconds together; else two.
TRACED = ((8, 60.0), (4, 240.0))
#: A first model call that is shorter than this may have spent much of it on getting started.
WARM_SECONDS = 5.0


def prompts_for(generation: float, most: int) -> int:
    """How many generations of so many seconds are traced; more than four only up to ``most``."""
    found = next((count for count, seconds in TRACED if count * generation <= seconds), 2)
    return found if found <= 4 else max(4, min(found, most))


@contextmanager
def _timing(work: Workspace) -> Iterator[list[float]]:
    """Seconds of each model call within."""
    found: list[float] = []

    def now() -> float:
        if work.device.type == "cuda":
            torch.cuda.synchronize(work.device)
        return time.perf_counter()

    handles = []
    for module in denoisers(work.pipe):
        handles.append(module.register_forward_pre_hook(lambda *_: found.append(-now())))
        handles.append(module.register_forward_hook(lambda *_: found.append(found.pop() + now())))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def why_unseen(unseen: Mapping[str, str], layer: str | None = None) -> str:
    """The reason why a layer's (or any) call runs dense whatever the plan."""
    reason = unseen.get(layer) if layer is not None else next(iter(unseen.values()), None)
    return reason or "its self-attention was not seen; is it replaced by something else?"


def run_probe(work: Workspace, announce: Callable[[Probe], None]) -> Probe:
    """Three steps of one generation: every layer's grid, the time of a model call, and every head's best order.

    ``announce`` gets what is known after the first step: all but orders and tails.
    """
    if work.has_probe:
        announce(work.probe)
    else:
        settings, first = work.settings(PROBE_STEPS), Tracer(work.pipe, work.config.block, work.config.seed)
        on_gpu = work.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(work.device)
        sizes: list[tuple[int, int]] = []
        with sizes_seen(work.pipe, lambda height, width: sizes.append((height, width))), _timing(work) as times:
            unseen = first_step(work.pipe, work.prompts[0], work.config.seed, settings, first.look)
            if len(times) == 1 and times[0] < WARM_SECONDS:
                first_step(work.pipe, work.prompts[0], work.config.seed, settings, lambda call: None)
        peak = torch.cuda.max_memory_allocated(work.device) if on_gpu else 0
        if not first.grids:
            raise BadInput(f"no layer can be searched: {why_unseen(unseen)}")
        forward = min(times)
        tokens = max(grid.seq_len for grid in first.grids.values())
        probe = Probe(
            grids={n: first.grids[n] for n in work.architecture.layers if n in first.grids},
            orders={},
            branches=first.counter.calls,
            forward_seconds=forward,
            head_dim=first.head_dim,
            size=sizes[0] if sizes else None,
            items=first.items,
            peak_bytes=peak,
            dense={n: why_unseen(unseen, n) for n in work.architecture.layers if n not in first.grids},
            prompts=work.config.trace_prompts
            or prompts_for(
                forward * first.counter.calls * work.config.trace_steps, len(work.prompts) - work.config.clips
            ),
            samples=work.config.samples or next(count for most, count in SAMPLES if tokens < most),
        )
        announce(probe)
        tracer = Tracer(
            work.pipe,
            work.config.block,
            work.config.seed,
            max(1, probe.samples // 2),
            branches=first.counter.calls,
            screen_orders=work.layer_orders,
            screen_steps=(1, 2),
        )
        with work.bar(PROBE_STEPS, "probe") as bar, watched_updates(work.pipe, lambda _: bar.update()):
            record(work.pipe, work.prompts[0], work.config.seed, settings, tracer)
            bar.reach(PROBE_STEPS)
        seen = [n for n in work.architecture.layers if all(n in layers for layers in tracer.steps.values())]
        if not seen:
            raise BadInput(f"no layer can be searched at every step: {why_unseen(tracer.unseen)}")
        chosen: dict[str, tuple[TokenOrder, ...]] = {}
        tails: dict[str, tuple[str, ...]] = {}
        for layer in seen:
            orders = work.layer_orders(tracer.grids[layer])
            # [orders, tails, heads]; of generations that have one step whatever they are asked for there is nothing
            error = tracer.screened.get(layer, np.zeros((len(orders), len(TAILS), work.architecture.heads)))
            best, tail = error.min(1).argmin(0), error.min(0).argmin(0)
            # The first order costs least to gather, and no tail costs less than one: others must be clearly better.
            least = 1.1 * error.min((0, 1))
            best[error[0].min(0) <= least] = 0
            tail[error[:, 0].min(0) <= least] = 0
            chosen[layer] = tuple(orders[int(i)] for i in best)
            tails[layer] = tuple(TAILS[int(i)] for i in tail)
        work.put_probe(
            replace(
                probe,
                grids={n: tracer.grids[n] for n in seen},
                orders=chosen,
                tails=tails,
                dense={n: why_unseen(tracer.unseen, n) for n in work.architecture.layers if n not in seen},
            )
        )
    return work.probe
