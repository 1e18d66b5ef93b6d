"""The search: probe, trace, sensitivity, compose, validate, repair. Prompts go in, a sparsity plan comes out."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffsparse
from diffsparse.plan import SparsityPlan
from diffsparse.search.compose import Candidate
from diffsparse.search.config import FREE_SETTINGS, SearchConfig, thoroughness
from diffsparse.search.errors import BadInput
from diffsparse.search.identity import model_identity
from diffsparse.search.inputs import GenerationInput, as_inputs, check_inputs, contents
from diffsparse.search.layers import common_architecture, main_grid
from diffsparse.search.ranks import Ranks, leading
from diffsparse.search.sharing import remove_files, serve, shared_store
from diffsparse.search.shortened import check_steps
from diffsparse.search.stages.also import begin_also, end_also
from diffsparse.search.stages.compose import compose_plans, composer_of, layer_costs, measure_rest
from diffsparse.search.stages.probe import run_probe
from diffsparse.search.stages.repair import mended, repaired
from diffsparse.search.stages.report import facts_of, write_plan
from diffsparse.search.stages.sensitivity import effect_steps, inject_steps, layer_groups, most_groups
from diffsparse.search.stages.target import search_target
from diffsparse.search.stages.trace import run_trace
from diffsparse.search.stages.validate import cases, tried_plan, validate
from diffsparse.search.store import STORE_FORMAT, SearchStore
from diffsparse.search.workspace import Probe, Workspace

__all__ = ["FREE_SETTINGS", "SearchConfig", "search_plan", "thoroughness"]

log = logging.getLogger("diffsparse")


def search_plan(
    pipe: Any,
    prompts: Sequence[GenerationInput],
    config: SearchConfig,
    out: Path,
    *,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
    on_stage: Callable[[str, int, int], None] | None = None,
    about: Mapping[str, Any] | None = None,
    ranks: Ranks | None = None,
) -> SparsityPlan:
    """Search a plan and write it to ``out``, with ``search.sqlite`` (to go on after a kill) and the pictures' data.

    ``say`` receives the lines meant for the user (the estimate, what was chosen), ``on_stage`` a stage's name, how many
    of its parts are done, and of how many. What they raise ends the search; the same call then goes on where it was.
    ``about``: what else the record says of the model. ``ranks``: the processes that share the search, which all call
    this alike; rank 0 talks and writes, and all return the plan.
    Raises :class:`BadInput` for settings that cannot work, :class:`StoreMismatch` where ``out`` holds another search.
    """
    if not prompts:
        raise BadInput("a search needs at least one prompt")
    say = say or log.info
    out, inputs = Path(out), as_inputs(prompts)
    check_inputs(pipe, inputs)
    config = config.resolved(pipe, inputs[0].arguments).for_heads(common_architecture(pipe).head_dim)
    identity = {
        "format": STORE_FORMAT,
        "version": diffsparse.__version__,
        "architecture": common_architecture(pipe).fingerprint,
        **model_identity(pipe),
        "prompts": hashlib.sha256(json.dumps(contents(inputs)).encode()).hexdigest(),
        **{k: v for k, v in asdict(config).items() if k not in FREE_SETTINGS},
    }
    path = out / "search.sqlite"
    if ranks is not None:
        ranks.agree(identity | asdict(config) | {"out": str(out.absolute())})
        if not ranks.leads:
            serve(lambda store: Workspace(pipe, inputs, config, store, False, _quiet, _quiet, ranks=ranks), ranks, path)
            return SparsityPlan.from_pretrained(out)
    with leading(ranks), SearchStore(path) as store:
        work = Workspace(pipe, inputs, config, store, progress, say, on_stage or _quiet, ranks=ranks)
        if store.claim(identity):
            say(f"going on with the search in {out}")
        if ranks is None:
            plan = _run(work, out, about or {})
            remove_files(store)
            return plan
        with shared_store(store) as work.apart:
            return _run(work, out, about or {})


def _quiet(*_: Any) -> None:
    pass


def _run(work: Workspace, out: Path, model: Mapping[str, Any]) -> SparsityPlan:
    config, begin = work.config, time.perf_counter()
    check_steps(work)
    run_probe(work, partial(_announce, work))
    if dense := work.probe.dense:
        name, reason = next(iter(dense.items()))
        work.say(f"{len(dense)} other layers stay dense ({name}: {reason})")
    begin_also(work)
    layer_costs(work)
    run_trace(work)
    end_also(work)
    measure_rest(work)
    work.put_facts(facts_of(work, model))
    composer = composer_of(work)
    quality: dict[str, Any] | None
    if config.goal is not None:
        seconds = time.perf_counter() - begin
        chosen, quality = search_target(work, composer)
    else:
        candidates = compose_plans(work, composer, config.tried_plans)
        seconds = time.perf_counter() - begin
        chosen, quality = _best(work, candidates)
    if quality is not None:
        chosen.plan.record["quality"] = quality
    return write_plan(work, chosen, seconds, out)


def _best(work: Workspace, candidates: list[Candidate]) -> tuple[Candidate, dict[str, Any] | None]:
    """The best of the plans for one budget or density, with its repair, and what validation says of it."""
    if work.config.clips:
        best, quality = validate(work, candidates)
        chosen, quality = mended(work, best, quality) if work.config.fits_repair else (best, quality)
        work.put_tried(tried_plan(chosen, best, work.config))
        return chosen, quality
    chosen = candidates[0]
    return (replace(chosen, plan=repaired(work, chosen.plan)) if work.config.fits_repair else chosen), None


def _announce(work: Workspace, probe: Probe) -> None:
    """Tell what will be searched, and how long that will take."""
    grid = main_grid(probe.grids)
    work.say(f"{grid} = {grid.seq_len} tokens, {len(probe.grids)} layers of {work.architecture.heads} heads")
    seconds, validation = _estimate(work, probe), _validation(work, probe)
    text = f"estimate: {(seconds + validation.seconds) / 60:.1f} minutes"
    if validation.generations:
        text += (
            f" at most, {validation.seconds / 60:.1f} of them for validation: {validation.generations} generations of "
            f"{work.config.steps} steps"
        )
    work.say(text)


#: Time to score a model call, as a share of the call itself. On a GPU each layer adds so many seconds, however few its
#: tokens: starting the kernels takes that long.
_SCORING, _LAYER = 0.3, 0.02
#: Model calls of sparse attention with exact rows beside it, over dense ones.
_FITTING = 0.7
#: Seconds for each head to choose entries and to make masks; for costs and pieces of the pipeline on a GPU.
_CHOOSING, _SETTING_UP = 0.03, 45.0


def _estimate(work: Workspace, probe: Probe) -> float:
    """Seconds that a search takes after its first step, validation apart."""
    config, branches = work.config, probe.branches
    steps = config.trace_steps
    prompts = min(probe.prompts, len(work.prompts))
    scoring = _SCORING
    if work.device.type == "cuda":
        scoring += _LAYER * len(probe.grids) / probe.forward_seconds
    screened = 2 * scoring * len(work.layer_orders(main_grid(probe.grids))) / 2
    ranks = 1 if work.ranks is None else work.ranks.count
    # A prompt for each rank at once, then what masks of the prompts before leave of all but the first of them.
    rounds = math.ceil(prompts / ranks)
    generations = rounds + (prompts - rounds) / ranks
    calls = 3 + screened + generations * steps * (1 + scoring)
    if config.also_size is not None:  # attention grows faster than the tokens
        calls += 2 * steps * (1 + scoring) * _also_tokens(config) ** 1.5
    calls += math.ceil(len(effect_steps(work)) * len(layer_groups(tuple(probe.grids), most_groups(probe))) / ranks)
    injected = [steps - step for step in inject_steps(work)]
    calls += (max(injected) if ranks > 1 else sum(injected)) + steps  # an error in a step; outputs used again
    if work.config.fits_repair:
        calls += math.ceil(max(2, prompts) / ranks) * steps * _FITTING * work.config.tries
    heads = len(probe.grids) * work.architecture.heads
    rest = _CHOOSING * heads + (_SETTING_UP if work.device.type == "cuda" else 5.0)
    return calls * branches * probe.forward_seconds + rest


def _also_tokens(config: SearchConfig) -> float:
    """Tokens of the second size over those of the first one; 1 where the first is not known."""
    assert config.also_size is not None
    pairs = zip(config.also_size, (config.height, config.width, config.num_frames), strict=True)
    return math.prod(other / own for other, own in pairs if other and own)


@dataclass(frozen=True)
class _Validation:
    """``seconds`` as if every generation were dense."""

    generations: int
    seconds: float


def _validation(work: Workspace, probe: Probe) -> _Validation:
    """What validation takes at most."""
    config, clips = work.config, len(cases(work, probe.prompts))
    steps = config.steps
    assert steps is not None  # the settings are resolved
    first = config.tried_plans + config.fits_repair
    later = first if config.tried_plans > 1 else 1
    plans = first + (config.tries - 1) * later
    generations = clips * (1 + plans)
    ranks = 1 if work.ranks is None else work.ranks.count
    one_by_one = math.ceil(clips / ranks) * (1 + plans)
    return _Validation(generations, probe.forward_seconds * probe.branches * steps * one_by_one)
