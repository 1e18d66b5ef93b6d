"""How long single attention calls take, without making a GPU wait for the answer."""

from __future__ import annotations

import time
from typing import Protocol

import torch

__all__ = ["Watch", "start_watch"]


class Watch(Protocol):
    """Started when it is made, stopped once, and read when the time is known."""

    def stop(self) -> None: ...

    def seconds(self) -> float | None:
        """The time between start and stop, or None while the device has not come so far."""
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
