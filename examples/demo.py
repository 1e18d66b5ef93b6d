"""The main job on the small model in this folder: search a plan, attach it, generate with and without it, compare.

    make demo                                   # or: .venv/bin/python examples/demo.py
    .venv/bin/python examples/demo.py --help

Writes to ``out/``: the plan, videos with dense and sparse side by side, a contact sheet, and a sheet of every layer's
and head's pattern over its measured attention. On a CUDA GPU where there is one.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

HERE = Path(__file__).resolve().parent


def run(
    model: Annotated[str, typer.Option(help="A diffusers pipeline's folder or Hub id.")] = str(HERE / "tiny_wan"),
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("out"),
    budget: Annotated[float, typer.Option(help="Share of the dense attention time that the plan may take.")] = 0.4,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 8,
    prompts: Annotated[int, typer.Option(help="Held-out prompts to generate.")] = 2,
    seeds: Annotated[int, typer.Option(help="Seeds for each of them.")] = 1,
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
    size = {"height": 128, "width": 128, "num_frames": 17}
    load.quiet_libraries()
    place = load.choose_device(device)
    pipe = load.load_pipeline(model, device=place, dtype=load.choose_dtype("auto", place))
    if not makes_videos(pipe):
        del size["num_frames"]
    calibration = load.read_prompts(HERE / "tiny_wan" / "prompts" / "calibration.txt")
    held_out = load.read_prompts(HERE / "tiny_wan" / "prompts" / "heldout.txt")[:prompts]
    folder = load.check_output(out / "plan")
    if (folder / "sparse_plan.json").exists():  # an earlier demo ran to its end: search anew instead of reading it back
        (folder / "search.sqlite").unlink(missing_ok=True)

    print(f"1. Search a plan on {place} (budget: {budget:g} of the dense attention time)", flush=True)
    thorough = thoroughness(place)
    config = SearchConfig(
        budget=budget, steps=steps, trace_steps=min(4, steps), candidates=2, repair_rows=64, **thorough, **size
    )
    plan = search_plan(pipe, calibration, config, folder, say=lambda line: print(f"   {line}", flush=True))
    draw(plan, grid_of(plan, folder), out / "plan.png", folder=folder)

    print(f"2. Generate {prompts * seeds} clips of prompts that the search did not see, dense and sparse", flush=True)
    settings = GenerationSettings(num_inference_steps=steps, **size)
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
