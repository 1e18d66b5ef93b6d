"""The main job on the small model in this folder: search a plan, attach it, generate with and without it, compare.

    make demo                                   # or: .venv/bin/python examples/demo.py
    .venv/bin/python examples/demo.py --help

It searches for the sparsest plan whose clips keep a target, or with ``--budget`` for the best plan at a budget. Writes
to ``out/``: the plan, videos with dense and sparse side by side, a contact sheet, and a sheet of every layer's and
head's pattern over its measured attention. On a CUDA GPU where there is one.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from diffsparse.search.evaluate import EvalReport

HERE = Path(__file__).resolve().parent
#: SSIM to dense that the clips keep where neither ``--target`` nor ``--budget`` is given.
TARGET = 0.95
#: Clips differ: with one plan the worst of eight lost 2.4 times as much SSIM as the middle one (9 frames of 96x96, 8
#: steps). So that other clips keep the target, those of validation may lose this share of what it allows.
MARGIN = 0.75
#: Of the small model's scheduler. What a clip shows is decided at high noise, so that few steps have to be there: with
#: this shift 97% of 64 held-out captions show their colours in 8 steps, with the folder's 2 it is 67% (one H200, bf16).
SHIFT = 9.0
#: Plans that are validated on the way to a target, at most: each takes up to two generations.
POINTS = 3


def validation_target(target: float) -> float:
    """What the clips of validation have to keep, so that others keep ``target``."""
    return 1 - MARGIN * (1 - target)


def in_order(prompts: list[str], traced: int) -> list[str]:
    """The calibration prompts as the search takes them: those it traces, then those it validates plans on.

    The longest of the others come first, since clips in which more happens lose more.
    """
    return [*prompts[:traced], *sorted(prompts[traced:], key=len, reverse=True)]


def lean(pipe: Any, shift: float | None) -> None:
    """Give the pipeline's scheduler this shift; None leaves it as it is. Raises ``BadInput`` where it has none."""
    from diffsparse.search.errors import BadInput

    if shift is None:
        return
    if not shift > 0 or "shift" not in pipe.scheduler.config:
        name = type(pipe.scheduler).__name__
        raise BadInput(f"--shift {shift:g}: it is above 0, and only schedulers that have a shift take one ({name})")
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=shift)


def in_short(report: EvalReport, target: float | None) -> str:
    """What the demo found, in one sentence; ``target`` where it was searched for."""
    speedup = report.loop_speedup or 0.0
    if speedup >= 1:
        found = f"the denoising loop runs {speedup:.2f} times as fast as dense"
    else:
        found = f"the denoising loop is slower than dense here ({speedup:.2f}x), so leave this model dense"
    similar = [clip.ssim for clip in report.clips if clip.ssim is not None]
    if target is not None and similar and min(similar) < target:
        found += f", the clips miss the target of {target:g}"
    seen = report.verdict
    return f"In short: {found}, and {seen[0].lower()}{seen[1:]}"


def run(
    model: Annotated[str, typer.Option(help="A diffusers pipeline's folder or Hub id.")] = str(HERE / "tiny_wan"),
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("out"),
    target: Annotated[
        float | None, typer.Option(help=f"SSIM to dense that the clips keep, in (0, 1]; {TARGET:g} without a budget.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Instead of a target: share of the dense attention time for the plan.")
    ] = None,
    points: Annotated[
        int | None,
        typer.Option(help=f"Plans that are validated on the way to the target, at most {POINTS} by default."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 8,
    prompts: Annotated[int, typer.Option(help="Held-out prompts to generate.")] = 2,
    seeds: Annotated[int, typer.Option(help="Seeds for each of them.")] = 1,
    shift: Annotated[
        float | None,
        typer.Option(help=f"How far the scheduler's noise levels lean towards 1; the small model's by {SHIFT:g}."),
    ] = None,
    size: Annotated[tuple[int, int, int], typer.Option(help="Frames, height and width of the clips, in pixels.")] = (
        17,
        128,
        128,
    ),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Search a plan for the small model and compare it with dense attention."""
    from diffsparse.search import load
    from diffsparse.search.evaluate import compare, generate_dense
    from diffsparse.search.generate import GenerationSettings
    from diffsparse.search.report import can_write_videos, write_report
    from diffsparse.search.search import SearchConfig, search_plan, thoroughness
    from diffsparse.search.show import draw, grid_of
    from diffsparse.search.signature import makes_videos

    start = time.perf_counter()
    if budget is None and target is None:
        target = TARGET
    # Wrong numbers are told before a model is loaded.
    asked = SearchConfig(
        budget=budget, target=target, points=POINTS if points is None and target is not None else points
    )
    shape = dict(zip(("num_frames", "height", "width"), size, strict=True))
    load.quiet_libraries()
    place = load.choose_device(device)
    pipe = load.load_pipeline(model, device=place, dtype=load.choose_dtype("auto", place))
    lean(pipe, SHIFT if shift is None and Path(model) == HERE / "tiny_wan" else shift)
    if not makes_videos(pipe):
        del shape["num_frames"]
    calibration = load.read_prompts(HERE / "tiny_wan" / "prompts" / "calibration.txt")
    held_out = load.read_prompts(HERE / "tiny_wan" / "prompts" / "heldout.txt")[:prompts]
    folder = load.check_output(out / "plan")
    if (folder / "sparse_plan.json").exists():  # an earlier demo ran to its end: search anew instead of reading it back
        (folder / "search.sqlite").unlink(missing_ok=True)

    thorough = thoroughness(place)
    calibration = in_order(calibration, thorough["trace_prompts"] or 4)
    if asked.goal is None:
        what, wanted = f"the best for {budget:g} of the dense attention time", replace(asked, candidates=2)
    else:
        kept = validation_target(asked.goal)
        what = f"the sparsest whose clips keep an SSIM of {asked.goal:g}; those of validation, {kept:g}"
        wanted = replace(asked, target=kept)
    print(f"1. Search a plan on {place}: {what}", flush=True)
    config = replace(wanted, steps=steps, trace_steps=min(4, steps), repair_rows=64, **thorough, **shape)
    plan = search_plan(pipe, calibration, config, folder, say=lambda line: print(f"   {line}", flush=True))
    draw(plan, grid_of(plan, folder), out / "plan.png", folder=folder)

    print(f"2. Generate {prompts * seeds} clips of prompts that the search did not see, dense and sparse", flush=True)
    settings = GenerationSettings(num_inference_steps=steps, **shape)
    # The search has warmed everything up.
    dense = generate_dense(pipe, held_out, range(1000, 1000 + seeds), settings, noise_floor=False, warm_up=False)
    # By name: on a GPU "auto" would leave so small a model dense, by the break-even table.
    report = compare(
        pipe, plan, dense, backend=load.sparse_backend(pipe, plan), name="searched just now", warm_up=False
    )
    files = write_report(out, report, dense)

    print(f"\n{report.table(clips=False)}\n")
    print(f"written to {out}/: plan/, plan.png, {', '.join(str(f.relative_to(out)) for f in files)}")
    if not can_write_videos():
        print("no videos: they need imageio and imageio-ffmpeg (pip install 'diffsparse[viz]')")
    print(f"took {(time.perf_counter() - start) / 60:.1f} minutes in all")
    print(in_short(report, target))
    if not report.passed:
        raise SystemExit(1)


def main() -> None:
    from diffsparse.search.errors import BadInput

    try:
        typer.run(run)
    except BadInput as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
