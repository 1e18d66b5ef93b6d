"""What commands share: their options, one line for a mistake, one object for machines."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Annotated, Any, NoReturn

import typer

from diffsparse.limits import LEAST_ROWS, MOST_ROWS
from diffsparse.search.errors import BadInput

__all__ = [
    "BAD_INPUT",
    "Device",
    "Dtype",
    "FAILED",
    "Frames",
    "Guidance",
    "Height",
    "INTERRUPTED",
    "Json",
    "Loras",
    "Model",
    "Offload",
    "Plan",
    "Prompts",
    "Quantize",
    "Scheduler",
    "Steps",
    "TrueCfg",
    "Width",
    "answers",
    "check_numbers",
    "check_rows",
    "check_share",
    "check_target",
    "interruptible",
    "read_size",
    "say",
    "stop",
]

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A diffusers pipeline: a local folder or a Hub id.")]
Plan = Annotated[
    str,
    typer.Argument(
        metavar="PLAN", help="A plan's folder, a Hub repository, or a preset, such as window or xattention."
    ),
]
Prompts = Annotated[
    str,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help='A text file with one prompt a line, or JSON lines: {"prompt": ..., "image": ...}.',
    ),
]
Height = Annotated[int | None, typer.Option("--height", help="In pixels.")]
Width = Annotated[int | None, typer.Option("--width", help="In pixels.")]
Frames = Annotated[int | None, typer.Option("--num-frames", help="Frames of a clip.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Denoising steps.  [default: the pipeline's own number]")]
Guidance = Annotated[
    float | None, typer.Option("--guidance-scale", help="Guidance.  [default: the pipeline's own scale]")
]
TrueCfg = Annotated[
    float | None,
    typer.Option("--true-cfg-scale", help="The same for Flux and Qwen-Image, which call it so; above 1 it guides."),
]
Loras = Annotated[
    list[str] | None,
    typer.Option("--lora", metavar="FILE[:WEIGHT]", help="LoRA weights, a .safetensors file; may be given again."),
]
Scheduler = Annotated[
    str | None, typer.Option("--scheduler", metavar="NAME", help="Another scheduler of diffusers, as UniPC.")
]
Offload = Annotated[
    str, typer.Option("--offload", help="none, model or group: what is kept on the CPU while it is not needed.")
]
Quantize = Annotated[str, typer.Option("--quantize", help="none, or int8: the transformers' weights, by torchao.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto (bfloat16 on a GPU), float32, bfloat16 or float16.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and everything else to stderr.")]

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
#: Seeds are numbers of 64 bits; the commands count on from the one that is given.
MAX_OPTION_SEED = 2**62


@contextmanager
def answers(as_json: bool) -> Iterator[Callable[[dict[str, Any], str], None]]:
    """Gives ``print(data, text)``: the one thing that reaches stdout. Whatever libraries print goes to stderr."""
    stdout = sys.stdout

    def answer(data: dict[str, Any], text: str) -> None:
        print(json.dumps(data, allow_nan=False, ensure_ascii=False) if as_json else text, file=stdout, flush=True)

    with redirect_stdout(sys.stderr):
        yield answer


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def stop(text: str, code: int) -> NoReturn:
    say(" ".join(text.split()))
    raise SystemExit(code)


def interruptible(resume: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Ctrl-C ends a command with one line that says how to go on."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def wrapped(*args: Any, **kwargs: Any) -> None:
            try:
                command(*args, **kwargs)
            except KeyboardInterrupt:
                stop(f"interrupted: {resume}", INTERRUPTED)

        return wrapped

    return decorate


def check_numbers(**values: int | float | None) -> None:
    """``steps``, ``seed`` and the like, before anything is loaded."""
    for name, value in values.items():
        option = "--" + name.replace("_", "-")
        least = (
            0
            if name
            in ("seed", "first_seed", "guidance_scale", "true_cfg_scale", "validate", "reuse_memory", "repair_rows")
            else 1
        )
        if value is not None and not value >= least:
            raise BadInput(f"{option} {value}: it must be at least {least}")
        if value is not None and name in ("seed", "first_seed") and value > MAX_OPTION_SEED:
            raise BadInput(f"{option} {str(value)[:40]}: it must be at most {MAX_OPTION_SEED}")


def read_size(option: str, text: str | None) -> tuple[int, int, int | None] | None:
    """Height, width and frames of ``832x480x81``; of images, ``1024x768``, without frames."""
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) not in (2, 3) or not all(side.isascii() and side.isdigit() and int(side) > 0 for side in sides):
        raise BadInput(
            f"{option} {text[:60]}: it is a height and a width in pixels, and the frames of a clip: 832x480x81"
        )
    return int(sides[0]), int(sides[1]), int(sides[2]) if len(sides) == 3 else None


def check_rows(rows: int, repair: bool) -> None:
    """``--repair-rows``, before anything is loaded."""
    if rows and not repair:
        raise BadInput(f"--repair-rows {rows} and --no-repair: give one of the two")
    if rows and not LEAST_ROWS <= rows <= MOST_ROWS:
        raise BadInput(f"--repair-rows {rows}: it must be 0, or {LEAST_ROWS} to {MOST_ROWS:,}")


def check_share(option: str, value: float | None) -> None:
    if value is not None and not 0 < value <= 1:
        raise BadInput(f"{option} {value}: it is a share of dense attention, above 0 and at most 1, for example 0.4")


def check_target(value: float | None) -> None:
    if value is not None and not 0 < value <= 1:
        raise BadInput(f"--target {value}: it is the SSIM to dense of the worst clip, above 0 and at most 1, as 0.95")
