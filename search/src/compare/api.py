"""Which of these methods works on this model? One call answers."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffsparse import __version__
from diffsparse.pipelines import architecture_of, find_transformers
from diffsparse.plan import SparsityPlan
from diffsparse.search.api import asked_settings
from diffsparse.search.compare.files import write_comparison
from diffsparse.search.compare.methods import parse_methods
from diffsparse.search.compare.record import Record, Shard
from diffsparse.search.compare.result import Comparison, read_result
from diffsparse.search.compare.rows import DENSITIES, Row, check_densities, plans_by_name, rows_of
from diffsparse.search.compare.run import Runner
from diffsparse.search.environment import environment
from diffsparse.search.errors import BadInput
from diffsparse.search.evaluate import device_of
from diffsparse.search.generate import GenerationSettings, check_seeds
from diffsparse.search.identity import model_identity
from diffsparse.search.inputs import GenerationInput, Input, as_inputs, contents
from diffsparse.search.intact import check_dense, intact
from diffsparse.search.load import check_backend, check_output, model_class
from diffsparse.search.recompose import searched_model

__all__ = ["compare_methods"]

logger = logging.getLogger("diffsparse")


def compare_methods(
    pipe: Any,
    inputs: Sequence[GenerationInput],
    *,
    out: str | os.PathLike[str],
    methods: str | Sequence[str] = "all",
    densities: Sequence[float] = DENSITIES,
    plans: Mapping[str, SparsityPlan | str | os.PathLike[str]] | Sequence[SparsityPlan | str | os.PathLike[str]] = (),
    searched: str | os.PathLike[str] | None = None,
    seeds: Sequence[int] = (1000, 1001),
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    true_cfg_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    negative_prompt: str | None = None,
    backend: str = "auto",
    lpips: bool = False,
    calls: bool = False,
    shard: str | None = None,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
) -> Comparison:
    """Compare methods and plans with dense attention and with each other, on the same clips.

    Every method is a preset that is brought to each density by its one knob; where its density depends on queries and
    keys, by generations of the first clip. A method that fails, or cannot be brought to a density, is a row with its
    reason. Clips are stored as they are finished: the same call goes on where it was stopped, and one with more
    methods, densities or plans adds rows.

    The pipeline is taken as it is set up and left so, also where something is raised.

    Args:
        pipe: a diffusers pipeline. Sparse attention must be off.
        inputs: as :func:`diffsparse.search_plan` takes them.
        out: the folder of the comparison: its record, clips, plans, and what it found as ``compare.json``,
            ``compare.csv``, ``pareto.png`` and ``compare.html``.
        methods: ``"all"``, or names of presets.
        densities: whole-trajectory densities that methods are brought to, dense steps counted.
        plans: further rows, each at its own density: plans or folders, by name or in a list.
        searched: the folder of a search, from whose record a plan is composed for each density.
        seeds: of the noise; every input is made with each.
        num_inference_steps, guidance_scale, true_cfg_scale, height, width, num_frames: sizes in pixels; where not given
            what the first plan was searched with, else the pipeline's own.
        negative_prompt: for all inputs; one may have its own instead.
        backend: attention backend of all rows. ``"auto"`` is the fastest that can run here, and sparse also where a
            table says that dense attention would be faster.
        lpips: whether LPIPS is computed, where the package and its weights are here.
        calls: whether the relative errors and times of single attention calls are measured, too, on q, k and v of a few
            layers and steps of a dense generation.
        shard: ``"2/4"``: make only the second of four parts of the rows, beside other processes with the same ``out``.
            A call without it, when they have ended, puts all together and times each row alone.
        progress: whether bars are shown on stderr.
        say: receives the lines meant for a user. They are logged where not given.

    Returns:
        All rows; of a shard those that are known so far.

    Raises:
        BadInput: in one line for inputs or options that cannot work, before anything runs.
        StoreMismatch: where ``out`` holds a comparison with other settings.
        StoreLocked: where another process works in ``out``.
    """
    names, wanted = parse_methods(methods), check_densities(densities)
    part = None if shard is None else Shard.parse(shard)
    given, all_seeds = as_inputs(inputs), check_seeds(seeds)
    if not given:
        raise BadInput("there is no input to generate; give at least one prompt")
    named = plans_by_name(plans)
    source = None if searched is None else Path(searched)
    groups = rows_of(names, wanted, source is not None, named)
    if not groups:
        raise BadInput("there is nothing to compare: give methods, plans, or the folder of a search")
    if source is not None:
        _check_searched(pipe, source)
    check_dense(pipe)
    check_backend(backend)
    settings = asked_settings(
        pipe,
        given,
        _recorded(named, source),
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        true_cfg_scale=true_cfg_scale,
        height=height,
        width=width,
        num_frames=num_frames,
        negative_prompt=negative_prompt,
    ).resolved(pipe)
    folder = check_output(out)
    cases = [(one, seed) for one in given for seed in all_seeds]
    rows = [row for group in groups for row in group]
    about = environment(device_of(pipe))
    tell = logger.info if say is None else say
    with (
        intact(pipe),
        Record(folder, _identity(pipe, given, all_seeds, settings, backend, about), cases, part) as record,
    ):
        runner = Runner(
            pipe,
            record,
            settings,
            backend=backend,
            lpips=lpips,
            searched=source,
            shard=part,
            progress=progress,
            say=tell,
        )
        mine = [row for place, group in enumerate(groups) if part is None or part.mine(place) for row in group]
        runner.prepare(rows)
        left = sum(len(record.missing(row.key)) for row in mine)
        tell(
            f"{len(given)} inputs x {len(all_seeds)} seeds, {len(mine)} rows: {left} of {len(mine) * len(cases)} clips "
            "are still to be made"
        )
        _make(runner, mine, part, calls)
        result = read_result(
            record, rows, wanted, asdict(settings), about, f"{type(pipe).__name__}, {model_class(pipe)}"
        )
        if part is not None:
            tell(f"shard {part} is done; when all are, run the same command without --shard")
            return result
        return write_comparison(folder, result, sorted(runner.shown))


def _make(runner: Runner, rows: Sequence[Row], part: Shard | None, calls: bool) -> None:
    runner.make_dense()
    if part is None:
        runner.measure_floor()
    runner.make_rows(rows)
    if part is None:
        runner.time_rows(rows)
        if calls:
            runner.measure_calls(rows)


def _check_searched(pipe: Any, folder: Path) -> None:
    """Raises :class:`BadInput` where the folder's search is not finished, or of another model."""
    known = searched_model(folder)
    for transformer in find_transformers(pipe).values():
        if differences := known.differences(architecture_of(transformer)):
            raise BadInput(f"the search in {str(folder)!r} is of another model: {'; '.join(differences)}")


def _recorded(plans: Mapping[str, SparsityPlan], searched: Path | None) -> Mapping[str, Any]:
    """The record of a plan that says what it was searched with."""
    if plans:
        return next(iter(plans.values())).record
    if searched is not None and (searched / "sparse_plan.json").is_file():
        return SparsityPlan.from_pretrained(searched).record
    return {}


def _identity(
    pipe: Any,
    inputs: Sequence[Input],
    seeds: Sequence[int],
    settings: GenerationSettings,
    backend: str,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """What all clips of a folder have in common: figures of others must not stand beside them."""
    threads = about["threads"] if str(about["device"]).startswith("cpu") else None
    return {
        "version": __version__,
        "comparison": 1,
        **model_identity(pipe),
        "inputs": contents(inputs),
        "seeds": list(seeds),
        **asdict(settings),
        "backend": backend,
        "device": about["device"],
        "threads": threads,
    }
