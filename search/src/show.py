"""What a plan does, as data, as a text table and as a picture."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from diffsparse.entry import HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.limits import MAX_GRID_TOKENS
from diffsparse.patterns import Bitmap
from diffsparse.plan import SparsityPlan
from diffsparse.provenance import recorded_grid
from diffsparse.quality import quality_line
from diffsparse.search.columns import GLUE, text_table
from diffsparse.search.density import call_density
from diffsparse.search.errors import BadInput
from diffsparse.search.measured import HeadFigures, PooledAttention, fitting_attention

__all__ = [
    "check_tokens",
    "describe",
    "draw",
    "family",
    "grid_of",
    "parse_grid",
    "phase_names",
    "plan_table",
    "tail_of",
]


def parse_grid(text: str) -> TokenGrid:
    """``T,H,W`` of the command line."""
    try:
        grid = TokenGrid.parse(text)
    except ValueError as error:
        raise BadInput(f"--grid: {error}") from None
    check_tokens(grid, "--grid")
    return grid


def check_tokens(grid: TokenGrid, option: str) -> None:
    """Raises :class:`BadInput` for a grid so large that its block masks would not fit into memory."""
    if grid.seq_len > MAX_GRID_TOKENS:
        raise BadInput(
            f"{option}: {grid} has {grid.seq_len:,} tokens, at most {MAX_GRID_TOKENS:,} can be shown; "
            "give a smaller size"
        )


def family(entry: HeadEntry) -> str:
    """What kind of entry this is, in a word or two."""
    if entry.execution.mode == "skip":
        return "skip"
    if entry.online is not None:
        return entry.online.rule
    return "dense" if entry.is_whole else entry.pattern.family


def tail_of(entry: HeadEntry) -> str:
    """The tail that runs: ``none`` where nothing is dropped."""
    return "none" if entry.is_whole or entry.execution.mode == "skip" else entry.execution.tail


def grid_of(plan: SparsityPlan, folder: str | Path | None = None) -> TokenGrid | None:
    """The grid that a plan was searched on, where that is known."""
    recorded, attention = _recorded_grid(plan), PooledAttention.beside(folder)
    # The file of the attention says nothing of text tokens.
    if attention is None or (recorded is not None and recorded.shape == attention.grid.shape):
        return recorded
    return attention.grid


def _recorded_grid(plan: SparsityPlan) -> TokenGrid | None:
    calibration = plan.record.get("calibration")
    recorded = calibration.get("grid") if isinstance(calibration, dict) else None
    if recorded is None:
        return next((e.pattern.grid for e in plan.entries if isinstance(e.pattern, Bitmap)), None)
    return recorded_grid(recorded)


def _also_measured(plan: SparsityPlan) -> str | None:
    """The grid of the second size that a plan was searched for, or None."""
    calibration = plan.record.get("calibration")
    also = calibration.get("also") if isinstance(calibration, dict) else None
    return f"{also['grid']}, for masks that hold at both sizes" if isinstance(also, dict) and also.get("grid") else None


def _entry_densities(plan: SparsityPlan, grid: TokenGrid | None) -> list[float | None]:
    if grid is None:
        return [None] * len(plan.entries)
    return [call_density(entry, grid, plan.block_size, plan.online_repair) for entry in plan.entries]


def describe(plan: SparsityPlan, grid: TokenGrid | None = None, figures: HeadFigures | None = None) -> dict[str, Any]:
    """A plan as JSON values: schedule; families, tails and mean density on ``grid`` of each phase and layer.

    ``figures``: what the search recorded of the plan's heads; then a row has their mean ``error`` and ``kept_mass``,
    and the ``worst_error`` of a head.
    """
    densities = _entry_densities(plan, grid)
    schedule = plan.schedule
    rows: list[dict[str, Any]] = []
    for phase in range(schedule.num_phases):
        for i, layer in enumerate(plan.layers):
            chosen = plan.index[phase, i].tolist()
            dense = layer in schedule.dense_layers
            entries = [HeadEntry() if dense else plan.entries[j] for j in chosen]
            values = [1.0 if dense else densities[j] for j in chosen]
            rows.append(
                {
                    "phase": phase,
                    "layer": layer,
                    "families": dict(Counter(family(e) for e in entries).most_common()),
                    "tails": dict(Counter(tail_of(e) for e in entries).most_common()),
                    "orders": dict(Counter(str(e.order) for e in entries).most_common()),
                    "density": None if grid is None else float(np.mean([v for v in values if v is not None])),
                    "error": None if figures is None else float(figures.error[phase, i].mean()),
                    "worst_error": None if figures is None else float(figures.error[phase, i].max()),
                    "kept_mass": None if figures is None else float(figures.kept_mass[phase, i].mean()),
                }
            )
    call: list[float] = [r["density"] for r in rows if r["density"] is not None]
    a = plan.architecture
    return {
        "architecture": None
        if a is None
        else {
            "model_class": a.model_class,
            "layers": len(a.layers),
            "heads": a.heads,
            "head_dim": a.head_dim,
            "fingerprint": a.fingerprint,
        },
        "block_size": plan.block_size,
        "schedule": {
            "sparse_below": schedule.sparse_below,
            "dense_below": schedule.dense_below,
            "dense_between": [list(pair) for pair in schedule.dense_between],
            "phase_bounds": list(schedule.phase_bounds),
            "dense_layers": list(schedule.dense_layers),
        },
        "grid": None if grid is None else str(grid),
        "call_density": float(np.mean(call)) if call else None,
        "rules": [str(rule) for rule in plan.rules],
        "repaired_heads": 0 if plan.fitted_repair is None else plan.fitted_repair.num_heads,
        "reused_heads": plan.reused_heads,
        "online_rows": None if plan.online_repair is None else plan.online_repair.rows,
        "entries": len(plan.entries),
        "layers": rows,
        "record": plan.record,
    }


def _counts(counts: dict[str, int], total: int) -> str:
    if len(counts) == 1 and total > 1:
        return next(iter(counts))
    return ", ".join(f"{n}{GLUE}{name}" for name, n in counts.items()) if total > 1 else next(iter(counts))


def plan_table(
    plan: SparsityPlan, grid: TokenGrid | None = None, figures: HeadFigures | None = None, *, styled: bool = False
) -> str:
    """:func:`describe` for readers; as wide as the terminal; ``styled``: with colours."""
    data = describe(plan, grid, figures)
    a, s = data["architecture"], plan.schedule
    head = [
        ["model", "any" if a is None else f"{a['model_class']}, {a['layers']} layers, {a['heads']} heads of "
         f"{a['head_dim']} ({a['fingerprint']})"],
        ["blocks", f"{plan.block_size} tokens"],
        ["dense", ", ".join(s.dense_steps() or ["no step"])
         + (f", layers {', '.join(s.dense_layers)}" if s.dense_layers else "")],
        ["phases", ", ".join(name.replace(" ", GLUE) for name in phase_names(plan))],
        ["grid", str(grid) if grid is not None else "not known; --grid T,H,W gives densities"],
    ]  # fmt: skip
    if also := _also_measured(plan):
        head.append(["also measured", also])
    if data["call_density"] is not None:
        head.append(["call density", f"{data['call_density']:.3f} (mean of sparse calls, tails counted)"])
    if plan.rules:
        most = "" if all(rule.budget.is_fixed for rule in plan.rules) else "; densities are the most that this allows"
        head.append(["picked", "; ".join(data["rules"]) + f", while the model runs{most}"])
    if data["repaired_heads"]:
        head.append(["repair", f"{data['repaired_heads']} of {plan.index.size} heads (of all phases)"])
    if data["reused_heads"]:
        head.append(["reuse", f"{data['reused_heads']} of {plan.index.size} heads (of all phases) serve several steps"])
    if data["online_rows"] is not None:
        head.append(["repair", f"online, by {data['online_rows']} exact rows of each sparse call"])
    if line := quality_line(plan.record):
        head.append(["quality", line])
    if figures is not None:
        head.append(["error", "of the heads' outputs (squared, 1 for a head left out), predicted: mean (worst head)"])
    rows: list[list[str]] = []
    # A layer's phases one below the other: what changes over a generation is seen at a glance.
    places = {layer: i for i, layer in enumerate(plan.layers)}
    for row in sorted(data["layers"], key=lambda row: (places[row["layer"]], row["phase"])):
        total = sum(row["families"].values())
        rows.append(
            [
                str(row["phase"]),
                "all" if row["layer"] == "*" else row["layer"],
                _counts(row["families"], total),
                _counts(row["tails"], total),
                _counts(row["orders"], total),
                "-" if row["density"] is None else f"{row['density']:.3f}",
                *([] if figures is None else [f"{row['error']:.1e} ({row['worst_error']:.1e})"]),
            ]
        )
    header = ["phase", "layer", "families (heads)", "tails", "orders", "density"]
    header += [] if figures is None else ["error"]
    right = [0, *range(5, len(header))]
    styles = ["dim", "bold", "cyan", "", "dim", "green", "yellow"] if styled else None
    return f"{text_table(head)}\n\n{text_table(rows, header, right, names=1, styles=styles)}"


def phase_names(plan: SparsityPlan) -> list[str]:
    """Each phase with its noise levels: ``0: 0.9 to 0.5``."""
    s = plan.schedule
    bounds = [s.sparse_below, *s.phase_bounds, s.dense_below]
    return [f"{i}: {high:g} to {low:g}" for i, (high, low) in enumerate(zip(bounds, bounds[1:], strict=False))]


def draw(
    plan: SparsityPlan,
    grid: TokenGrid | None,
    file: str | Path,
    *,
    folder: str | Path | None = None,
    phase: int | None = None,
) -> Path:
    """Write the sheet of every layer's and head's pattern as a PNG; over its measured attention where that is known."""
    from diffsparse.search.report import write_picture
    from diffsparse.search.sheet import plan_sheet

    if grid is None:
        raise BadInput("the grid to draw the plan on is not known; give --grid T,H,W, for example --grid 21,30,52")
    attention = fitting_attention(plan, grid, folder)
    phases = range(plan.schedule.num_phases) if phase is None else [phase]
    picture = plan_sheet(plan, grid, attention, phases=list(phases), phase_names=phase_names(plan))
    path = Path(file)
    if path.suffix.lower() != ".png":
        raise BadInput(f"--png {str(file)!r}: the name must end in .png")
    return write_picture(picture, path, "--png")
