"""Time the kernels beside dense attention and beside whatever peers are installed, in one run:

    python benchmarks/kernels.py --device cuda --csv benchmarks/results/kernels_h200.csv --plot kernels.png
    python benchmarks/kernels.py --device cpu            # the same cases, cut to a few hundred tokens

Every kernel is first checked against exact attention at sampled rows of the call that is timed. What is missing, fails
or is wrong is listed with its reason. Ends with status 1 where one of our own kernels fails or is wrong.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# ruff: noqa: E402
# The clone in the place of this folder, in which kernels.py would stand in for Hugging Face's package `kernels`.
_HERE = Path(__file__).resolve().parent
sys.path[:] = [str(_HERE.parent), *(p for p in sys.path if Path(p or ".").resolve() != _HERE)]

import torch

from benchmarks.library.cases import CASES, cases, uniform_case
from benchmarks.library.measure import OK, TIMED_BACKENDS, Row, bench_case, describe
from benchmarks.library.peers import PEERS
from diffsparse.entry import NUMERICS
from diffsparse.kernels import BACKENDS
from diffsparse.kernels.dense import DENSE_KERNELS
from diffsparse.search import script
from diffsparse.search.environment import stamp
from diffsparse.search.errors import BadInput

#: The package on PyPI that a kernel comes from, where it is not torch or this one.
DISTRIBUTIONS = {
    "flash_attention_3": "flash-attn-3",
    "flash_attention_4": "flash-attn-4",
    "xformers": "xformers",
    "fastvideo_vsa": "fastvideo-kernel",
    "fastvideo_triton": "fastvideo-kernel",
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help=f"a list; {', '.join(CASES)}")
    parser.add_argument(
        "--tokens", type=script.at_least_one, help="one uniform case of your own instead: its number of tokens"
    )
    parser.add_argument("--heads", type=script.at_least_one, default=24, help="with --tokens")
    parser.add_argument("--head-dim", type=script.at_least_one, default=128, help="with --tokens")
    parser.add_argument("--densities", type=densities, default="1.0,0.5,0.25,0.1", help="with --tokens")
    parser.add_argument("--block-size", type=int, default=128, choices=(64, 128), help="with --tokens")
    parser.add_argument("--device", type=script.device, default="auto", help="cuda where there is a GPU, else cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="bfloat16; on a CPU float32")
    parser.add_argument(
        "--tiny", action=argparse.BooleanOptionalAction, help="cases cut to a few hundred tokens (default: on a CPU)"
    )
    parser.add_argument("--backends", default=",".join(TIMED_BACKENDS), help="of this package")
    parser.add_argument("--numerics", default="auto,int8,fp8")
    parser.add_argument("--dense", default=",".join(DENSE_KERNELS))
    parser.add_argument("--peers", default=",".join(PEERS), help="a list, or nothing at all: ''")
    parser.add_argument("--seconds", type=script.seconds, default=0.3, help="to time one kernel in one round")
    parser.add_argument(
        "--rounds", type=script.at_least_one, default=1, help="how often all kernels of a setting are timed in turn"
    )
    parser.add_argument("--csv", type=script.out_file, help="write the rows here, after every case")
    parser.add_argument("--json", type=script.out_file, help="write the rows here, after every case")
    parser.add_argument("--plot", type=script.out_file, help="draw TF/s here (needs matplotlib)")
    a = parser.parse_args()
    known = {"cases": CASES, "backends": BACKENDS, "numerics": NUMERICS, "dense": DENSE_KERNELS, "peers": PEERS}
    for option, names in known.items():
        if unknown := [name for name in split(getattr(a, option)) if name not in names]:
            raise BadInput(f"--{option}: no {', '.join(map(repr, unknown))}; there are {', '.join(names)}")
    return a


def densities(text: str) -> list[float]:
    found = [float(part) for part in split(text)]
    if not found or not all(0 < density <= 1 for density in found):
        raise argparse.ArgumentTypeError(f"a list of densities above 0 and at most at 1, got {text!r}")
    return found


def split(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def origin(row: Row) -> str:
    """Name and version of the package that a kernel comes from."""
    package = DISTRIBUTIONS.get(row.name, "torch" if row.kind != "own" and row.name != "diffsparse" else "diffsparse")
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return package


def write(rows: list[Row], machine: dict[str, str], as_csv: Path | None, as_json: Path | None) -> None:
    table: list[dict[str, Any]] = [{**asdict(row), "package": origin(row), **machine} for row in rows]
    if as_json is not None:
        as_json.write_text(json.dumps(table, indent=1) + "\n")
    if as_csv is not None:
        with as_csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(table[0]))
            writer.writeheader()
            writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in line.items()} for line in table)


def draw(rows: list[Row], machine: dict[str, str], path: Path) -> None:
    """One panel a case: TF/s of whole executed blocks of every kernel, over the case's settings."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(row.case for row in rows))
    colours: dict[tuple[str, str], Any] = {}  # one for a kernel, in all panels
    figure, panels = plt.subplots(len(names), 1, figsize=(9, 3.6 * len(names)), squeeze=False, layout="constrained")
    for name, panel in zip(names, panels[:, 0]):
        mine = [row for row in rows if row.case == name and row.status == OK]
        settings = list(dict.fromkeys(row.setting for row in rows if row.case == name))
        kernels = list(dict.fromkeys((row.kind, row.name, row.numerics) for row in mine))
        for kind, kernel, numerics in kernels:
            # The ten strong colours of the map, then the pale ones between them.
            colour = colours.setdefault((kernel, numerics), plt.get_cmap("tab20").colors[2 * len(colours) % 19])
            points = [r for r in mine if (r.kind, r.name, r.numerics) == (kind, kernel, numerics)]
            panel.plot(
                [settings.index(r.setting) for r in points],
                [r.block_tflops for r in points],
                marker={"dense": "s", "own": "o", "peer": "^"}[kind],
                color=colour,
                linestyle="--" if kind == "peer" else "-",
                label=" ".join([kernel, *([numerics] if numerics != "auto" else [])]),
            )
        panel.set_xticks(range(len(settings)), settings)
        panel.set_ylim(bottom=0)
        panel.set_ylabel("TF/s, executed blocks")
        first = next(row for row in rows if row.case == name)
        panel.set_title(f"{name}: {first.tokens:,} tokens, {first.heads} heads of {first.head_dim}, {first.dtype}")
        if kernels:
            panel.legend(fontsize="x-small", ncols=2)
    figure.suptitle(f"{machine['gpu']}, torch {machine['torch']}, {machine['date']}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> int:
    """Read the command line, time, write. The exit status."""
    a = arguments()
    device = a.device
    tiny = device.type == "cpu" if a.tiny is None else a.tiny
    dtype = getattr(torch, a.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    if a.tokens:
        wanted = [uniform_case("own", "", a.tokens, a.heads, a.head_dim, a.densities, block_size=a.block_size)]
    else:
        wanted = cases(split(a.cases), tiny=tiny)
    machine = stamp(device)
    print(", ".join(f"{k} {v}" for k, v in machine.items() if v), flush=True)
    rows: list[Row] = []
    refused: set[tuple[str, str, str]] = set()

    def say(row: Row) -> None:
        seen = (row.name, row.numerics, row.status)
        if row.status == OK or seen not in refused:  # what refuses does so for every setting
            print(describe(row), flush=True)
        refused.add(seen)

    for case in wanted:
        print(f"\n{case.name}: {case.about}; {case.grid.seq_len:,} tokens, {case.heads} heads of {case.head_dim}")
        rows += bench_case(
            case,
            device=device,
            dtype=dtype,
            backends=split(a.backends),
            numerics=split(a.numerics),
            dense=split(a.dense),
            peers=split(a.peers),
            budget_ms=a.seconds * 1e3,
            rounds=a.rounds,
            say=say,
        )
        write(rows, machine, a.csv, a.json)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if a.plot is not None:
        draw(rows, machine, a.plot)
    # A backend that this machine cannot run has no error; one that ran and was wrong or raised has.
    ours = [r for r in rows if r.kind == "own" and r.status != OK]
    return int(any(r.error is not None or "Error: " in r.status for r in ours))


if __name__ == "__main__":
    script.exit_with(main)
