"""``diffsparse search``"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffsparse.search.commands.common import (
    Device,
    Dtype,
    Frames,
    Guidance,
    Height,
    Json,
    Loras,
    Offload,
    Quantize,
    Scheduler,
    Steps,
    TrueCfg,
    Width,
    answers,
    check_numbers,
    check_rows,
    check_share,
    check_target,
    interruptible,
    read_size,
    say,
)
from diffsparse.search.errors import BadInput

if TYPE_CHECKING:
    from diffsparse.plan import SparsityPlan

__all__ = ["search_command"]


@interruptible("what was found is kept; run the same command again to go on from there")
def search_command(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="A diffusers pipeline: a local folder or a Hub id; none with --from."),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help='A text file with one prompt a line, or JSON lines: {"prompt": ..., "image": ...}.',
        ),
    ] = None,
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="Where the plan and the search's record go.")] = "",
    record: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="DIR",
            help="Compose another plan from what the search in this folder measured, without the model.",
        ),
    ] = None,
    budget: Annotated[
        float | None, typer.Option("--budget", help="Share of the dense attention time to use, instead of --target.")
    ] = None,
    density: Annotated[
        float | None, typer.Option("--density", help="Whole-trajectory density to use, instead of --target.")
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(
            "--target",
            help="SSIM to dense that every validation clip keeps: the sparsest such plan is found.  [default: 0.95]",
        ),
    ] = None,
    points: Annotated[
        int | None, typer.Option("--points", help="Plans to validate on the way to the target, at most.  [default: 4]")
    ] = None,
    height: Height = None,
    width: Width = None,
    num_frames: Frames = None,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    true_cfg_scale: TrueCfg = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the noise and of every random choice.")] = 0,
    validate: Annotated[
        int | None,
        typer.Option(
            "--validate",
            help="Clips that plans are validated on, of prompts that were not measured; 0: none.  "
            "[default: 2 for a target, else 1]",
        ),
    ] = None,
    trace_prompts: Annotated[
        int | None,
        typer.Option(
            "--trace-prompts",
            help="Prompts to measure attention on: more make masks carry over better.  "
            "[default: 2; on a GPU 4 where that takes minutes, 8 where it takes seconds]",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples",
            help="Queries measured of every block of queries.  [default: 4; 12 on a GPU, fewer above 20,000 tokens]",
        ),
    ] = None,
    repair: Annotated[
        bool,
        typer.Option("--repair/--no-repair", help="Fit what the plan's heads get wrong, so that a run corrects it."),
    ] = True,
    repair_rows: Annotated[
        int,
        typer.Option(
            "--repair-rows",
            metavar="N",
            help="Have every call fit its repair, by N queries that it attends exactly; 0: the search fits it.",
        ),
    ] = 0,
    reuse_memory: Annotated[
        float | None,
        typer.Option(
            "--reuse-memory",
            metavar="GB",
            help="Outputs that a run may keep to use them again at later steps; 0: none.  "
            "[default: a quarter of the dense run's memory on a GPU, else 1]",
        ),
    ] = None,
    also_size: Annotated[
        str | None,
        typer.Option(
            "--also-size",
            metavar="HEIGHTxWIDTH[xFRAMES]",
            help="A second size to measure attention at, as 832x480x81: masks and choices are made for both.",
        ),
    ] = None,
    lora: Loras = None,
    scheduler: Scheduler = None,
    offload: Offload = "none",
    quantize: Quantize = "none",
    device: Device = "auto",
    dtype: Dtype = "auto",
    num_processes: Annotated[
        int | None,
        typer.Option(
            "--num-processes",
            metavar="N",
            help="Share the search out over N processes of this machine, each on a GPU of its own, or all on the CPU.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Search a sparsity plan for a model, measured on a few prompts and on this machine.

    It finds the sparsest plan whose clips keep the target; a budget or a density is for those who know theirs.

    It prints how long it will take before it starts. Killed or interrupted, the same command goes on where it was.

    Several GPUs share it with --num-processes, or under torchrun or accelerate launch -m diffsparse: the same plan.

    With --from it composes a plan for another budget, density or target from what a search measured, in a minute and
    without the model.

    \b
    Example:
      diffsparse search Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompts prompts.txt --out plan
      diffsparse search Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompts prompts.txt --out plan --target 0.9
      diffsparse search Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompts prompts.txt --out plan --budget 0.4
      diffsparse search Wan-AI/Wan2.1-I2V-14B-480P-Diffusers --prompts inputs.jsonl --out plan
      diffsparse search Wan-AI/Wan2.1-T2V-14B-Diffusers --prompts prompts.txt --out plan --num-processes 4
      diffsparse search --from plan --budget 0.2 --out smaller
    """
    with answers(as_json) as answer:
        if not out:
            raise BadInput("--out is missing: give the folder where the plan goes")
        asked_for = {"--budget": budget, "--density": density, "--target": target}
        given = [f"{option} {value}" for option, value in asked_for.items() if value is not None]
        if len(given) > 1:
            raise BadInput(f"{' and '.join(given)}: give one of the three")
        check_share("--budget", budget)
        check_share("--density", density)
        check_target(target)
        if points is not None and (budget is not None or density is not None):
            raise BadInput(f"{given[0]} and --points {points}: points are of a search for a target; leave one out")
        if validate == 0 and budget is None and density is None:
            raise BadInput("--validate 0: a target is measured on whole generations; give 1 or more, or --budget")
        check_numbers(height=height, width=width, num_frames=num_frames, steps=steps, seed=seed, validate=validate)
        check_numbers(guidance_scale=guidance_scale, true_cfg_scale=true_cfg_scale)
        check_numbers(trace_prompts=trace_prompts, samples=samples, points=points, reuse_memory=reuse_memory)
        check_numbers(repair_rows=repair_rows)
        check_rows(repair_rows, repair)
        check_numbers(num_processes=num_processes)
        second = read_size("--also-size", also_size)
        from diffsparse.search import load, ranks

        def told(plan: SparsityPlan, folder: Path, name: str) -> None:
            from diffsparse.search.measured import figures_beside
            from diffsparse.search.show import describe, grid_of, plan_table

            on, figures = grid_of(plan, folder), figures_beside(plan, folder)
            answer(
                {"plan": str(folder), **describe(plan, on, figures)},
                f"{plan_table(plan, on, figures)}\n\n"
                f"The plan is in {folder}. Check it on prompts that the search did not see:\n"
                f"  diffsparse eval {name} {folder} --prompts FILE",
            )

        if record is not None:
            _check_free(context, given)
            from diffsparse.search.recompose import compose_plan

            folder = load.check_output(out)
            own = {name: v for name, v in context.params.items() if name in FREE and _is_given(context, name)}
            plan = compose_plan(
                record,
                out=folder,
                num_inference_steps=own.pop("steps", None),
                say=say,
                **own,
            )
            told(plan, folder, "MODEL")
            return
        if model is None or prompts is None:
            lacking = "MODEL" if model is None else "--prompts"
            raise BadInput(f"{lacking} is missing: a search needs a model and prompts; with --from it needs neither")

        place = ranks.launched()
        if place is not None and num_processes not in (None, place.count):
            raise BadInput(
                f"--num-processes {num_processes}: a launcher has started {place.count} already; leave it out"
            )
        if place is None and num_processes is not None and num_processes > 1:
            from diffsparse.search.launch import check_processes, launch

            check_processes(num_processes, device)
            raise typer.Exit(launch(num_processes, ["-m", "diffsparse.search", *context.obj]))
        with ranks.sharing(place) as members:
            from diffsparse.search.inputs import read_inputs
            from diffsparse.search.setup import Setup

            with nullcontext() if members is None else members.together():
                found = read_inputs(prompts)
                setup = Setup.parse(lora or (), scheduler, offload, quantize)
                load.check_model_name(model)
                where = load.choose_device(device) if place is None else place.device(device)
                precision = load.choose_dtype(dtype, where)
                leads = members is None or members.leads
                folder = load.check_output(out) if leads else Path(out)
                from diffsparse.search.api import search_plan

                load.quiet_libraries()
                pipe = load.load_pipeline(model, device=where, dtype=precision, setup=setup)
            plan = search_plan(
                pipe,
                found,
                out=folder,
                target=target,
                budget=budget,
                density=density,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                true_cfg_scale=true_cfg_scale,
                height=height,
                width=width,
                num_frames=num_frames,
                seed=seed,
                points=points,
                validate=validate,
                trace_prompts=trace_prompts,
                samples=samples,
                repair=repair,
                repair_rows=repair_rows,
                reuse_memory=reuse_memory,
                also_size=second,
                about=setup.about,
                progress=leads,
                say=say if leads else lambda line: None,
                ranks=members,
            )
            if leads:
                told(plan, folder, model)


#: What ``--from`` takes: nothing that was measured depends on it.
FREE = ("budget", "density", "target", "steps", "repair", "repair_rows", "reuse_memory")


def _is_given(context: typer.Context, name: str) -> bool:
    return str(getattr(context.get_parameter_source(name), "name", "")) == "COMMANDLINE"


def _check_free(context: typer.Context, given: list[str]) -> None:
    """With ``--from``: raises :class:`BadInput` for what only a search with the model can take."""
    others = [name for name in context.params if name not in (*FREE, "out", "record", "as_json")]
    asked = sorted(name for name in others if _is_given(context, name))
    if asked:
        shown = ", ".join("MODEL" if name == "model" else "--" + name.replace("_", "-") for name in asked)
        raise BadInput(
            f"--from and {shown}: a record was measured with a model and settings of its own, and nothing is "
            "generated; leave out one or the other"
        )
    if not given:
        raise BadInput("--from needs to know what the plan is for: give --budget, --density or --target")
