"""A generation in a thread of its own that tells how far it is, shows a frame now and then, and can be cancelled."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from diffsparse.pipelines import SparseSummary, sparse_attention, sparse_attention_summary
from diffsparse.plan import SparsityPlan
from diffsparse.search.demo.preview import Previewer
from diffsparse.search.demo.sessions import Job
from diffsparse.search.generate import Clip, GenerationSettings, generate_clip
from diffsparse.search.load import sparse_backend

__all__ = ["Cancelled", "Made", "Step", "denoise", "follow"]


class Cancelled(Exception):
    """The user asked to stop."""


@dataclass(frozen=True, eq=False)
class Step:
    """A step has ended. ``step`` counts from 1; ``seconds_left`` is for the steps that remain, by the mean so far.

    ``preview``: uint8 ``[height, width, 3]``, or None where there is no new one.
    """

    step: int
    steps: int
    seconds_left: float
    preview: np.ndarray | None


@dataclass(frozen=True, eq=False)
class Made:
    """The clip. Times leave out what previews took. ``summary``: what ran sparse; None for a dense clip."""

    clip: Clip
    summary: SparseSummary | None


class _Watch:
    """The callback of one generation."""

    def __init__(self, pipe: Any, steps: int, job: Job, tell: Callable[[Any], None]) -> None:
        self._steps, self._job, self._tell = steps, job, tell
        self._device = torch.device(pipe._execution_device)
        self.previewer = Previewer(pipe)
        self._start = time.perf_counter()
        self.within_loop = 0.0

    def __call__(self, step: int, latents: torch.Tensor) -> None:
        if self._job.cancelled.is_set():
            raise Cancelled
        if self._device.type == "cuda":  # or what is still queued would count as time of the preview
            torch.cuda.synchronize(self._device)
        preview = self.previewer.frame(step, latents)
        done = step + 1
        if done < self._steps:  # the last one comes when the loop's clock has stopped
            self.within_loop = self.previewer.seconds
        each = (time.perf_counter() - self._start) / done
        self._tell(Step(done, self._steps, each * (self._steps - done), preview))


def _generate(
    pipe: Any, plan: SparsityPlan | None, prompt: str, seed: int, settings: GenerationSettings, watch: _Watch
) -> Made:
    # By name, for this is for seeing what a plan does: a small model on a GPU would stay dense under "auto".
    attached = nullcontext() if plan is None else sparse_attention(pipe, plan, backend=sparse_backend(pipe, plan))
    with attached:
        clip = generate_clip(pipe, prompt, seed, settings, on_step=watch)
        summary = sparse_attention_summary(pipe) if plan is not None else None
    clip = replace(
        clip,
        loop_seconds=clip.loop_seconds - watch.within_loop,
        seconds=clip.seconds - watch.previewer.seconds,
    )
    return Made(clip, summary)


@dataclass(frozen=True, eq=False)
class _Ended:
    value: Any


def follow(work: Callable[[Callable[[Any], None]], Any], job: Job, lock: threading.Lock) -> Iterator[Any]:
    """Runs ``work(tell)`` in a thread of its own; yields what it tells, and what it returns as the last.

    ``lock`` is held while it runs, by that thread: a consumer that forgets the generator without closing it keeps
    nobody waiting.

    Raises :class:`Cancelled` where the job was before its turn came, and what ``work`` raises. A consumer that goes
    away (closes the generator) cancels the job and waits until ``work`` has seen it.
    """
    events: queue.Queue[Any] = queue.Queue()

    def run() -> None:
        try:
            with lock:
                if job.cancelled.is_set():
                    raise Cancelled
                result = work(events.put)
            events.put(_Ended(result))
        except Exception as error:  # whatever it is belongs to the thread that waits
            events.put(error)

    worker = threading.Thread(target=run, name="diffsparse-demo", daemon=True)
    worker.start()
    event: Any = None
    try:
        while not isinstance(event, _Ended):
            event = events.get()
            if isinstance(event, Exception):
                raise event
            yield event.value if isinstance(event, _Ended) else event
    finally:
        if not isinstance(event, (_Ended, Exception)):  # the consumer has gone
            job.cancelled.set()
        worker.join()


def denoise(
    pipe: Any,
    plan: SparsityPlan | None,
    prompt: str,
    seed: int,
    settings: GenerationSettings,
    job: Job,
    lock: threading.Lock,
) -> Iterator[Step | Made]:
    """Every step as it ends, then the clip; dense where ``plan`` is None. The pipeline is dense again afterwards.

    As :func:`follow` does, it raises :class:`Cancelled` and what the generation raises.
    """

    def work(tell: Callable[[Any], None]) -> Made:
        steps = settings.resolved(pipe).num_inference_steps
        assert steps is not None  # the demo opens no pipeline without a number of steps
        return _generate(pipe, plan, prompt, seed, settings, _Watch(pipe, steps, job, tell))

    yield from follow(work, job, lock)
