"""The timer: single calls, with enough samples for percentiles, or without making a GPU wait for the answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
import torch

__all__ = ["Timing", "Watch", "samples_ms", "start_watch", "timing"]

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

    On a GPU by ``triton.testing.do_bench`` (device events; the L2 cache is emptied before each call), and by events
    alone where a call takes 50 ms or more, so that neither cache nor launch matter, or there is no Triton. Elsewhere by
    the host's clock.
    """
    function()
    _wait(device)
    start = time.perf_counter()
    function()
    _wait(device)
    first = (time.perf_counter() - start) * 1e3
    if device.type == "cuda" and (first >= _LONG_MS or find_spec("triton") is None):
        return [_by_events(function, device) for _ in range(max(least, int(budget_ms / max(first, 1e-3))))]
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
        watch = _CudaWatch(device)
        function()
        watch.stop()
        watch.end.synchronize()
        return 1e3 * (watch.seconds() or 0.0)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type in ("mps", "xpu"):
        getattr(torch, device.type).synchronize()


class Watch(Protocol):
    """Started when it is made, stopped once, and read when the time is known."""

    def stop(self) -> None: ...

    def seconds(self) -> float | None:
        """The time between start and stop, or None while the device has not reached the end."""
        ...


class _HostWatch:
    """For the CPU, where a call has ended when it returns."""

    __slots__ = ("begin", "end")

    def __init__(self) -> None:
        self.begin = self.end = time.perf_counter()

    def stop(self) -> None:
        self.end = time.perf_counter()

    def seconds(self) -> float | None:
        return self.end - self.begin


class _CudaWatch:
    """Two events on the stream that the call runs on. The GPU passes them by; whoever asks too early gets None."""

    __slots__ = ("begin", "end", "stream")

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.current_stream(device)
        self.begin = torch.cuda.Event(enable_timing=True)
        self.end = torch.cuda.Event(enable_timing=True)
        self.begin.record(self.stream)

    def stop(self) -> None:
        self.end.record(self.stream)

    def seconds(self) -> float | None:
        return self.begin.elapsed_time(self.end) / 1e3 if self.end.query() else None


def start_watch(device: torch.device, timing: bool) -> Watch | None:
    """A watch for a call on ``device``; None where there is none, or where ``timing`` was not asked for on a GPU.

    While a CUDA graph is captured nothing runs, so there is nothing to time.
    """
    if device.type == "cpu":
        return _HostWatch()
    if not timing or device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    return _CudaWatch(device)
