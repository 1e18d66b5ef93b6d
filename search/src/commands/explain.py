"""``diffsparse explain``"""

from __future__ import annotations

from typing import Annotated

import typer

from diffsparse.search.commands.common import (
    Device,
    Dtype,
    Frames,
    Height,
    Json,
    Plan,
    Width,
    answers,
    check_numbers,
    interruptible,
)

__all__ = ["explain_command"]


@interruptible("nothing was written")
def explain_command(
    plan: Plan,
    height: Height = None,
    width: Width = None,
    num_frames: Frames = None,
    model_shape: Annotated[
        str | None,
        typer.Option(
            "--model-shape", metavar="MODEL", help="A model's folder or a transformer class: what a token covers."
        ),
    ] = None,
    grid: Annotated[
        str | None, typer.Option("--grid", metavar="T,H,W", help="Latent tokens, instead of a size in pixels.")
    ] = None,
    backend: Annotated[str, typer.Option("--backend", help="Attention backend: auto, or a name of `env`.")] = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Say what a plan would do at a size on this machine, layer by layer, before anything is generated.

    Which kernel runs, density, predicted time, what stays dense and why, which bitmaps are carried over. Without a
    size it is the one that the plan was searched with. No weights are read.

    \b
    Example:
      diffsparse explain plan --height 480 --width 832 --num-frames 81
    """
    with answers(as_json) as answer:
        check_numbers(height=height, width=width, num_frames=num_frames)
        from diffsparse.search import load
        from diffsparse.search.explain import explain, shape_for
        from diffsparse.search.explain_table import explain_table
        from diffsparse.search.show import parse_grid

        chosen = load.load_plan(plan)
        place = load.choose_device(device)
        load.check_backend(backend)
        shape = shape_for(
            chosen,
            folder=None if plan in load.PRESETS else plan,
            grid=parse_grid(grid) if grid else None,
            model_shape=model_shape,
            height=height,
            width=width,
            num_frames=num_frames,
        )
        if plan in load.PRESETS:
            named = shape.architecture.model_class if shape.architecture else model_shape
            chosen = load.load_plan(plan, named, shape.grid)
        found = explain(
            chosen,
            shape,
            device=place,
            dtype=load.choose_dtype(dtype, place),
            backend=backend,
            model_class=model_shape,
        )
        answer({"plan": plan, **found.to_dict()}, explain_table(found, plan))
