"""``diffsparse compare``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffsparse.search.commands.common import (
    Device,
    Dtype,
    Frames,
    Guidance,
    Height,
    Json,
    Loras,
    Model,
    Offload,
    Prompts,
    Quantize,
    Scheduler,
    Steps,
    TrueCfg,
    Width,
    answers,
    check_numbers,
    interruptible,
    say,
)
from diffsparse.search.errors import BadInput

__all__ = ["compare_command"]


@interruptible("what was finished is kept; run the same command again to go on from there")
def compare_command(
    model: Model,
    prompts: Prompts,
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="Where record, clips, tables and page go.")],
    methods: Annotated[
        str, typer.Option("--methods", help="all, none, or names of presets with commas between them.")
    ] = "all",
    densities: Annotated[
        str, typer.Option("--densities", help="Shares of dense attention over a whole generation, a list.")
    ] = ".5,.35,.25",
    plan: Annotated[
        list[str] | None,
        typer.Option("--plan", metavar="PLAN", help="A plan's folder as a row of its own; may be given again."),
    ] = None,
    searched: Annotated[
        str | None,
        typer.Option("--from", metavar="DIR", help="The folder of a search: a plan is composed for each density."),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="Clips of each prompt, each with a seed of its own.")] = 2,
    first_seed: Annotated[int, typer.Option("--first-seed", help="The first of the seeds.")] = 1000,
    height: Height = None,
    width: Width = None,
    num_frames: Frames = None,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    true_cfg_scale: TrueCfg = None,
    lpips: Annotated[bool, typer.Option("--lpips/--no-lpips", help="LPIPS too, where it is installed.")] = True,
    backend: Annotated[str, typer.Option("--backend", help="Attention backend: auto, or a name of `env`.")] = "auto",
    calls: Annotated[
        bool, typer.Option("--calls", help="Relative errors and times of single attention calls, too.")
    ] = False,
    shard: Annotated[
        str | None,
        typer.Option("--shard", metavar="I/N", help="Make the I-th of N parts; others run beside it, in the same DIR."),
    ] = None,
    lora: Loras = None,
    scheduler: Scheduler = None,
    offload: Offload = "none",
    quantize: Quantize = "none",
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Which of these methods works on my model? Methods and plans at equal density, on the same clips.

    Without --plan and --from, the plan in the model's folder is a row, if there is one. Stopped, the same command goes
    on where it was; with more methods, densities or plans it adds rows.

    \b
    Example:
      diffsparse compare Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompts held_out.txt --from plan --out comparison
    """
    with answers(as_json) as answer:
        check_numbers(seeds=seeds, first_seed=first_seed, steps=steps)
        check_numbers(height=height, width=width, num_frames=num_frames)
        check_numbers(guidance_scale=guidance_scale, true_cfg_scale=true_cfg_scale)
        from diffsparse.search import load
        from diffsparse.search.compare.api import compare_methods
        from diffsparse.search.compare.methods import parse_methods
        from diffsparse.search.compare.record import Shard
        from diffsparse.search.compare.rows import check_densities, plans_by_name
        from diffsparse.search.inputs import read_inputs
        from diffsparse.search.recompose import searched_model
        from diffsparse.search.setup import Setup

        names = parse_methods(methods)
        wanted = check_densities(_numbers(densities))
        if shard is not None:
            Shard.parse(shard)
        found = read_inputs(prompts)
        setup = Setup.parse(lora or (), scheduler, offload, quantize)
        load.check_model_name(model)
        own = Path(model) / "sparse_plan"
        if not plan and searched is None and own.is_dir():
            plan = [str(own)]
        plans = plans_by_name(plan or ())
        if searched is not None:
            searched_model(searched)
        place = load.choose_device(device)
        precision = load.choose_dtype(dtype, place)
        load.check_backend(backend)
        load.check_output(out)
        load.quiet_libraries()
        pipe = load.load_pipeline(model, device=place, dtype=precision, setup=setup)
        result = compare_methods(
            pipe,
            found,
            out=out,
            methods=names,
            densities=wanted,
            plans=plans,
            searched=searched,
            seeds=range(first_seed, first_seed + seeds),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            true_cfg_scale=true_cfg_scale,
            height=height,
            width=width,
            num_frames=num_frames,
            backend=backend,
            lpips=lpips,
            calls=calls,
            shard=shard,
            say=say,
        )
        text = result.table()
        if result.files:
            text += "\n\nwritten: " + ", ".join(result.files)
        answer(result.to_dict(), text)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise BadInput(
            f"--densities {text[:60]}: shares of dense attention with commas between them, for example .5,.35,.25"
        ) from None
