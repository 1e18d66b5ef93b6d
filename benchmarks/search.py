"""What a search takes on models of real size, with random weights: time by stage, memory and disk.

    python benchmarks/search.py --device cuda --models wan-1.3b-480p --csv benchmarks/results/search_h200.csv

``--layers`` keeps so many of the model's layers; times and bytes then grow with the layers.
"""

from __future__ import annotations

import argparse
import csv
import resource
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

# ruff: noqa: E402
# The clone in the place of this folder, in which kernels.py would stand in for Hugging Face's package `kernels`.
_HERE = Path(__file__).resolve().parent
sys.path[:] = [str(_HERE.parent), *(p for p in sys.path if Path(p or ".").resolve() != _HERE)]

import torch

from benchmarks.library.random_pipelines import pipeline_of, with_layers
from benchmarks.library.steps.models import MODELS, TINY, Model
from diffsparse.search import load, script
from diffsparse.search.errors import BadInput
from diffsparse.search.generate import GenerationSettings
from diffsparse.search.launch import check_processes, launch
from diffsparse.search.layers import common_architecture
from diffsparse.search.observe import final_latents
from diffsparse.search.ranks import Ranks, launched, sharing
from diffsparse.search.search import SearchConfig, search_plan, thoroughness

PROMPTS = [f"prompt {i}" for i in range(8)]


@dataclass
class Row:
    """One stage of a search, or all of it. Seconds; GB of what the dense generation does not take."""

    model: str
    layers: int
    tokens: int
    stage: str
    seconds: float
    step_seconds: float = 0.0
    estimate_seconds: float = 0.0
    estimate_after_seconds: float = 0.0
    host_gb: float = 0.0
    disk_gb: float = 0.0
    gpu_share: float = 0.0
    status: str = "ok"


def host_gb() -> float:
    """The most host memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Stages:
    """Seconds of every stage, by the search's own reports."""

    def __init__(self) -> None:
        self.begin = self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.estimate = self.estimated_after = 0.0
        self._label = "start"

    def on_stage(self, label: str, done: int, total: int) -> None:
        if done in (0, total):
            self.say(f"{label} {done}/{total}")
        self.mark(label if done < total else f"after {label}")

    def mark(self, label: str) -> None:
        now = time.perf_counter()
        self.seconds[self._label] = self.seconds.get(self._label, 0.0) + now - self.last
        self.last, self._label = now, label

    def say(self, text: str) -> None:
        print(f"  {time.perf_counter() - self.begin:7.1f} s  {text}", flush=True)
        if text.startswith("estimate:"):
            self.estimate = float(text.split()[1]) * 60
            self.estimated_after = time.perf_counter() - self.begin


def dense_step(pipe: Any, settings: GenerationSettings, device: torch.device) -> tuple[float, int]:
    """Seconds of a guided dense step, and the most bytes of GPU memory that it takes."""
    times = []
    for steps in (1, 1, 2):  # the first one gets everything started
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        final_latents(pipe, PROMPTS[0], 0, GenerationSettings(**(asdict(settings) | {"num_inference_steps": steps})))
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return times[2] - times[1], peak


