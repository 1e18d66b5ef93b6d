"""``diffsparse eval``"""

from __future__ import annotations

from typing import Annotated

import typer

from diffsparse.search.commands.common import (
    FAILED,
    Device,
    Dtype,
    Frames,
    Guidance,
    Height,
    Json,
    Loras,
    Model,
    Offload,
    Plan,
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
    stop,
)
from diffsparse.search.errors import BadInput

__all__ = ["eval_command"]


@interruptible("nothing was written; run the command again, with fewer prompts if it takes too long")
def eval_command(
    model: Model,
    plan: Plan,
    prompts: Prompts,
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
    lora: Loras = None,
    scheduler: Scheduler = None,
    offload: Offload = "none",
    quantize: Quantize = "none",
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Annotated[
        str | None, typer.Option("--out", metavar="DIR", help="Write eval.json, a contact sheet and videos there.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare a plan with dense attention, clip by clip, with the same seeds.

    Sizes, steps and guidance are those that the plan was searched with, unless given. Exit code 1 where a clip is
    black, flat, frozen or not a number.

    \b
    Example:
      diffsparse eval Wan-AI/Wan2.1-T2V-1.3B-Diffusers plan --prompts held_out.txt --seeds 2 --out report
    """
    with answers(as_json) as answer:
        check_numbers(seeds=seeds, first_seed=first_seed, steps=steps)
        check_numbers(height=height, width=width, num_frames=num_frames)
        check_numbers(guidance_scale=guidance_scale, true_cfg_scale=true_cfg_scale)
        from diffsparse.search import load
        from diffsparse.search.inputs import read_inputs
        from diffsparse.search.setup import Setup

        found = read_inputs(prompts)
        setup = Setup.parse(lora or (), scheduler, offload, quantize)
        load.check_model_name(model)
        chosen = load.load_plan(plan)
        place = load.choose_device(device)
        precision = load.choose_dtype(dtype, place)
        load.check_backend(backend)
        folder = load.check_output(out) if out else None
        load.quiet_libraries()
        pipe = load.load_pipeline(model, device=place, dtype=precision, setup=setup)
        chosen = load.load_plan(plan, load.model_class(pipe)) if plan in load.PRESETS else chosen
        load.check_plan_runs(chosen, pipe, backend)
        if (differs := setup.differs(chosen.record)) is not None:
            say(differs)
        from diffsparse.search.api import evaluate_plan

        report = evaluate_plan(
            pipe,
            chosen,
            found,
            seeds=range(first_seed, first_seed + seeds),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            true_cfg_scale=true_cfg_scale,
            height=height,
            width=width,
            num_frames=num_frames,
            backend=backend,
            lpips=lpips,
            name=plan,
            say=say,
        )
        data = report.to_dict()
        text = report.table()
        if folder is not None and report.dense is not None:
            from diffsparse.search.report import write_report

            try:
                data["files"] = [str(p) for p in write_report(folder, report, report.dense)]
            except BadInput:
                answer(data, text)  # what was measured is not lost with the files
                raise
            text += "\n\nwritten: " + ", ".join(data["files"])
        answer(data, text)
        if not report.passed:
            stop(f"failed: {report.broken[0]}" + (f", and {n} more" if (n := len(report.broken) - 1) else ""), FAILED)
