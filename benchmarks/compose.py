"""How long a plan takes from a search's record, without the model: on made-up scores of a model of real size.

python benchmarks/compose.py --budget 0.2
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

# ruff: noqa: E402
# The clone in the place of this folder, in which kernels.py would stand in for Hugging Face's package `kernels`.
_HERE = Path(__file__).resolve().parent
sys.path[:] = [str(_HERE.parent), *(p for p in sys.path if Path(p or ".").resolve() != _HERE)]

import torch

from benchmarks.library.made_up_record import make_up
from diffsparse.grid import TokenGrid
from diffsparse.search.environment import stamp
from diffsparse.search.errors import BadInput
from diffsparse.search.recompose import RECORD_NAME, compose_plan

#: Grid, layers and heads of the models: both at 720p, of 81 and 129 frames.
MODELS = {
    "wan-14b-720p": (TokenGrid(21, 45, 80), 40, 40),
    "hunyuan-720p": (TokenGrid(33, 45, 80, text_after=256), 60, 24),
    "tiny": (TokenGrid(3, 16, 16), 2, 2),
}


def host_gb() -> float:
    """The most host memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="wan-14b-720p")
    parser.add_argument("--budget", type=float, help="share of the dense attention's time (0.2)")
    parser.add_argument("--density", type=float, help="whole-trajectory density instead")
    parser.add_argument("--layers", type=int, help="layers of the model (all)")
    parser.add_argument("--keep", type=Path, help="keep the record in this folder, and take the one that is there")
    return parser.parse_args()


def main() -> int:
    """Read the command line, compose, tell. The exit status."""
    a = arguments()
    grid, layers, heads = MODELS[a.model]
    asked = {"density": a.density} if a.density is not None else {"budget": a.budget or 0.2}
    with tempfile.TemporaryDirectory() as scratch:
        folder = a.keep or Path(scratch) / "record"
        if not (folder / RECORD_NAME).is_file():
            make_up(folder, grid, a.layers or layers, heads)
        size, before = (folder / RECORD_NAME).stat().st_size / 1e9, host_gb()
        begin = time.perf_counter()
        try:
            plan = compose_plan(folder, out=Path(scratch) / "plan", progress=False, say=print, **asked)
        except BadInput as error:
            print(error, file=sys.stderr)
            return 2
        seconds = time.perf_counter() - begin
        about = plan.record["search"]
        print(f"{a.model}, {asked}: {seconds:.1f} s, {host_gb():.1f} GB of host memory ({before:.1f} before)")
        print(f"record {size:.2f} GB, {about['phases']} phases, {len(plan.entries)} distinct entries")
        print(stamp(torch.device("cpu")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
