"""How far products in 8 bits are from those in 16, beside what they are multiplied from:

    python benchmarks/numerics.py --json numerics.json        # a Hopper GPU

Relative errors of single attention calls, ``||o8 - o16|| / ||o16||``: on normal data, on data with outlier channels in
queries, keys and values, and on the calls of a model while it generates. Then whole generations: the PSNR of clips made
sparse in 8 bits to those made sparse in 16 from the same seeds, beside the PSNR of another seed. Heads run by
``--plan`` with its numerics changed; those with the tail ``moments`` stay in 16 bits
(see ``SparsityPlan.with_numerics``).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# ruff: noqa: E402
# The clone in the place of this folder, in which kernels.py would stand in for Hugging Face's package `kernels`.
_HERE = Path(__file__).resolve().parent
sys.path[:] = [str(_HERE.parent), *(p for p in sys.path if Path(p or ".").resolve() != _HERE)]

import numpy as np
import torch

from benchmarks.library.cases import with_outliers
from diffsparse.entry import HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.kernels import available_backends, sparse_attention
from diffsparse.kernels.random_rows import random_rows
from diffsparse.layout import BlockLayout, build_layout
from diffsparse.pipelines import tap_attention
from diffsparse.plan import SparsityPlan
from diffsparse.search import load, metrics, script
from diffsparse.search.environment import stamp
from diffsparse.search.errors import BadInput
from diffsparse.search.generate import GenerationSettings, generate_clip
from diffsparse.search.recorded import recorded

ROOT = Path(__file__).resolve().parent.parent
EIGHT = ("int8", "fp8")


def relative(out: torch.Tensor, want: torch.Tensor) -> float:
    """Of whole tensors."""
    return float((out.float() - want.float()).norm() / want.float().norm())


def made_data(seq: int, dim: int, density: float) -> dict[str, dict[str, float]]:
    """Errors on data from a generator, by kind of data and numerics."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, seq, 4, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    layout = random_rows(TokenGrid(1, 1, seq), [HeadEntry()] * 4, 128, density).to("cuda")
    found = {}
    # Logits would be hundreds with outliers in both queries and keys as they are.
    for kind, data in {
        "normal": (q, k, v),
        "outliers in k": (q, with_outliers(k), v),
        "outliers in q, k and v": (with_outliers(q) / 4, with_outliers(k) / 4, with_outliers(v)),
    }.items():
        want = sparse_attention(*data, layout, backend="gluon_sm90")
        found[kind] = {
            n: relative(sparse_attention(*data, layout, backend="gluon_sm90", numerics=n), want) for n in EIGHT
        }
    return found


class InNumerics:
    """A tap that runs every call by a plan in given numerics; with ``errors`` it runs in 16 bits and measures 8."""

    def __init__(self, plan: SparsityPlan, numerics: str = "auto", errors: dict[str, list[float]] | None = None):
        self.plans = {n: plan.with_numerics(n) for n in (numerics, *(errors or ()))}
        self.numerics, self.errors = numerics, errors
        self.layouts: dict[Any, BlockLayout] = {}

    def __call__(self, call: Any) -> torch.Tensor | None:
        phase = self.plans[self.numerics].schedule.phase(call.noise_level)
        if phase is None or self.plans[self.numerics].layer_entries(phase, call.layer, call.q.shape[2]) is None:
            return None

        def attend(numerics: str) -> torch.Tensor:
            key = (call.grid, phase, call.layer, numerics)
            if key not in self.layouts:
                plan = self.plans[numerics]
                entries = plan.layer_entries(phase, call.layer, call.q.shape[2])
                self.layouts[key] = build_layout(call.grid, entries, plan.block_size).to(call.q.device)
            return sparse_attention(
                call.q, call.k, call.v, self.layouts[key], scale=call.scale, kv_len=call.kv_len, backend="gluon_sm90"
            )

        out = attend(self.numerics)
        for numerics, errors in (self.errors or {}).items():
            errors.append(relative(attend(numerics), out))
        return out


def settings_of(plan: SparsityPlan, steps: int) -> GenerationSettings:
    """Clips of the size that the plan was searched at: the pipeline's own default may be hundreds of times as large."""
    searched = recorded(plan.record)
    size = {name: searched.get(name) for name in ("height", "width", "num_frames")}
    if size["height"] is None or size["width"] is None:
        raise BadInput("the plan does not say at which size it was searched; take one that was (--plan)")
    return GenerationSettings(steps, searched.get("guidance_scale"), **size)


def generations(
    model: str, plan: SparsityPlan, prompts: list[str], settings: GenerationSettings
) -> dict[str, dict[str, float]]:
    """By numerics: errors of calls, and the PSNR of clips to those made sparse in 16 bits."""
    pipe = load.load_pipeline(model, device=torch.device("cuda"), dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)

    def clips(tap: Callable[[Any], torch.Tensor | None], seed: int) -> list[Any]:
        found = []
        for prompt in prompts:
            with tap_attention(pipe, tap):
                clip = generate_clip(pipe, prompt, seed, settings)
            print(f"{clip.seconds:6.1f} s  seed {seed}  {prompt}", flush=True)
            found.append(clip.frames)
        return found

    errors: dict[str, list[float]] = {n: [] for n in EIGHT}
    want = clips(InNumerics(plan, errors=errors), 1000)
    found = {}
    for name, tap, seed in (
        *((n, InNumerics(plan, n), 1000) for n in EIGHT),
        ("another seed", InNumerics(plan), 1001),
    ):
        psnr = [metrics.psnr(clip, twin) for clip, twin in zip(clips(tap, seed), want, strict=True)]
        found[name] = {"psnr_mean": statistics.mean(psnr), "psnr_worst": min(psnr)}
        if calls := errors.get(name):
            found[name] |= {"calls": len(calls), "error_median": statistics.median(calls), "error_worst": max(calls)}
            found[name]["error_p99"] = float(np.quantile(calls, 0.99))
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "examples" / "tiny_wan"))
    parser.add_argument("--plan", default=str(ROOT / "examples" / "tiny_wan" / "sparse_plan"))
    parser.add_argument("--prompts", default=str(ROOT / "examples" / "tiny_wan" / "prompts" / "heldout.txt"))
    parser.add_argument("--count", type=script.at_least_one, default=4, help="prompts to generate")
    parser.add_argument("--steps", type=script.at_least_one, default=20)
    parser.add_argument("--tokens", type=script.at_least_one, default=8192, help="of the data from a generator")
    parser.add_argument("--json", type=script.out_file, help="write what is printed here")
    return parser.parse_args()


def main() -> int:
    """Read the command line, measure, write. The exit status."""
    a = arguments()
    if (reason := available_backends()["gluon_sm90"]) is not None:
        raise BadInput(f"8 bits need the backend gluon_sm90: {reason}")
    about = stamp(torch.device("cuda"))
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    made = {str(dim): made_data(a.tokens, dim, 0.25) for dim in (64, 128)}
    for dim, kinds in made.items():
        for kind, row in kinds.items():
            print(f"head_dim {dim:3}  {kind:22}  " + "  ".join(f"{n} {e:.1e}" for n, e in row.items()), flush=True)
    load.quiet_libraries()
    prompts = load.read_prompts(a.prompts)[: a.count]
    plan = load.load_plan(a.plan)
    found = generations(a.model, plan, prompts, settings_of(plan, a.steps))
    for name, row in found.items():
        print(f"{name:12}  " + "  ".join(f"{key} {value:.3g}" for key, value in row.items()))
    if a.json:
        a.json.write_text(json.dumps({"about": about, "made": made, "generations": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    script.exit_with(main)
