"""Times of single calls, with enough samples for percentiles."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

__all__ = ["Timing", "samples_ms", "timing"]

#: Samples that are taken however long a call is.
LEAST = 5
_LONG_MS = 50.0


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median, the 20th and 80th percentile, and how many calls they come from."""

    ms: float
    ms_p20: float
    ms_p80: float
    samples: int


def samples_ms(
    function: Callable[[], Any], device: torch.device, budget_ms: float = 300.0, least: int = LEAST
) -> list[float]:
    """Milliseconds of single calls over about ``budget_ms``, at least ``least`` of them, after warming up.

    On a GPU by ``triton.testing.do_bench`` (device events; the L2 cache is emptied before each call), and where a call
    takes 50 ms or more, so that neither cache nor launch matter, by events alone. Elsewhere by the host's clock.
    """
    function()
    _wait(device)
    start = time.perf_counter()
    function()
    _wait(device)
    first = (time.perf_counter() - start) * 1e3
    if device.type == "cuda" and first >= _LONG_MS:
        return [_by_events(function, device) for _ in range(max(least, int(budget_ms / first)))]
    if device.type == "cuda":
        from triton.testing import do_bench

        # do_bench cuts the number of repeats to whole calls, and its own estimate of a call may be the longer one.
        rep = max(budget_ms, 1.2 * least * first)
        with torch.cuda.device(device):
            times = do_bench(function, warmup=min(25.0, budget_ms / 4), rep=rep, return_mode="all")
        return [float(t) for t in times]
    samples: list[float] = []
    for _ in range(max(least, min(50, int(budget_ms / max(first, 1e-3))))):
        start = time.perf_counter()
        function()
        _wait(device)
        samples.append((time.perf_counter() - start) * 1e3)
    return samples


def timing(samples: Sequence[float]) -> Timing:
    """Median and percentiles of :func:`samples_ms`."""
    low, middle, high = np.quantile(np.asarray(samples, np.float64), (0.2, 0.5, 0.8))
    return Timing(float(middle), float(low), float(high), len(samples))


def _by_events(function: Callable[[], Any], device: torch.device) -> float:
    with torch.cuda.device(device):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