def bench(name: str, model: Model, a: argparse.Namespace, folder: Path, members: Ranks | None) -> list[Row]:
    """Rows of one search: its stages, and all of it, as rank 0 sees them; of the other processes none."""
    device = load.choose_device(a.device) if members is None else members.place.device(a.device)
    dtype = load.choose_dtype(a.dtype, device)
    pipe, size = pipeline_of(model, device, dtype)
    guidance = 5.0 if model.family == "wan" else None
    step, peak = dense_step(pipe, GenerationSettings(None, guidance, **size), device)
    if leads := members is None or members.leads:
        print(f"{name}: a dense step takes {step:.2f} s, {peak / 1e9:.2f} GB", flush=True)
    config = SearchConfig(
        budget=a.budget, validation_prompts=0, steps=a.steps, guidance_scale=guidance, **size, **thoroughness(device)
    )
    stages, before = Stages(), host_gb()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    layers = len(common_architecture(pipe).layers)
    base = {"model": name, "layers": layers, "tokens": model.grid.seq_len}
    try:
        search_plan(
            pipe, PROMPTS, config, folder, progress=False, say=stages.say, on_stage=stages.on_stage, ranks=members
        )
        status = "ok"
    except Exception as failure:  # told in its row, and by the exit status
        if a.raise_:
            raise
        status = f"{type(failure).__name__}: {str(failure).splitlines()[0][:300]}"
    stages.mark("end")
    if not leads:
        return []
    used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    rows = [Row(**base, stage=stage, seconds=seconds) for stage, seconds in stages.seconds.items() if seconds > 0.05]
    whole = Row(
        **base,
        stage="all",
        seconds=time.perf_counter() - stages.begin,
        step_seconds=step,
        estimate_seconds=stages.estimate,
        estimate_after_seconds=stages.estimated_after,
        host_gb=host_gb() - before,
        disk_gb=sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e9,
        gpu_share=used / peak if peak else 0.0,
        status=status,
    )
    return [*rows, whole]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="of " + ", ".join(MODELS))
    parser.add_argument("--layers", type=int, help="layers of each model (all)")
    parser.add_argument("--tiny", action="store_true", help="stand-ins of two layers that a CPU can search")
    parser.add_argument("--steps", type=int, default=50, help="steps of the generations that the plan is for")
    parser.add_argument("--budget", type=float, default=0.3, help="share of the dense attention's time")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--csv", type=script.out_file, help="write the rows here, after every model")
    parser.add_argument("--keep", type=Path, help="keep plans and records in this folder, and go on with those there")
    parser.add_argument(
        "--num-processes", type=script.at_least_one, default=1, help="processes that share each search, a GPU each"
    )
    parser.add_argument("--raise", dest="raise_", action="store_true", help="show where a search fails")
    a = parser.parse_args()
    known = TINY if a.tiny else MODELS
    a.models = [name.strip() for name in a.models.split(",") if name.strip()]
    if unknown := [name for name in a.models if name not in known]:
        parser.error(f"unknown models {', '.join(unknown)}; use {', '.join(known)}")
    if a.layers is not None and a.layers < 1:
        parser.error(f"--layers is at least 1, got {a.layers}")
    return a


def main() -> int:
    """Read the command line, search, write. The exit status."""
    a = arguments()
    place = launched()
    try:
        if place is None and a.num_processes > 1:
            check_processes(a.num_processes, a.device)
            return launch(a.num_processes, [__file__, *sys.argv[1:]])
        with sharing(place) as members:
            return searches(a, members)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def searches(a: argparse.Namespace, members: Ranks | None) -> int:
    """Search with every model, in a process of its own or in one of several, and write. The exit status."""
    rows: list[Row] = []
    for name in a.models:
        model = (TINY if a.tiny else MODELS)[name]
        model = model if a.layers is None else with_layers(model, a.layers)
        with tempfile.TemporaryDirectory() as scratch:
            folder = (a.keep or Path(scratch)) / name
            try:
                rows += bench(name, model, a, folder if members is None else members.give(folder), members)
            except BadInput as error:
                raise BadInput(f"{name}: {error}") from error
        if members is not None and not members.leads:
            continue
        if a.csv:
            with a.csv.open("w", newline="") as file:
                writer = csv.DictWriter(file, [field.name for field in fields(Row)])
                writer.writeheader()
                writer.writerows(
                    {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(r).items()} for r in rows
                )
        for row in rows:
            if row.model == name:
                print(f"{row.stage:>24} {row.seconds:8.1f} s")
        print({k: v for k, v in asdict(rows[-1]).items()}, flush=True)
    return int(any(row.status != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
