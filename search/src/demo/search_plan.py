"""The Search tab without its page: prompts and a budget go in, stages come out, and at the end a plan."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffsparse.pipelines import find_transformers
from diffsparse.search.demo.generate import duration, explain
from diffsparse.search.demo.inspector import PlanView
from diffsparse.search.demo.live import Cancelled, follow
from diffsparse.search.demo.sessions import Job, Session
from diffsparse.search.demo.studio import Studio
from diffsparse.search.errors import BadInput
from diffsparse.search.search import FREE_SETTINGS, SearchConfig, search_plan, thoroughness

__all__ = ["SearchUpdate", "search_updates"]

MAX_PROMPTS = 16
TRACE_STEPS = 4


@dataclass(frozen=True, eq=False)
class SearchUpdate:
    """What the page should show now. ``kind`` as for a generation. ``lines``: stages and messages so far.

    ``fraction``: of the stage at hand. ``view``: the plan that was found, in the last update of a search that ended.
    """

    kind: str
    message: str
    lines: tuple[str, ...] = ()
    fraction: float = 0.0
    view: PlanView | None = None


def _prompts(studio: Studio, text: Any) -> list[str]:
    lines = text.split("\n") if isinstance(text, str) else []
    found = list(dict.fromkeys(studio.prompt(line) for line in lines if line.strip()))
    if not found:
        raise BadInput("there is no prompt to search with; write a few, one a line")
    if len(found) > MAX_PROMPTS:
        raise BadInput(f"{len(found)} prompts are more than this demo takes ({MAX_PROMPTS})")
    return found


def _config(studio: Studio, budget: Any, steps: Any) -> SearchConfig:
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise BadInput(f"the budget is a share of the dense attention time, above 0 and at most 1, got {budget!r}")
    settings = studio.settings(steps)
    return SearchConfig(
        budget=float(budget),
        height=settings.height,
        width=settings.width,
        num_frames=settings.num_frames,
        steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        true_cfg_scale=settings.true_cfg_scale,
        trace_steps=min(TRACE_STEPS, settings.num_inference_steps or TRACE_STEPS),
        candidates=2,
        **thoroughness(studio.pipe.device),
    )


def _folder(session: Session, prompts: list[str], config: SearchConfig) -> Path:
    """One for all searches that measure the same: another budget goes on from what was measured."""
    measured = {k: v for k, v in asdict(config).items() if k not in FREE_SETTINGS}
    name = hashlib.sha256(json.dumps([prompts, measured]).encode()).hexdigest()[:16]
    return session.folder / f"search-{name}"


def _stop_where_cancelled(studio: Studio, job: Job) -> ExitStack:
    """Within, the next call of the model raises :class:`Cancelled` once the job is cancelled."""

    def check(module: Any, args: Any) -> None:
        if job.cancelled.is_set():
            raise Cancelled

    stack = ExitStack()
    for transformer in find_transformers(studio.pipe).values():
        stack.callback(transformer.register_forward_pre_hook(check).remove)
    return stack


class _Log:
    """Messages in their order; a stage's line is replaced as it goes on."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._lines: dict[str, str] = {}
        self._start: dict[str, float] = {}

    def say(self, text: str) -> SearchUpdate:
        self._lines[f"said {len(self._lines)}"] = text
        return SearchUpdate("busy", text, tuple(self._lines.values()))

    def stage(self, name: str, done: int, total: int) -> SearchUpdate:
        now = self._clock()
        if done == 0:
            self._start[name] = now
        took = now - self._start.setdefault(name, now)
        text = f"{name}: {done} of {total}"
        if done >= total:
            text += f", took {duration(took)}"
        elif done:
            text += f", about {duration(took / done * (total - done))} left"
        self._lines[f"stage {name}"] = text
        return SearchUpdate("busy", text, tuple(self._lines.values()), done / total if total else 1.0)

    @property
    def lines(self) -> tuple[str, ...]:
        return tuple(self._lines.values())


def search_updates(
    studio: Studio, session: Session, job: Job, prompts: Any, budget: Any, steps: Any
) -> Iterator[SearchUpdate]:
    """Searches a plan and makes it the session's ``searched``. Never raises: errors are updates.

    What was measured stays in the session's folder: after a cancel, the same request goes on where it was.
    """
    log = _Log()
    try:
        found, config = _prompts(studio, prompts), _config(studio, budget, steps)
        folder = _folder(session, found, config)

        def work(tell: Callable[[Any], None]) -> PlanView:
            with _stop_where_cancelled(studio, job):
                plan = search_plan(
                    studio.pipe,
                    found,
                    config,
                    folder,
                    progress=False,
                    # The folder's path says nothing to the one who reads the page.
                    say=lambda text: tell(log.say(text.replace(f" in {folder}", ""))),
                    on_stage=lambda name, done, total: tell(log.stage(name, done, total)),
                )
            return PlanView.of(plan, "the plan searched here", folder)

        for event in follow(work, job, studio.lock):
            if isinstance(event, PlanView):
                session.searched = event
                text = "done: the plan is among the choices of the other tabs"
                yield SearchUpdate("done", text, log.lines, 1.0, event)
            else:
                yield event
    except Cancelled:
        yield SearchUpdate("stopped", "cancelled; searching again with these settings goes on from here", log.lines)
    except Exception as error:
        yield SearchUpdate("error", explain(error), log.lines)
    finally:
        session.done(job)
