"""Compare a searched plan with hand-made ones of the same density, on the same clips:

    python benchmarks/quality.py examples/tiny_wan plan --prompts examples/tiny_wan/prompts/heldout.txt --json out.json

All are plans of this library, run by the same kernels. Rows:

- the searched plan;
- one window for all heads, without a tail, at (at least) its whole-trajectory density and with its dense steps, for
  several extents in time;
- radial attention at the lowest density it can have on the model's grid, with at least one dense step;
- with ``--calibration``, a plan searched for that same density and number of dense steps.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from diffsparse.entry import HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.order import RasterOrder, TileOrder, TokenOrder
from diffsparse.patterns import Pattern, Radial, Window
from diffsparse.plan import SparsityPlan
from diffsparse.schedule import Schedule
from diffsparse.search import load, script
from diffsparse.search.errors import BadInput
from diffsparse.search.evaluate import EvalReport, compare, generate_dense
from diffsparse.search.generate import GenerationSettings
from diffsparse.search.search import SearchConfig, search_plan, thoroughness
from diffsparse.search.show import grid_of

TIME_EXTENTS: tuple[float | None, ...] = (None, 0.6, 1)


def uniform(pattern: Pattern, order: TokenOrder, block_size: int, schedule: Schedule) -> SparsityPlan:
    """One pattern for all heads and all sparse steps, without a tail."""
    return SparsityPlan.uniform(HeadEntry(order, pattern), schedule=schedule, block_size=block_size)


def windows(plan: SparsityPlan, grid: TokenGrid, levels: np.ndarray) -> Iterator[tuple[str, SparsityPlan]]:
    """For each extent in time the smallest window that is at least as dense as ``plan``."""
    wanted = plan.trajectory_density(grid, levels)
    schedule = replace(plan.schedule, phase_bounds=(), dense_layers=())
    order = TileOrder(1, 8, 8) if plan.block_size == 64 else TileOrder(1, 8, 16)
    for extent in TIME_EXTENTS if grid.frames > 1 else (None,):
        for side in np.linspace(0.02, 1.0, 50):
            space = round(float(side), 3)
            found = uniform(Window((extent, space, space)), order, plan.block_size, schedule)
            if found.trajectory_density(grid, levels) >= wanted:
                yield f"window {'all' if extent is None else extent} x {space} x {space}", found
                break


def sparsest_radial(grid: TokenGrid, levels: np.ndarray, dense_steps: int, block_size: int) -> SparsityPlan:
    """Radial attention (both rules, decays from 0.05 to 1) at its lowest density."""
    schedule = Schedule(sparse_below=float((levels[dense_steps - 1] + levels[dense_steps]) / 2))
    found = [
        uniform(Radial(decay=decay, rule=rule), RasterOrder(), block_size, schedule)
        for rule in ("code", "paper")
        for decay in (0.05, 0.1, 0.2, 0.4, 0.8, 1.0)
    ]
    return min(found, key=lambda plan: plan.trajectory_density(grid, levels))


def row(report: EvalReport) -> dict[str, Any]:
    psnr = [clip.psnr for clip in report.clips]
    apart = report.other_seed_psnr or 0.0
    return {
        "plan": report.plan,
        "trajectory_density": report.trajectory_density,
        "call_density": report.call_density,
        "psnr": float(np.mean(psnr)),
        "above_another_seed": float(np.mean(psnr)) - apart,
        "worst_above_another_seed": min(psnr) - apart,
        "ssim": report.ssim.mean if report.ssim else None,
        "loop_speedup": report.loop_speedup,
        "clips": len(psnr),
    }


def line(found: dict[str, Any]) -> str:
    return (
        f"{found['plan']:28s} density {found['trajectory_density']:.3f}  PSNR {found['psnr']:6.2f} dB  "
        f"above another seed {found['above_another_seed']:+6.2f}  worst {found['worst_above_another_seed']:+6.2f}  "
        f"loop {found['loop_speedup']:.2f}x"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("plan")
    parser.add_argument("--prompts", type=Path, required=True, help="held-out prompts, one a line")
    parser.add_argument("--count", type=script.at_least_one, default=12, help="prompts to use")
    parser.add_argument("--seeds", type=script.at_least_one, default=2)
    parser.add_argument("--steps", type=script.at_least_one, default=20)
    parser.add_argument("--guidance-scale", type=float, default=5.0)
    parser.add_argument("--calibration", type=Path, help="prompts for a search at radial's density")
    parser.add_argument("--search-out", type=Path, default=Path("out/quality"), help="where that search goes")
    parser.add_argument("--only", nargs="*", help="rows whose name begins with one of these words")
    parser.add_argument("--device", type=script.device, default="auto")
    parser.add_argument("--json", type=script.out_file, help="write the rows and the machine here, after every row")
    return parser.parse_args()


def main() -> None:
    """Read the command line, generate, print and write."""
    a = arguments()
    load.quiet_libraries()
    device = a.device
    pipe = load.load_pipeline(a.model, device=device, dtype=load.choose_dtype("auto", device))
    plan = load.load_plan(a.plan)
    grid = grid_of(plan, a.plan)
    if grid is None:
        raise BadInput(f"{a.plan} does not say which grid it was searched on")
    size = {k: plan.record["calibration"].get(k) for k in ("height", "width", "num_frames")}
    settings = GenerationSettings(a.steps, a.guidance_scale, **size)
    prompts = load.read_prompts(a.prompts)[: a.count]
    dense = generate_dense(pipe, prompts, range(1000, 1000 + a.seeds), settings)
    levels = np.array(dense.noise_levels)
    dense_steps = plan.schedule.phases(levels).count(None)
    floor = dense.noise_floor.psnr if dense.noise_floor else float("nan")
    print(f"PSNR of another seed {dense.other_seed_psnr:.2f} dB, of another dense kernel {floor:.2f} dB", flush=True)

    rows: list[dict[str, Any]] = []

    def measure(name: str, candidate: SparsityPlan) -> None:
        if a.only and not name.startswith(tuple(a.only)):
            return
        report = compare(pipe, candidate, dense, name=name)
        rows.append(row(report))
        print(line(rows[-1]), flush=True)
        if a.json:
            result = {
                "environment": report.environment,
                "steps": a.steps,
                "guidance_scale": a.guidance_scale,
                "psnr_of_another_seed": dense.other_seed_psnr,
                "psnr_of_another_dense_kernel": floor,
                "rows": rows,
            }
            a.json.write_text(json.dumps(result, indent=1) + "\n")

    measure("searched", plan)
    for name, candidate in windows(plan, grid, levels):
        measure(name, candidate)
    first = max(1, dense_steps)
    radial = sparsest_radial(grid, levels, first, plan.block_size)
    measure("radial", radial)
    if a.calibration:
        config = SearchConfig(
            budget=None,
            density=radial.trajectory_density(grid, levels),
            steps=a.steps,
            guidance_scale=a.guidance_scale,
            dense_steps=first,
            block_size=plan.block_size,
            **thoroughness(device),
            **size,
        )
        calibration = load.read_prompts(a.calibration)
        measure("searched at radial's", search_plan(pipe, calibration, config, a.search_out, say=print))


if __name__ == "__main__":
    script.exit_with(main)
