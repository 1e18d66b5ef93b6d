"""What a search takes on models of real size, with random weights: time by stage, memory and disk.

    python benchmarks/search.py --device cuda --models wan-1.3b-480p --csv benchmarks/results/search_h200.csv

``--layers 2,4`` searches models of so many layers as the whole one would be searched, and extrapolates from the two.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

# ruff: noqa: E402
# The clone in the place of this folder, in which kernels.py would stand in for Hugging Face's package `kernels`.
_HERE = Path(__file__).resolve().parent
sys.path[:] = [str(_HERE.parent), *(p for p in sys.path if Path(p or ".").resolve() != _HERE)]

import torch

from benchmarks.library.random_pipelines import pipeline_of, with_layers
from benchmarks.library.search_rows import ALL, Row, extrapolated, groups, read, write
from benchmarks.library.steps.models import MODELS, TINY, Model, build
from diffsparse.search import load, script, stored_scores
from diffsparse.search.errors import BadInput
from diffsparse.search.generate import GenerationSettings
from diffsparse.search.launch import check_processes, launch
from diffsparse.search.layers import common_architecture
from diffsparse.search.observe import final_latents
from diffsparse.search.ranks import Ranks, launched, sharing
from diffsparse.search.search import SearchConfig, search_plan, thoroughness
from diffsparse.search.stages import probe, sensitivity

PROMPTS = [f"prompt {i}" for i in range(8)]


def host_gb() -> float:
    """The most host memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def bytes_in(folder: Path) -> int:
    """Of all files in it. One that is removed meanwhile, as sqlite's journal is, counts nothing."""
    found = 0
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):
            found += file.stat().st_size
    return found


