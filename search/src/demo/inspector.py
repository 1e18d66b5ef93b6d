"""A plan to look into: the grid of all heads, and one head's attention, mask and figures."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffsparse.entry import HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.plan import SparsityPlan
from diffsparse.search.demo.upload import MAX_TOKENS, write_plan_zip
from diffsparse.search.density import call_density
from diffsparse.search.errors import BadInput
from diffsparse.search.explain import HeadForecaster, recorded_costs
from diffsparse.search.measured import ATTENTION_NAME, HeadFigures, PooledAttention
from diffsparse.search.sheet import head_cell, kept_share
from diffsparse.search.show import family, grid_of, tail_of

__all__ = ["Head", "PlanView", "check_blocks"]

PIXELS = 480
#: Blocks along one side of a mask; what larger plans need does not fit into the memory of a demo.
MAX_BLOCKS = 8192
MAX_ENTRIES = 20_000
MAX_ORDERS = 256

#: Hues in degrees by what a head's first pattern is.
HUES = {
    "bitmap": 210, "window": 130, "radial": 275, "band": 175, "diagonals": 320, "columns": 40, "sink": 20,
    "grid": 60, "full": 0, "empty": 0,
}  # fmt: skip
OTHER_HUE = 240


def check_blocks(plan: SparsityPlan, grid: TokenGrid) -> None:
    """Raises :class:`BadInput` where a plan's masks on this grid would be too large for a demo."""
    if grid.seq_len > MAX_TOKENS:
        raise BadInput(f"the plan is for {grid.seq_len:,} tokens ({grid}); at most {MAX_TOKENS:,} are shown here")
    orders = {entry.order for entry in plan.entries}
    if len(plan.entries) > MAX_ENTRIES or len(orders) > MAX_ORDERS:
        raise BadInput(
            f"the plan has {len(plan.entries):,} different entries in {len(orders):,} orders; at most "
            f"{MAX_ENTRIES:,} and {MAX_ORDERS} are shown here"
        )
    for order in orders:
        blocks = order.partition(grid.visual_only(), plan.block_size).num_blocks
        if blocks > MAX_BLOCKS:
            raise BadInput(f"the order {order} cuts {grid} into {blocks:,} blocks; at most {MAX_BLOCKS:,} are shown")


@dataclass(frozen=True)
class Head:
    """One head's entry in a phase. ``density``: of a sparse call, the tail counted."""

    layer: str
    head: int
    entry: HeadEntry
    density: float


