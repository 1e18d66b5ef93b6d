"""Time one denoising step of real models with random weights, dense and sparse, eager and compiled:

    python benchmarks/pipeline.py --device cuda --models wan-14b-720p --csv benchmarks/results/pipeline_h200.csv
    python benchmarks/pipeline.py --tiny                 # the same on tiny models on a CPU, in seconds

A step is one forward of the transformer at batch 1. `rest` is the same forward with a copy of the query in the place of
self-attention, so the share of attention is `(step - rest) / step`. Sparse steps run plans of windows and bands whose
density of kept blocks is nearest to the one asked for; a setting `0.08:moments` has a tail, which comes on top,
`0.25:int8` takes products in 8 bits, and `1:int8` is dense attention in 8 bits. A step counts only if its output is
finite and every self-attention call of it ran sparse. Ends with status 1 where one did not.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path

# ruff: noqa: E402
# The clone in the place of this folder, in which kernels.py would stand in for Hugging Face's package `kernels`.
_HERE = Path(__file__).resolve().parent
sys.path[:] = [str(_HERE.parent), *(p for p in sys.path if Path(p or ".").resolve() != _HERE)]

import torch

from benchmarks.library.steps.attention import dense_kernel
from benchmarks.library.steps.measure import bench_model
from benchmarks.library.steps.models import MODELS, TINY
from benchmarks.library.steps.plot import draw
from benchmarks.library.steps.rows import OK, Row, describe, write
from diffsparse.entry import NUMERICS, Execution
from diffsparse.kernels import BACKENDS
from diffsparse.search import script
from diffsparse.search.environment import stamp
from diffsparse.search.errors import BadInput


def parse_settings(text: str) -> list[tuple[float, str, str]]:
    """``0.5,0.08:moments,0.25:int8`` as densities, tails and numerics."""
    found = []
    for part in filter(None, text.split(",")):
        density, *words = part.split(":")
        numerics = [word for word in words if word in NUMERICS]
        tails = [word for word in words if word not in NUMERICS]
        try:
            value = float(density)
            if len(tails) > 1 or len(numerics) > 1:
                raise ValueError("one tail and one numerics at most")
            how = Execution(tail=(tails or ["none"])[0], numerics=(numerics or ["auto"])[0])
        except ValueError as error:
            message = f"{error}; write 0.25, 0.08:moments, 0.25:int8 or 0.08:centroids:int8"
            raise BadInput(f"--settings {part!r}: {message}") from None
        if not 0 < value <= 1:
            raise BadInput(f"--settings {part!r}: a density lies above 0 and at most at 1")
        found.append((value, how.tail, how.numerics))
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--modes", default="eager,compiled")
    parser.add_argument(
        "--settings", default="0.5,0.25,0.15,0.08:moments", help="densities, some with :tail or :numerics"
    )
    parser.add_argument("--plan", choices=("mixed", "window", "band"), default="mixed")
    parser.add_argument("--block-size", type=int, default=0, choices=(0, 64, 128), help="128, with --tiny 64")
    parser.add_argument("--backend", choices=("auto", *BACKENDS), default="auto", help="of the sparse kernel")
    parser.add_argument("--dense", choices=("cudnn", "default"), default="cudnn", help="dense attention on a GPU")
    parser.add_argument(
        "--fastest", action=argparse.BooleanOptionalAction, default=True, help="time the fastest dense kernel too"
    )
    parser.add_argument("--device", type=script.device, help="cuda where there is a GPU, else cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny models in float32, on the CPU unless told otherwise")
    parser.add_argument("--seconds", type=script.seconds, default=3.0, help="to time one step, warming up not counted")
    parser.add_argument("--most", type=script.at_least_one, default=10, help="forwards timed of one step at most")
    parser.add_argument("--csv", type=script.out_file, help="write the rows here, as they come")
    parser.add_argument("--json", type=script.out_file, help="write the rows here, as they come")
    parser.add_argument("--plot", type=script.out_file, help="draw the steps here (needs matplotlib)")
    a = parser.parse_args()
    for given, known in ((a.models, MODELS), (a.modes, ("eager", "compiled"))):
        if unknown := [name for name in given.split(",") if name not in known]:
            raise BadInput(f"unknown {', '.join(unknown)}; there are {', '.join(known)}")
    a.settings = parse_settings(a.settings)
    return a


def main() -> int:
    """Read the command line, time, write. The exit status."""
    a = arguments()
    device = a.device or script.device("cpu" if a.tiny else "auto")
    dtype = torch.float32 if a.tiny else torch.bfloat16
    machine = stamp(device)
    print(", ".join(f"{k} {v}" for k, v in machine.items() if v), flush=True)
    rows: list[Row] = []
    new: list[Row] = []

    def say(row: Row) -> None:
        print(describe(row), flush=True)
        new.append(row)
        write([*rows, *new], machine, a.csv, a.json)

    for name in a.models.split(","):
        new.clear()
        with dense_kernel(a.dense if device.type == "cuda" else "default"):
            rows += bench_model(
                name,
                (TINY if a.tiny else MODELS)[name],
                device=device,
                dtype=dtype,
                modes=a.modes.split(","),
                settings=a.settings,
                block_size=a.block_size or (64 if a.tiny else 128),
                kind=a.plan,
                backend=a.backend,
                seconds=a.seconds,
                most=a.most,
                say=say,
                with_fastest=a.fastest,
            )
        write(rows, machine, a.csv, a.json)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if a.plot is not None:
        draw(rows, machine, a.plot)
    return int(any(row.status != OK for row in rows))


if __name__ == "__main__":
    script.exit_with(main)
