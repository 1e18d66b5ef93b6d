"""The Generate tab without its page: a request goes in, what to show comes out step by step."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffsparse.plan import PlanError, SparsityPlan
from diffsparse.saving import is_full
from diffsparse.search.demo.compare import Comparison, compare
from diffsparse.search.demo.live import Cancelled, Made, Step, denoise
from diffsparse.search.demo.sessions import Job, Session
from diffsparse.search.demo.studio import Studio
from diffsparse.search.errors import BadInput
from diffsparse.search.evaluate import WARM_UP_STEPS
from diffsparse.search.generate import GenerationSettings

__all__ = ["Request", "Update", "duration", "generate", "explain"]

log = logging.getLogger("diffsparse")


@dataclass(frozen=True)
class Request:
    """What the user filled in, as it came, unchecked. None leaves the model's default."""

    prompt: Any
    seed: Any = 0
    steps: Any = 20
    plan: Any = ""
    density: Any = None
    guidance: Any = None
    height: Any = None
    width: Any = None
    num_frames: Any = None


@dataclass(frozen=True, eq=False)
class Update:
    """What the page should show now. ``fraction``: how much is done, in [0, 1]. Pictures are None where nothing is new.

    ``kind``: ``busy``, ``done``, ``stopped`` or ``error``; the last three end a generation.
    """

    kind: str
    message: str
    fraction: float = 0.0
    dense: np.ndarray | None = None
    sparse: np.ndarray | None = None
    comparison: Comparison | None = None


def duration(seconds: float) -> str:
    """``8 s``, ``2 min 5 s``, ``1 h 10 min``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def explain(error: Exception) -> str:
    """One line for the page. What is not the user's to put right is logged with its traceback, and named here."""
    if isinstance(error, (BadInput, PlanError)):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and is_full(error):
        return "the disk of the machine that runs this demo is full; free some space, then try again"
    log.error("the demo failed", exc_info=error)
    kind = type(error).__name__
    if kind == "OutOfMemoryError":
        return "the device ran out of memory; ask for fewer frames or a smaller picture"
    return f"something went wrong inside ({kind}); the terminal that the demo was started in has the details"


def _shown(made: Made) -> np.ndarray:
    """The first frame of a clip, as previews show it: uint8 ``[height, width, 3]``."""
    frame = made.clip.frames[0].clamp(0, 1).nan_to_num().permute(1, 2, 0).numpy()
    return (frame * 255).round().astype(np.uint8)


class _Pair:
    """Dense, then sparse, with one measure of how far both are."""

    def __init__(self, studio: Studio, job: Job, prompt: str, seed: int, settings: GenerationSettings) -> None:
        self.studio, self.job, self.prompt, self.seed, self.settings = studio, job, prompt, seed, settings

    def _warm_up(self, plan: SparsityPlan | None, side: str) -> Iterator[Update]:
        """On a GPU the first calls compile kernels and fetch memory; that belongs to neither side's time."""
        if self.studio.pipe.device.type != "cuda":
            return
        settings = self.settings.brief(self.studio.pipe, WARM_UP_STEPS)
        yield Update("busy", f"{side}: preparing, which is not timed")
        for _ in denoise(self.studio.pipe, plan, self.prompt, 0, settings, self.job, self.studio.lock):
            pass

    def run(self, plan: SparsityPlan | None, start: float, share: float) -> Iterator[Update | Made]:
        """One side; ``start`` and ``share``: the part of the whole that it is."""
        side = "dense" if plan is None else "sparse"
        yield from self._warm_up(plan, side)
        events = denoise(self.studio.pipe, plan, self.prompt, self.seed, self.settings, self.job, self.studio.lock)
        for event in events:
            if isinstance(event, Made):
                yield event
                return
            yield self._update(event, side, start, share)

    def _update(self, step: Step, side: str, start: float, share: float) -> Update:
        left = step.seconds_left
        if side == "dense":  # the sparse side takes at most as long
            left += step.steps * step.seconds_left / max(step.steps - step.step, 1)
        if step.step == step.steps:
            text = f"{side}: decoding"
        else:
            text = f"{side}: step {step.step} of {step.steps}, at most {duration(left)} left"
        picture = {side: step.preview} if step.preview is not None else {}
        return Update("busy", text, start + share * step.step / step.steps, **picture)  # type: ignore[arg-type]


def generate(studio: Studio, session: Session, job: Job, request: Request) -> Iterator[Update]:
    """Generates dense, then sparse, with the same seed, and compares. Never raises: errors are updates.

    A dense clip that the session has of the same prompt, seed and settings is not made again. The two sides run after
    each other: at once they would slow each other down, and the times would say nothing.
    """
    try:
        yield from _generate(studio, session, job, request)
    except Cancelled:
        yield Update("stopped", "cancelled")
    except Exception as error:
        yield Update("error", explain(error))
    finally:
        session.done(job)


def _generate(studio: Studio, session: Session, job: Job, request: Request) -> Iterator[Update]:
    prompt, seed = studio.prompt(request.prompt), studio.seed(request.seed)
    settings = studio.settings(request.steps, request.guidance, request.height, request.width, request.num_frames)
    plan = studio.plan(request.plan, request.density, session, settings)
    if job.cancelled.is_set():
        raise Cancelled
    pair = _Pair(studio, job, prompt, seed, settings)
    dense = _known_dense(session, prompt, seed, settings)
    start = 0.0
    if dense is None:
        start = 0.5
        yield Update("busy", "dense: waiting for the model")
        for event in pair.run(None, 0.0, 0.5):
            if isinstance(event, Made):
                dense = event
            else:
                yield event
    assert dense is not None  # the generator ends with it or raises
    yield Update("busy", "sparse: starting", start, dense=_shown(dense))
    sparse: Made | None = None
    for event in pair.run(plan, start, 1 - start):
        if isinstance(event, Made):
            sparse = event
        else:
            yield event
    assert sparse is not None
    yield Update("busy", "comparing", 1.0, sparse=_shown(sparse))
    comparison = compare(dense, sparse, session.new_folder(), settings)
    session.comparison = comparison
    yield Update("done", "done", 1.0, comparison=comparison)


def _known_dense(session: Session, prompt: str, seed: int, settings: GenerationSettings) -> Made | None:
    last = session.comparison
    if last is None or last.settings != settings or (last.report.prompt, last.report.seed) != (prompt, seed):
        return None
    return last.dense
