"""What the command line calls, and whoever has a pipeline in Python: search a plan, evaluate a plan."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffsparse.plan import SparsityPlan
from diffsparse.search.config import SearchConfig, thoroughness
from diffsparse.search.errors import BadInput
from diffsparse.search.evaluate import DenseSet, EvalReport, device_of
from diffsparse.search.generate import GenerationSettings, check_seeds
from diffsparse.search.inputs import GenerationInput, Input, as_inputs, check_inputs
from diffsparse.search.intact import check_dense, eager, intact
from diffsparse.search.load import check_shape
from diffsparse.search.ranks import Ranks
from diffsparse.search.recorded import recorded_value
from diffsparse.search.signature import parameters

__all__ = ["asked_settings", "evaluate_plan", "search_plan"]

#: The names of options of a call in a plan's record, where they differ.
RECORDED_AS = {"num_inference_steps": "steps"}


def search_plan(
    pipe: Any,
    inputs: Sequence[GenerationInput],
    *,
    out: str | os.PathLike[str],
    target: float | None = None,
    budget: float | None = None,
    density: float | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    true_cfg_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    seed: int = 0,
    points: int | None = None,
    validate: int | None = None,
    candidates: int | None = None,
    trace_prompts: int | None = None,
    trace_steps: int = 8,
    samples: int | None = None,
    dense_steps: int | None = None,
    block_size: int | None = None,
    repair: bool = True,
    repair_rows: int = 0,
    reuse_memory: float | None = None,
    also_size: tuple[int, int, int | None] | None = None,
    about: Mapping[str, Any] | None = None,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
    on_stage: Callable[[str, int, int], None] | None = None,
    ranks: Ranks | None = None,
) -> SparsityPlan:
    """Search a sparsity plan for a pipeline, and write it to the folder ``out``.

    The pipeline is taken as it is set up (LoRA, offloading, scheduler, attention backend) and left so, also where the
    search is stopped. Compiled models are searched without their compiled code. Killed or stopped, the same call goes
    on where it was; for another target, budget, density or number of steps it uses what was measured.

    Args:
        pipe: a diffusers pipeline whose transformer ``diffsparse models`` lists. Sparse attention must be off.
        inputs: prompts, or arguments of the pipeline's call by name, such as ``{"prompt": ..., "image": ...}``;
            pictures and clips in memory or as paths.
        out: where the plan goes, and the search's record.
        target: the SSIM to dense that every validation clip keeps; the sparsest such plan is searched. 0.95 where
            neither this nor ``budget`` nor ``density`` is given; at most one of the three is.
        budget: share of dense attention's time that the plan may take.
        density: whole-trajectory density of the plan.
        num_inference_steps, guidance_scale, true_cfg_scale, height, width, num_frames: of the generations that the plan
            is for, sizes in pixels; the pipeline's own where not given.
        seed: of the noise and of every random choice.
        points: plans that are validated on the way to a target, at most; 4 where not given.
        validate: clips that plans are validated on, of inputs that were not measured; 2 for a target, else 1.
        candidates: plans among which they choose, under one budget; 3, and 1 for a target.
        trace_prompts: how many inputs attention is measured on; up to 8 on a GPU, by what that takes, else 2.
        trace_steps: steps of the generations that are measured.
        samples: queries that are measured of every block of queries; 12 on a GPU, else 4.
        dense_steps: fixes the number of dense first steps, which the search chooses otherwise.
        block_size: tokens of a block, 64 or 128; by the heads' size where not given.
        repair: whether what the plan's heads get wrong is fitted, so that a run corrects it.
        repair_rows: where not 0, each call of a run fits its repair by so many rows, and the search fits none.
        reuse_memory: GB of outputs that a run may keep; a quarter of what the dense run takes on a GPU, else 1.
        also_size: height, width and frames (None for images) of a second size, whose attention is measured as well: the
            plan's masks and choices are made for both sizes. It takes two more generations of few steps.
        about: what else the plan's record is to say of the model, as JSON values: LoRA, offloading and the like.
        progress: whether bars are shown on stderr.
        say: receives the lines meant for a user: the estimate, what was chosen. They are logged where not given.
        on_stage: receives a stage's name, how many of its parts are done, and of how many.
        ranks: the processes that share the search, as ``diffsparse.search.ranks.join`` gives them. All call this with
            the same arguments, each with a pipeline on a device of its own; all get the plan.

    Returns:
        The plan, as ``SparsityPlan.from_pretrained(out)`` reads it.

    Raises:
        BadInput: in one line, before anything runs, for inputs or options that cannot work.
        StoreMismatch: where ``out`` holds the record of another search.
    """
    from diffsparse.search import search as engine

    given = as_inputs(inputs)
    if not given:
        raise BadInput("a search needs at least one prompt")
    check_dense(pipe)
    settings = asked_settings(
        pipe,
        given,
        {},
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        true_cfg_scale=true_cfg_scale,
        height=height,
        width=width,
        num_frames=num_frames,
    )
    config = SearchConfig(
        budget=budget,
        density=density,
        target=target,
        height=settings.height,
        width=settings.width,
        num_frames=settings.num_frames,
        steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        true_cfg_scale=settings.true_cfg_scale,
        seed=seed,
        block_size=block_size,
        trace_steps=trace_steps,
        dense_steps=dense_steps,
        validation_prompts=validate,
        candidates=candidates,
        repair=repair,
        repair_rows=repair_rows,
        points=points,
        reuse_memory=reuse_memory,
        also_size=also_size,
        **thoroughness(device_of(pipe), trace_prompts, samples),
    )
    if config.also_size is not None:
        try:
            check_shape(pipe, *config.also_size)
        except BadInput as error:
            raise BadInput(f"--also-size {config.also_text}: {error}") from None
    with intact(pipe), eager(pipe):
        return engine.search_plan(
            pipe,
            given,
            config,
            Path(out),
            progress=progress,
            say=say,
            on_stage=on_stage,
            about=about,
            ranks=ranks,
        )


def evaluate_plan(
    pipe: Any,
    plan: SparsityPlan | str,
    inputs: Sequence[GenerationInput],
    *,
    seeds: Sequence[int] = (1000, 1001),
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    true_cfg_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    negative_prompt: str | None = None,
    backend: str = "auto",
    dense: DenseSet | None = None,
    noise_floor: bool = True,
    lpips: bool = False,
    name: str | None = None,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
) -> EvalReport:
    """Compare a plan with dense attention: every input with every seed, the same noise dense and sparse.

    The pipeline is taken as it is set up and left so, also where something is raised. The plan and the inputs are
    checked before the first clip is made.

    Args:
        pipe: a diffusers pipeline. Sparse attention must be off.
        plan: a plan, or what ``enable_sparse_attention`` takes by name.
        inputs: as :func:`search_plan` takes them; others than it was given, or the comparison flatters the plan.
        seeds: of the noise.
        num_inference_steps, guidance_scale, true_cfg_scale, height, width, num_frames: sizes in pixels; what the plan
            was searched with where not given, else the pipeline's own.
        negative_prompt: for all inputs; one may have its own instead.
        backend: attention backend of the sparse clips.
        dense: dense clips of an earlier comparison (``EvalReport.dense``), which are not made again; their own inputs,
            seeds and settings hold.
        noise_floor: whether the first clip is made again on another dense kernel, to see how near is near.
        lpips: whether LPIPS is computed, where the package and its weights are here.
        name: of the plan, in tables.
        progress: whether bars are shown on stderr.
        say: receives the line meant for a user, of how many clips are made.

    Raises:
        BadInput: in one line for inputs or options that cannot work.
        PlanError, ValueError: where the plan does not fit the pipeline.
    """
    from diffsparse.search import evaluate as engine

    check_dense(pipe)
    engine.check_plan(pipe, plan, backend)
    with intact(pipe):
        if dense is None:
            given, seeds = as_inputs(inputs), check_seeds(seeds)
            if not given:
                raise BadInput("there is no input to generate; give at least one prompt")
            settings = asked_settings(
                pipe,
                given,
                {} if isinstance(plan, str) else plan.record,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                true_cfg_scale=true_cfg_scale,
                height=height,
                width=width,
                num_frames=num_frames,
                negative_prompt=negative_prompt,
            )
            if say is not None:
                clips = len(given) * len(seeds)
                say(f"{len(given)} inputs x {len(seeds)} seeds: {clips} clips dense, then as many sparse")
            dense = engine.generate_dense(pipe, given, seeds, settings, noise_floor=noise_floor, progress=progress)
        report = engine.compare(pipe, plan, dense, backend=backend, name=name, lpips=lpips, progress=progress)
    return replace(report, dense=dense)


def asked_settings(pipe: Any, inputs: Sequence[Input], record: Mapping[str, Any], **asked: Any) -> GenerationSettings:
    """What was asked for; else what the plan's record says; else None, which is the pipeline's own.

    What only the record says, and this pipeline does not take, is left out. Raises :class:`BadInput` for what it
    cannot take.
    """
    check_inputs(pipe, inputs)
    known, values = parameters(pipe), {}
    for argument, value in asked.items():
        if value is None and argument in known and argument != "negative_prompt":
            value = recorded_value(record, RECORDED_AS.get(argument, argument))
        values[argument] = value
    settings = GenerationSettings(**values)
    check_shape(pipe, settings.height, settings.width, settings.num_frames)
    for one in inputs:
        settings.arguments(pipe, one.arguments)
    return settings
