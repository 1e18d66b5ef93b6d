"""Threads that run torch's operators on one core each, for work that splits better by hand than inside of operators."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

__all__ = ["on_workers"]

In = TypeVar("In")
Out = TypeVar("Out")

_SECONDS = 60  # for all threads of a pool to start

_pools: dict[int, ThreadPoolExecutor] = {}
_lock = threading.Lock()


def on_workers(threads: int, work: Callable[[In], Out], items: Iterable[In]) -> list[Out]:
    """``work(item)`` for every item on that many threads, in inference mode; results in the items' order.

    One thread is the caller's own. Raises what ``work`` raised, once nothing of it runs any more.
    """
    if threads == 1:
        return [_run(work, item) for item in items]
    pool = _pool(threads)
    futures = [pool.submit(_run, work, item) for item in items]
    wait(futures)
    return [future.result() for future in futures]


def _run(work: Callable[[In], Out], item: In) -> Out:
    with torch.inference_mode():
        return work(item)


def _pool(threads: int) -> ThreadPoolExecutor:
    """Kept for good: a thread takes longer to start than many a call lasts."""
    with _lock:
        pool = _pools.get(threads)
        if pool is None:
            pool = _pools[threads] = _start(threads)
        return pool


def _start(threads: int) -> ThreadPoolExecutor:
    everyone = threading.Barrier(threads + 1)

    def begin() -> None:
        torch.get_num_threads()  # a thread takes up the number of all, once: not after the next line
        torch.set_num_threads(1)
        everyone.wait(_SECONDS)

    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, "diffsparse", initializer=begin)
    for _ in range(threads):
        pool.submit(bool)  # starts one thread, as long as none is idle
    everyone.wait(_SECONDS)
    # A number set in one thread is also that of threads that start later.
    torch.set_num_threads(before)
    return pool


def _forget() -> None:
    global _lock
    _lock = threading.Lock()
    _pools.clear()


# A forked process has none of its parent's threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
