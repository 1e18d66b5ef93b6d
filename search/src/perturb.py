"""Taps that put errors into a generation: what sparse attention gets wrong, and what outputs of earlier steps would."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

import torch

from diffsparse.kernels import sparse_attention
from diffsparse.layout import BlockLayout
from diffsparse.pipelines.reuse import EightBits
from diffsparse.search.steps import StepCounter

__all__ = ["partial_error", "sparse_callback", "stale_outputs"]


def sparse_callback(layouts: Callable[[Any], BlockLayout | None]) -> Callable[[Any], torch.Tensor | None]:
    """A tap that runs each call with the layout that ``layouts(call)`` gives, dense where it gives None."""

    def callback(call: Any) -> torch.Tensor | None:
        layout = layouts(call)
        if layout is None:
            return None
        return sparse_attention(call.q, call.k, call.v, layout, scale=call.scale, kv_len=call.kv_len)

    return callback


def partial_error(
    layouts: Callable[[Any], BlockLayout | None], share: float, steps: int
) -> Callable[[Any], torch.Tensor | None]:
    """A tap that adds a share of the sparse error to every call of the first ``steps`` steps it sees."""
    counter = StepCounter()

    def callback(call: Any) -> torch.Tensor | None:
        counter.update(call)
        layout = layouts(call) if counter.changes < steps else None
        if layout is None:
            return None
        sparse = sparse_attention(call.q, call.k, call.v, layout, scale=call.scale, kv_len=call.kv_len)
        return torch.lerp(call.dense().float(), sparse.float(), share).to(sparse.dtype)

    return callback


def stale_outputs(
    layers: Collection[str], share: float, first: int
) -> tuple[Callable[[Any], torch.Tensor | None], list[int]]:
    """A tap that adds a share of what every second step's outputs would get wrong if they were the last step's.

    Of some layers, from the step ``first`` on. Outputs are kept as a run keeps them, but in host memory: a search
    should fit where the model does. Returns the tap, and the list of the steps that it changed, which fills.
    """
    counter = StepCounter()
    changed: list[int] = []
    kept: dict[tuple[str, str, int], EightBits] = {}
    calls: Counter[tuple[int, str, str]] = Counter()

    def callback(call: Any) -> torch.Tensor | None:
        step = counter.update(call)
        if call.layer not in layers or step < first:
            return None
        place = (step, call.transformer, call.layer)
        key = (*place[1:], calls[place])
        calls[place] += 1
        out: torch.Tensor = call.dense()
        if (step - first) % 2 == 0:
            kept[key] = EightBits.of(out).to("cpu")
            return out
        before = kept.pop(key, None)
        if before is None or before.values.shape != out.shape:
            return out
        if step not in changed:
            changed.append(step)
        return torch.lerp(out.float(), before.to(out.device).read(torch.float32), share).to(out.dtype)

    return callback, changed
