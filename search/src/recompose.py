"""A plan from the record of a search, without the model: for another budget, density or target."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffsparse.architecture import Architecture
from diffsparse.plan import SparsityPlan
from diffsparse.quality import quality_line
from diffsparse.search.compose import Candidate, Composer
from diffsparse.search.config import SearchConfig
from diffsparse.search.errors import BadInput
from diffsparse.search.facts import Facts
from diffsparse.search.measured import plan_digest
from diffsparse.search.stages.compose import compose_plans, composer_of, reuse_memory
from diffsparse.search.stages.repair import better_with_repair, with_repair
from diffsparse.search.stages.report import write_plan
from diffsparse.search.stages.validate import is_validated, judged
from diffsparse.search.store import SearchStore
from diffsparse.search.stored_search import StoredSearch, Tried

__all__ = ["RECORD_NAME", "compose_plan", "searched_model"]

RECORD_NAME = "search.sqlite"


def compose_plan(
    record: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    budget: float | None = None,
    density: float | None = None,
    target: float | None = None,
    num_inference_steps: int | None = None,
    dense_steps: int | None = None,
    repair: bool | None = None,
    repair_rows: int | None = None,
    reuse_memory: float | None = None,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
    on_stage: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> SparsityPlan:
    """Compose a plan from what a finished search measured, without its model, and write it to the folder ``out``.

    Nothing is generated. The plan is validated, and has a repair, where the search did both for the same plan; ``say``
    is told where it did not. ``diffsparse.evaluate_plan`` validates it, and so does the same search with the model.

    Args:
        record: the folder of the search, with its ``search.sqlite``, which is left as it is.
        out: where the plan goes; ``record`` itself, or another folder.
        budget: share of dense attention's time that the plan may take. One of this, ``density`` and ``target``.
        density: whole-trajectory density of the plan.
        target: the SSIM to dense that every validation clip keeps. The sparsest plan that the search validated and
            that does so is taken; a sparser one that nobody tried may do so, too.
        num_inference_steps: of the generations that the plan is for. This and the others: those of the last search
            where not given. Numbers that no search asked for need the model.
        dense_steps: the number of dense first steps.
        repair: whether a repair that was fitted for the same plan is taken.
        repair_rows: rows of a repair that is fitted in every call.
        reuse_memory: GB of outputs that a run may keep.
        progress: whether bars are shown on stderr.
        say: receives the lines meant for a user.
        on_stage: receives a stage's name, how many of its parts are done, and of how many.

    Raises:
        BadInput: in one line for what the record does not tell.
        StoreMismatch, StoreDamaged: where the record is of another version, or damaged.
    """
    given = {"budget": budget, "density": density, "target": target}
    if sum(value is not None for value in given.values()) != 1:
        raise BadInput("say what the plan is for: give a budget, a density or a target, one of the three")
    begin = time.perf_counter()
    with _opened(record) as (store, facts):
        changes: dict[str, Any] = {
            **given,
            "points": None,
            "steps": num_inference_steps,
            "dense_steps": dense_steps,
            "repair": repair,
            "repair_rows": repair_rows,
            "reuse_memory": reuse_memory,
        }
        changes = {name: value for name, value in changes.items() if value is not None or name in (*given, "points")}
        if target is not None and facts.config.validation_prompts == 0:
            changes["validation_prompts"] = None
        config = replace(facts.config, **changes)
        stored = StoredSearch(facts.architecture, facts.num_prompts, config, store, progress, say, on_stage)
        _check(stored)
        chosen, quality, fitted = _best(stored) if target is None else (*_for_target(stored, target), True)
        stored.config = config
        if quality is not None:
            chosen.plan.record["quality"] = quality
        plan = write_plan(stored, chosen, time.perf_counter() - begin, Path(out))
        lacking = [] if quality is not None else ["is not validated"]
        if config.fits_repair and not fitted:
            lacking.append("has no repair")
        if lacking:
            say(
                f"without the model the plan {' and '.join(lacking)}: check it with `diffsparse eval`, or run the same "
                f"search with the model and --out {os.fspath(record)}"
            )
    return plan


@contextmanager
def _opened(record: str | os.PathLike[str]) -> Iterator[tuple[SearchStore, Facts]]:
    """The record of a search that has measured everything, and what it is of."""
    place = Path(record) / RECORD_NAME
    if not place.is_file():
        raise BadInput(f"{os.fspath(record)!r} holds no {RECORD_NAME}: give the folder that a search wrote")
    with SearchStore(place, reading=True) as store:
        store.check_version()
        if "facts" not in store:
            raise BadInput(
                f"the search in {os.fspath(record)!r} has not measured everything yet; "
                "run it again, with its model, to go on from there"
            )
        yield store, store.read_json("facts", Facts.from_dict)


def searched_model(record: str | os.PathLike[str]) -> Architecture:
    """The architecture that a search measured. Raises as :func:`compose_plan` does for what is no finished search."""
    with _opened(record) as (_, facts):
        return facts.architecture


def _check(stored: StoredSearch) -> None:
    """Raise :class:`BadInput` where something was never measured."""
    known = sorted(int(name.split("/")[1]) for name in stored.store.names("levels/"))
    if stored.config.steps not in known:
        raise BadInput(
            f"the record tells the noise levels of generations of {' and '.join(map(str, known))} steps, and not of "
            f"{stored.config.steps}; search with the model, which adds them"
        )
    if reuse_memory(stored) and stored.reuse_factor is None:
        raise BadInput(
            "the record does not tell what outputs that are used again get wrong; ask for a reuse memory of 0, or "
            "search with the model, which measures it"
        )


def _composer(stored: StoredSearch, config: SearchConfig) -> Composer:
    stored.config = config
    return composer_of(stored)


def _best(stored: StoredSearch) -> tuple[Candidate, dict[str, Any] | None, bool]:
    """As the search itself chooses, where it validated these plans; else the plan that is predicted best.

    Also whether the search fitted a repair for the plan, which may have found that no head gains by one.
    """
    composer, clips = composer_of(stored), stored.clips
    (chosen,), quality = compose_plans(stored, composer, 1), None
    digest = plan_digest(chosen.plan)
    if clips and is_validated(stored, digest, clips):
        candidates = compose_plans(stored, composer, stored.config.tried_plans)
        if all(is_validated(stored, plan_digest(each.plan), clips) for each in candidates):
            chosen, quality = judged(stored, candidates, clips)
            digest = plan_digest(chosen.plan)
    known = stored.repair(digest) if stored.config.fits_repair else None
    if known is None:
        return chosen, quality, False
    found = replace(chosen, plan=with_repair(stored, chosen.plan, *known))
    if found.plan.repair is None or quality is None:
        return found, quality, True
    if not is_validated(stored, plan_digest(found.plan), clips):
        return chosen, quality, True
    return *better_with_repair(stored, chosen, quality, found, judged(stored, [found], clips)[1]), True


def _for_target(stored: StoredSearch, target: float) -> tuple[Candidate, dict[str, Any]]:
    """The cheapest plan that was validated on all clips and keeps the target on each."""
    config, clips = stored.config, stored.clips
    tried = [each for each in stored.tried() if is_validated(stored, each.plan, clips)]
    rows = {each.plan: [stored.validation(i, each.plan) for i in range(clips)] for each in tried}
    worst = {plan: min(row.ssim or 0.0 for row in found if row is not None) for plan, found in rows.items()}
    keeping = sorted((each for each in tried if worst[each.plan] >= target), key=lambda each: each.time)
    if not keeping:
        best = f"; the best of them has {max(worst.values()):.4f}" if worst else ""
        raise BadInput(
            f"none of the {len(tried)} plans that were validated on {clips} clips keeps an SSIM of {target:g}{best}: "
            "search with the model, which tries others, or give a budget or density"
        )
    asked = keeping[0]
    composer = _composer(stored, replace(config, budget=asked.budget, density=asked.density, target=None))
    chosen = _composed(stored, composer, asked)
    if asked.plan != asked.base:
        known = stored.repair(asked.base)
        chosen = chosen if known is None else replace(chosen, plan=with_repair(stored, chosen.plan, *known))
    if plan_digest(chosen.plan) != asked.plan:
        raise BadInput(
            "the plan that was validated cannot be composed again on this machine, which rounds otherwise; "
            "search with the model, or give a budget or density"
        )
    stored.config = config
    _, quality = judged(stored, [chosen], clips)
    about = chosen.plan.record["search"]
    about["target"] = target
    quality |= {
        "target": target,
        "reached": True,
        "density": about["trajectory_density"],
        "held_out": stored.num_prompts > stored.prompts_traced,
    }
    stored.say(str(quality_line({"quality": quality})))
    stored.say(f"of {len(tried)} validated plans it is the sparsest that keeps the target; a search may find a sparser")
    return chosen, quality


def _composed(stored: StoredSearch, composer: Composer, asked: Tried) -> Candidate:
    """The plan again: one of those among which validation chose."""
    first = compose_plans(stored, composer, 1)
    if plan_digest(first[0].plan) == asked.base or asked.candidates == 1:
        return first[0]
    found = compose_plans(stored, composer, asked.candidates)
    return next((each for each in found if plan_digest(each.plan) == asked.base), first[0])
