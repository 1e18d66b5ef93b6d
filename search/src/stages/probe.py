"""First stage: three steps of one generation tell the grids, the time of a model call, and every head's best order."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
import torch

from diffsparse.order import TokenOrder
from diffsparse.search.call import sizes_seen
from diffsparse.search.errors import BadInput
from diffsparse.search.observe import Tracer, first_step, record
from diffsparse.search.workspace import Probe, Workspace

__all__ = ["run_probe", "why_unseen"]


def why_unseen(unseen: Mapping[str, str], layer: str | None = None) -> str:
    """The reason why a layer's (or any) call runs dense whatever the plan."""
    reason = unseen.get(layer) if layer is not None else next(iter(unseen.values()), None)
    return reason or "its self-attention was not seen; is it replaced by something else?"


def run_probe(work: Workspace) -> Probe:
    """Three steps of one generation: every layer's grid, the time of a model call, and every head's best order."""
    if not work.has_probe:
        settings, first = work.config.settings(3), Tracer(work.pipe, work.config.block, work.config.seed)
        on_gpu = work.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(work.device)
        start = time.perf_counter()
        sizes: list[tuple[int, int]] = []
        with sizes_seen(work.pipe, lambda height, width: sizes.append((height, width))):
            unseen = first_step(work.pipe, work.prompts[0], work.config.seed, settings, first.look)
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated(work.device) if on_gpu else 0
        if not first.grids:
            raise BadInput(f"no layer can be searched: {why_unseen(unseen)}")
        tracer = Tracer(
            work.pipe,
            work.config.block,
            work.config.seed,
            max(1, work.config.samples // 2),
            branches=first.counter.calls,
            screen_orders=work.layer_orders,
            screen_steps=(1, 2),
        )
        with work.bar(1, "probe") as bar:
            record(work.pipe, work.prompts[0], work.config.seed, settings, tracer)
            bar.update()
        seen = [n for n in work.architecture.layers if all(n in layers for layers in tracer.steps.values())]
        if not seen:
            raise BadInput(f"no layer can be searched at every step: {why_unseen(tracer.unseen)}")
        chosen: dict[str, tuple[TokenOrder, ...]] = {}
        for layer in seen:
            orders = work.layer_orders(tracer.grids[layer])
            # [orders, heads]; of generations that have one step whatever they are asked for there is nothing
            error = tracer.screened.get(layer, np.zeros((len(orders), work.architecture.heads)))
            best = error.argmin(0)
            # The first order costs least to gather; another one must be clearly better.
            keep = error[0] <= 1.1 * error.min(0)
            chosen[layer] = tuple(orders[0 if k else int(b)] for k, b in zip(keep, best, strict=True))
        work.put_probe(
            Probe(
                grids={n: tracer.grids[n] for n in seen},
                orders=chosen,
                branches=tracer.counter.calls,
                forward_seconds=seconds / first.counter.calls,
                head_dim=tracer.head_dim,
                size=sizes[0] if sizes else None,
                items=first.items,
                peak_bytes=peak,
                dense={n: why_unseen(tracer.unseen, n) for n in work.architecture.layers if n not in seen},
            )
        )
    return work.probe
