"""``diffsparse search``"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from diffsparse.search.commands.common import (
    Device,
    Dtype,
    Frames,
    Guidance,
    Height,
    Json,
    Model,
    Prompts,
    Steps,
    TrueCfg,
    Width,
    answers,
    asked_settings,
    check_numbers,
    check_share,
    interruptible,
    say,
)
from diffsparse.search.errors import BadInput

__all__ = ["search_command"]


@interruptible("what was found is kept; run the same command again to go on from there")
def search_command(
    model: Model,
    prompts: Prompts,
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="Where the plan and the search's record go.")],
    budget: Annotated[
        float | None, typer.Option("--budget", help="Share of the dense attention time to use.  [default: 0.4]")
    ] = None,
    density: Annotated[
        float | None, typer.Option("--density", help="Whole-trajectory density to use, instead of --budget.")
    ] = None,
    height: Height = None,
    width: Width = None,
    num_frames: Frames = None,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    true_cfg_scale: TrueCfg = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the noise and of every random choice.")] = 0,
    validate: Annotated[
        int,
        typer.Option("--validate", help="Prompts on which whole generations choose among the best few plans; 0: none."),
    ] = 1,
    trace_prompts: Annotated[
        int | None,
        typer.Option(
            "--trace-prompts",
            help="Prompts to measure attention on: more make masks carry over better.  [default: 4 on a GPU, else 2]",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option("--samples", help="Queries measured of every block of queries.  [default: 12 on a GPU, else 4]"),
    ] = None,
    repair: Annotated[
        bool,
        typer.Option("--repair/--no-repair", help="Fit what the plan's heads get wrong, so that a run corrects it."),
    ] = True,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Search a sparsity plan for a model, measured on a few prompts and on this machine.

    It prints how long it will take before it starts. Killed or interrupted, the same command goes on where it was.

    \b
    Example:
      diffsparse search Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompts prompts.txt --out plan --budget 0.4
    """
    with answers(as_json) as answer:
        if budget is not None and density is not None:
            raise BadInput(f"--budget {budget} and --density {density}: give one of the two")
        check_share("--budget", budget)
        check_share("--density", density)
        check_numbers(height=height, width=width, num_frames=num_frames, steps=steps, seed=seed, validate=validate)
        check_numbers(guidance_scale=guidance_scale, true_cfg_scale=true_cfg_scale)
        check_numbers(trace_prompts=trace_prompts, samples=samples)
        from diffsparse.search import load

        found = load.read_prompts(prompts)
        load.check_model_name(model)
        place = load.choose_device(device)
        precision = load.choose_dtype(dtype, place)
        folder = load.check_output(out)
        from diffsparse.search.search import SearchConfig, search_plan, thoroughness

        load.quiet_libraries()
        pipe = load.load_pipeline(model, device=place, dtype=precision)
        asked: dict[str, Any] = {"height": height, "width": width, "num_frames": num_frames, "steps": steps}
        asked |= {"guidance_scale": guidance_scale, "true_cfg_scale": true_cfg_scale}
        settings = asked_settings(pipe, {}, asked)
        config = SearchConfig(
            budget=None if density is not None else (0.4 if budget is None else budget),
            density=density,
            height=settings.height,
            width=settings.width,
            num_frames=settings.num_frames,
            steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            true_cfg_scale=settings.true_cfg_scale,
            seed=seed,
            validation_prompts=validate,
            repair=repair,
            **thoroughness(place, trace_prompts, samples),
        )
        plan = search_plan(pipe, found, config, folder, say=say)
        from diffsparse.search.measured import figures_beside
        from diffsparse.search.show import describe, grid_of, plan_table

        on, figures = grid_of(plan, folder), figures_beside(plan, folder)
        answer(
            {"plan": str(folder), **describe(plan, on, figures)},
            f"{plan_table(plan, on, figures)}\n\n"
            f"The plan is in {folder}. Check it on prompts that the search did not see:\n"
            f"  diffsparse eval {model} {folder} --prompts FILE",
        )