class Stages:
    """Seconds of every stage, and the most bytes of GPU memory that it takes, by the search's own reports."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.disk = folder, 0
        self.begin = self.last = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.seconds: dict[str, float] = {}
        self.gpu: dict[str, int] = {}
        self.estimate = self.estimated_after = 0.0
        self._label = "start"

    def on_stage(self, label: str, done: int, total: int) -> None:
        if done in (0, total):
            self.say(f"{label} {done}/{total}")
        self.mark(label if done < total else f"after {label}")

    def mark(self, label: str) -> None:
        self.disk = max(self.disk, bytes_in(self.folder))
        now = time.perf_counter()
        self.seconds[self._label] = self.seconds.get(self._label, 0.0) + now - self.last
        if torch.cuda.is_available():
            self.gpu[self._label] = max(self.gpu.get(self._label, 0), torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()
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


def layers_of(model: Model) -> int:
    """How many layers the transformer has."""
    config = build(model, torch.device("meta"), torch.bfloat16).config
    return int(config.num_layers + getattr(config, "num_single_layers", 0))


def bench(
    name: str, model: Model, a: argparse.Namespace, folder: Path, members: Ranks | None, whole: int | None
) -> list[Row]:
    """Rows of one search: its stages, and all of it, as rank 0 sees them; of the other processes none.

    ``whole``: layers of the model that it stands for, as which it is searched.
    """
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
    stages, before, decided = Stages(folder), host_gb(), ExitStack()
    if whole is not None:
        share = len(common_architecture(pipe).layers) / whole
        full = step / share
        config = replace(config, trace_prompts=probe.prompts_for(full * config.trace_steps, len(PROMPTS)))
        for module in ("search", "stages.sensitivity"):
            decided.enter_context(patch(f"diffsparse.search.{module}.most_groups", lambda _: groups(whole, full)))
        for module, limit in ((stored_scores, "MAP_BYTES"), (sensitivity, "REUSE_BYTES")):
            decided.enter_context(patch.object(module, limit, getattr(module, limit) * share))
    layers = len(common_architecture(pipe).layers)
    base = {"model": name, "layers": layers, "tokens": model.grid.seq_len}
    try:
        with decided:
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
    rows = [
        Row(**base, stage=stage, seconds=seconds, gpu_gb=stages.gpu.get(stage, 0) / 1e9)
        for stage, seconds in stages.seconds.items()
    ]
    everything = Row(
        **base,
        stage=ALL,
        seconds=time.perf_counter() - stages.begin,
        step_seconds=step,
        estimate_seconds=stages.estimate,
        estimate_after_seconds=stages.estimated_after,
        host_gb=host_gb() - before,
        disk_gb=stages.disk / 1e9,
        gpu_gb=max(stages.gpu.values(), default=0) / 1e9,
        dense_gpu_gb=peak / 1e9,
        status=status,
    )
    return [*rows, everything]


def layer_counts(text: str) -> tuple[int, ...]:
    """One number of layers, or two rising ones."""
    found = tuple(int(part) if part.isdigit() else 0 for part in text.split(","))
    if min(found) < 1 or list(found) != sorted(set(found)) or len(found) > 2:
        raise argparse.ArgumentTypeError(f"a number of layers, or two rising ones, as 2,4; got {text!r}")
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="of " + ", ".join(MODELS))
    parser.add_argument(
        "--layers", type=layer_counts, help="so many layers, searched as the whole model is; two to extrapolate from"
    )
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
    return a


def main() -> int:
    """Read the command line, search, write. The exit status."""
    a = arguments()
    place = launched()
    try:
        for name in a.models:
            if a.layers and a.layers[-1] > (most := layers_of((TINY if a.tiny else MODELS)[name])):
                raise BadInput(f"{name} has {most} layers, got --layers {','.join(map(str, a.layers))}")
        if a.layers and len(a.layers) == 2:
            return from_two(a)
        if place is None and a.num_processes > 1:
            check_processes(a.num_processes, a.device)
            return launch(a.num_processes, [__file__, *sys.argv[1:]])
        with sharing(place) as members:
            return searches(a, members)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def from_two(a: argparse.Namespace) -> int:
    """Search models of fewer layers, each in a process that compiles its kernels anew, and extrapolate."""
    rows: list[Row] = []
    for name in a.models:
        found: list[list[Row]] = []
        for layers in a.layers:
            with tempfile.TemporaryDirectory() as scratch:
                path = Path(scratch) / "rows.csv"
                own = {"--models": name, "--layers": layers, "--csv": path, "--num-processes": a.num_processes}
                own |= {"--steps": a.steps, "--budget": a.budget, "--device": a.device, "--dtype": a.dtype}
                own |= {"--keep": a.keep} if a.keep else {}
                switches = ["--tiny"] * a.tiny + ["--raise"] * a.raise_
                command = [sys.executable, __file__, *switches, *(str(x) for pair in own.items() for x in pair)]
                subprocess.run(command, env=os.environ | {"TRITON_CACHE_DIR": f"{scratch}/triton"}, check=False)
                if not path.is_file():
                    raise BadInput(f"{name} could not be searched with {layers} layers: see above")
                found.append(read(path))
        found.append(extrapolated(found[0], found[1], layers_of((TINY if a.tiny else MODELS)[name])))
        rows += [row for each in found for row in each]
        report(a, rows, name)
    return int(any(row.failed for row in rows))


def report(a: argparse.Namespace, rows: list[Row], name: str) -> None:
    """Write all rows, and print those of the last model."""
    if a.csv:
        write(a.csv, rows)
    for row in rows:
        if row.model == name and row.seconds >= 0.05:
            print(f"{row.layers:3} layers {row.stage:>18} {row.seconds:8.1f} s {row.gpu_gb:8.2f} GB")
    print(asdict(rows[-1]), flush=True)


def searches(a: argparse.Namespace, members: Ranks | None) -> int:
    """Search with every model, in a process of its own or in one of several, and write. The exit status."""
    rows: list[Row] = []
    for name in a.models:
        model = (TINY if a.tiny else MODELS)[name]
        whole = layers_of(model) if a.layers else None
        model = with_layers(model, a.layers[0]) if a.layers else model
        with tempfile.TemporaryDirectory() as scratch:
            folder = (a.keep or Path(scratch)) / (f"{name}-{a.layers[0]}" if a.layers else name)
            place = folder if members is None else members.give(folder)
            try:
                rows += bench(name, model, a, place, members, whole)
            except BadInput as error:
                raise BadInput(f"{name}: {error}") from error
        if members is None or members.leads:
            report(a, rows, name)
    return int(any(row.failed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