@dataclass(eq=False)
class PlanView:
    """A plan, the grid it is shown on, and what was measured when it was searched, where that lies beside it."""

    plan: SparsityPlan
    name: str
    grid: TokenGrid
    attention: PooledAttention | None = None
    folder: Path | None = None
    _densities: dict[int, float] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, plan: SparsityPlan, name: str, folder: Path | None = None, grid: TokenGrid | None = None) -> PlanView:
        """``grid`` is for plans that name none. Raises :class:`BadInput` for what cannot be shown."""
        attention = PooledAttention.beside(folder)
        try:
            found = grid_of(plan, folder) or grid
        except (TypeError, ValueError, AttributeError) as error:
            raise BadInput(f"the plan's record names a grid that cannot be read: {error}") from error
        if found is None:
            raise BadInput("the plan does not say on which grid it was searched, so there is nothing to show it on")
        check_blocks(plan, found)
        if attention is not None and not _belongs(attention, plan):
            attention = None
        return cls(plan, name, found, attention, folder)

    # -- which heads there are -------------------------------------------------------------------------------------

    @property
    def phase_names(self) -> list[str]:
        s = self.plan.schedule
        bounds = [s.sparse_below, *s.phase_bounds, s.dense_below]
        return [f"{i}: noise {high:.2f} to {low:.2f}" for i, (high, low) in enumerate(zip(bounds, bounds[1:]))]

    @property
    def layers(self) -> list[str]:
        return ["all layers"] if self.plan.is_uniform else list(self.plan.layers)

    @property
    def heads(self) -> int:
        return int(self.plan.index.shape[2])

    @cached_property
    def figures(self) -> HeadFigures | None:
        """What the search recorded of this plan's heads."""
        return None if self.attention is None else self.attention.figures_of(self.plan)

    @cached_property
    def steps(self) -> int:
        """The number of denoising steps that the plan was searched for; 20 where it does not say."""
        calibration = self.plan.record.get("calibration")
        steps = calibration.get("steps") if isinstance(calibration, dict) else None
        return steps if isinstance(steps, int) and not isinstance(steps, bool) and 1 <= steps <= 1000 else 20

    def check(self, phase: Any, layer: Any, head: Any) -> tuple[int, int, int]:
        """Raises :class:`BadInput` for a phase, layer or head that the plan does not have."""
        shape = self.plan.index.shape
        for what, value, count in zip(("phase", "layer", "head"), (phase, layer, head), shape):
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
                raise BadInput(f"no {what} {str(value)[:20]}: this plan has {what}s 0 to {count - 1}")
        return phase, layer, head

    def at(self, phase: int, layer: int, head: int) -> Head:
        """One head, its phase, layer and head counted from 0."""
        phase, layer, head = self.check(phase, layer, head)
        name = self.plan.layers[layer]
        if name in self.plan.schedule.dense_layers:
            return Head(name, head, HeadEntry(), 1.0)
        i = int(self.plan.index[phase, layer, head])
        return Head(name, head, self.plan.entries[i], self._density(i))

    def _density(self, i: int) -> float:
        if i not in self._densities:
            entry, online = self.plan.entries[i], self.plan.online_repair
            self._densities[i] = call_density(entry, self.grid, self.plan.block_size, online)
        return self._densities[i]

    def phase_density(self, phase: int) -> float:
        """Mean density of the sparse calls of a phase."""
        layers, heads = self.plan.index.shape[1:]
        return float(np.mean([self.at(phase, i, j).density for i in range(layers) for j in range(heads)]))

    # -- all heads -------------------------------------------------------------------------------------------------

    def overview(self, phase: int, layer: int = 0, head: int = 0) -> str:
        """HTML: a button for every head, coloured by family (hue) and density (darkness); the chosen one is marked."""
        self.check(phase, layer, head)
        heads = self.heads
        rows: list[str] = []
        families: dict[str, int] = {}
        for i, label in enumerate(self.layers):
            cells = [f'<th scope="row">{html.escape(label.replace("blocks.", "").replace("transformer_", ""))}</th>']
            for j in range(heads):
                cell = self.at(phase, i, j)
                kind = family(cell.entry)
                families[kind] = families.get(kind, 0) + 1
                style = "background:{};color:{}".format(*_colours(kind, cell.density))
                about = html.escape(f"{label}, head {j}: {kind}, density {cell.density:.3f}", quote=True)
                chosen = ' aria-pressed="true"' if (i, j) == (layer, head) else ' aria-pressed="false"'
                cells.append(
                    f'<td><button type="button" data-layer="{i}" data-head="{j}" title="{about}" '
                    f'aria-label="{about}"{chosen} style="{style}">{100 * cell.density:.0f}</button></td>'
                )
            rows.append(f"<tr>{''.join(cells)}</tr>")
        legend = "".join(
            f'<span><i style="background:{_colours(kind, 0.35)[0]}"></i>{html.escape(kind)} ({count})</span>'
            for kind, count in sorted(families.items(), key=lambda item: -item[1])
        )
        head_row = "".join(f'<th scope="col">{j}</th>' for j in range(heads))
        return (
            f'<div class="ds-heads"><p>{html.escape(self.name)}: phase {html.escape(self.phase_names[phase])}, mean '
            f"density {self.phase_density(phase):.3f}. Rows are layers, columns heads; in each the density in percent, "
            f'darker for more.</p><div class="ds-scroll"><table><thead><tr><th></th>{head_row}</tr></thead><tbody>'
            f'{"".join(rows)}</tbody></table></div><p class="ds-legend">{legend}</p></div>'
        )

    # -- one head --------------------------------------------------------------------------------------------------

    def _share(self, chosen: Head) -> tuple[np.ndarray, str]:
        """Which share of each bin is computed, ``[m, m]``, and the order that the bins are in."""
        if self.attention is None:
            return kept_share(chosen.entry, self.grid, self.plan.block_size), str(chosen.entry.order)
        order = self.attention.orders[chosen.layer][chosen.head]
        m = self.attention.pooled.shape[-1]
        return kept_share(chosen.entry, self.grid, self.plan.block_size, order, m), str(order)

    def pictures(self, phase: int, layer: int, head: int) -> tuple[Image.Image | None, Image.Image]:
        """The measured attention (None where it is not known), and the mask, over it where it is known."""
        chosen = self.at(phase, layer, head)
        share, _ = self._share(chosen)
        if self.attention is None:
            return None, head_cell(share, None, PIXELS)
        pooled = self.attention.pooled[phase, layer, head]
        return head_cell(np.ones_like(share), pooled, PIXELS), head_cell(share, pooled, PIXELS)

    def facts(self, phase: int, layer: int, head: int) -> list[tuple[str, str]]:
        """What is known about a head, as name and text."""
        chosen = self.at(phase, layer, head)
        entry = chosen.entry
        share, order = self._share(chosen)
        rows = [
            ("family", family(entry)),
            ("order", str(entry.order)),
            ("pattern", str(entry.pattern)),
            ("tail", tail_of(entry)),
            ("density of a call, tail counted", f"{chosen.density:.3f}"),
        ]
        if entry.pattern.is_carried(self.grid, entry.order, self.plan.block_size):
            rows.append(("on this grid", "its bitmap is carried over from the grid it was measured on"))
        if self.attention is None:
            rows.append(("kept mass", "not known: no measured attention lies beside this plan"))
        else:
            pooled = self.attention.pooled[phase, layer, head]
            kept = float((pooled * share).sum() / max(pooled.sum(), 1e-30))
            if self.figures is not None:
                kept = float(self.figures.kept_mass[phase, layer, head])
            rows.append(("kept mass", f"{kept:.3f} of the attention"))
            rows.append(("pictures' axes", f"queries down, keys across, in the order {order}"))
        rows.append(("error of the head", self._head_error(phase, layer, head)))
        rows.append(("cost of the head", self._cost(entry)))
        rows.append(("error of the plan", self._error()))
        return rows

    def _cost(self, entry: HeadEntry) -> str:
        try:
            costs = recorded_costs(self.plan)
        except BadInput as error:
            return str(error)
        if costs is None:
            return "not recorded"
        time = HeadForecaster(self.plan, costs).head(entry, self.grid).time
        return f"{time:.2f} of a dense head, by the times measured on {costs.device}"

    def _head_error(self, phase: int, layer: int, head: int) -> str:
        if self.figures is None:
            return "not recorded"
        return f"{self.figures.error[phase, layer, head]:.2g} of its output (squared), as the search predicts"

    def _error(self) -> str:
        """Of the whole plan, as it was predicted and as it was validated."""
        record = self.plan.record
        search, quality = record.get("search"), record.get("quality")
        parts = []
        if isinstance(search, dict) and isinstance(search.get("predicted_error"), (int, float)):
            parts.append(f"{search['predicted_error']:.4g} predicted (squared, of the final latent)")
        if isinstance(quality, dict) and isinstance(quality.get("psnr_mean"), (int, float)):
            parts.append(f"{quality['psnr_mean']:.1f} dB PSNR to dense when it was validated")
        return ", ".join(parts) or "not recorded"

    # -- steps -----------------------------------------------------------------------------------------------------

    def step(self, levels: Sequence[float], step: int) -> tuple[int | None, str]:
        """The phase of a step (counted from 1) of a trajectory, None where it runs dense; and a line that says so."""
        if not 1 <= step <= len(levels):
            raise BadInput(f"no step {step}: there are steps 1 to {len(levels)}")
        level = levels[step - 1]
        phase = self.plan.schedule.phases(levels)[step - 1]
        what = "dense" if phase is None else f"phase {phase}"
        return phase, f"step {step} of {len(levels)}: noise level {level:.3f}, {what}"

    # -- files -----------------------------------------------------------------------------------------------------

    def write_zip(self, folder: Path) -> Path:
        """The plan as a zip in ``folder``, with the measured attention where it is known."""
        attention = self.folder / ATTENTION_NAME if self.attention is not None and self.folder is not None else None
        return write_plan_zip(self.plan, folder / "sparse_plan.zip", attention)


def _belongs(attention: PooledAttention, plan: SparsityPlan) -> bool:
    """Was it measured for these phases, layers and heads?"""
    pooled = attention.pooled
    if pooled.ndim != 5 or pooled.shape[:3] != plan.index.shape or not 1 <= pooled.shape[3] == pooled.shape[4] <= 512:
        return False
    heads = plan.index.shape[2]
    return bool(np.isfinite(pooled).all()) and all(len(attention.orders.get(n, ())) == heads for n in plan.layers)


def _colours(kind: str, density: float) -> tuple[str, str]:
    """Background and text of a head's cell."""
    if kind == "skip":
        return "#f6dcd9", "#7a1b14"
    if kind == "dense":
        return "#3c434d", "#ffffff"
    hue = HUES.get(kind.split("|")[0].split("&")[0], OTHER_HUE)
    lightness = 88 - 55 * min(max(density, 0.0), 1.0) ** 0.6
    return f"hsl({hue} 55% {lightness:.0f}%)", "#ffffff" if lightness < 52 else "#14181d"
