"""A plan as one HTML file that opens from disk: pick a head, see what it computes and what it attended to.

Everything is inside the file. Its policy allows only the script and the style that are in it, by their hashes, and no
connection; what comes from a plan is data that the script writes as text.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffsparse import __version__
from diffsparse.entry import HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.order import TokenOrder
from diffsparse.plan import SparsityPlan
from diffsparse.saving import write_whole
from diffsparse.search.errors import BadInput, writing
from diffsparse.search.explain import HeadForecaster, recorded_costs
from diffsparse.search.measured import PooledAttention, fitting_attention
from diffsparse.search.sheet import colour_ramp, heat_of, kept_share
from diffsparse.search.show import family, tail_of

__all__ = ["inspector", "write_html"]

TEMPLATE = "inspector.html"
# Before base64, which adds a third. A plan of 40 layers, 40 heads and 4 phases, all heads different, stays below 20 MB.
MASK_BYTES = 5 * 2**20
ATTENTION_BYTES = 13 * 2**19
MAX_SIDE = 128
MAX_VALUE = 300  # characters of one parameter

#: Families by how often they occur, told apart by people with any colour vision (Okabe and Ito, 2008).
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#b79f00", "#7b5ea7", "#8c564b")
OWN_COLOURS = {"dense": "#59626d", "skip": "#c4362e"}


def write_html(
    plan: SparsityPlan,
    grid: TokenGrid | None,
    file: str | Path,
    *,
    folder: str | Path | None = None,
    phase: int | None = None,
) -> Path:
    """Write the inspector of a plan on ``grid``; over its measured attention where that lies in the plan's ``folder``.

    ``phase``: the one that is shown first. Raises :class:`BadInput`.
    """
    path = Path(file)
    if path.suffix.lower() not in (".html", ".htm"):
        raise BadInput(f"--html {str(file)!r}: the name must end in .html")
    if grid is None:
        raise BadInput("the grid to show the plan on is not known; give --grid T,H,W, for example --grid 21,30,52")
    name = Path(folder).resolve().name if folder is not None else str(plan.record.get("preset", ""))
    page = inspector(plan, grid, fitting_attention(plan, grid, folder), phase=phase or 0, name=name)
    with writing(path, "--html"):
        path.parent.mkdir(parents=True, exist_ok=True)
        return write_whole(path, page.encode())


def inspector(
    plan: SparsityPlan, grid: TokenGrid, attention: PooledAttention | None = None, *, phase: int = 0, name: str = ""
) -> str:
    """The whole page."""
    template = Path(__file__).with_name(TEMPLATE).read_text("utf-8")
    data = json.dumps(_data(plan, grid, attention, phase), allow_nan=False, separators=(",", ":"))
    # Inside a script element only "<" can end it; the others are escaped so that nobody has to think about them.
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    values = {
        "TITLE": html.escape(f"Sparsity plan {name}" if name else "Sparsity plan"),
        "POLICY": html.escape(_policy(template)),
        "DATA": data,
    }
    # All at once: a value that holds another one's mark is not filled in again.
    return re.sub(r"@@([A-Z]+)@@", lambda found: values[found[1]], template)


def _policy(template: str) -> str:
    """A content security policy under which nothing but this template's own script and style can run."""

    def digest(tag: str) -> str:
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
        return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()

    return f"default-src 'none'; script-src 'sha256-{digest('script')}'; style-src 'sha256-{digest('style')}'"


def _data(plan: SparsityPlan, grid: TokenGrid, attention: PooledAttention | None, phase: int) -> dict[str, Any]:
    schedule = plan.schedule
    shape = plan.index.shape
    levels = [schedule.sparse_below, *schedule.phase_bounds, schedule.dense_below]
    entries = list(plan.entries)
    index = plan.index.astype(np.uint32)
    dense_layers = [i for i, layer in enumerate(plan.layers) if layer in schedule.dense_layers]
    if dense_layers:
        index = index.copy()
        index[:, dense_layers] = len(entries)
        entries.append(HeadEntry())
    used = Counter(family(entries[i]) for i in index.reshape(-1).tolist())
    forecaster = HeadForecaster(plan, recorded_costs(plan))
    told = [_entry(entry, forecaster, grid) for entry in entries]
    densities = np.array([t["density"] for t in told])[index].mean((1, 2))
    masks = _Masks(plan, grid, attention, entries, index)
    figures = None if attention is None else attention.figures_of(plan)
    kept_mass = masks.kept_mass if figures is None else figures.kept_mass
    a = plan.architecture
    return {
        "version": __version__,
        "facts": [
            f"{a.model_class}, {len(a.layers)} layers, {a.heads} heads of {a.head_dim}" if a else "any model",
            f"{grid.seq_len:,} tokens ({grid})",
            f"blocks of {plan.block_size}",
            f"dense steps: {' and '.join(schedule.dense_steps('.3g')) or 'none'}",
            "density by phase " + ", ".join(f"{d:.3f}" for d in densities),
        ],
        "start": phase,
        "phases": [f"{high:.3g} to {low:.3g}" for high, low in zip(levels, levels[1:], strict=False)],
        "layers": list(plan.layers),
        "heads": shape[2],
        "uniform": plan.is_uniform,
        "denseLayers": dense_layers,
        "unstable": _unstable(plan),
        "families": _colours(used),
        "carried": any(t["carried"] for t in told),
        "entries": told,
        "entryOf": _base64(index.astype("<u4")),
        "maskOf": _base64(masks.index.astype("<u4")),
        "orders": masks.orders,
        "masks": {"bits": _base64(masks.packed), "where": masks.where, "order": masks.order_of},
        "ramp": _base64((colour_ramp(np.linspace(0, 1, 256)) * 255).round().astype(np.uint8)),
        "attention": None if attention is None else _attention(attention.pooled, kept_mass),
        "error": None if figures is None else _base64(figures.error.astype("<f4")),
        "record": plan.record,
    }


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


def _colours(used: Counter[str]) -> dict[str, str]:
    free = [name for name, _ in used.most_common() if name not in OWN_COLOURS]
    chosen = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(free)}
    return chosen | {name: colour for name, colour in OWN_COLOURS.items() if name in used}


def _unstable(plan: SparsityPlan) -> list[int]:
    """Heads (layer times heads plus head) that the search marked."""
    search = plan.record.get("search")
    marked = search.get("unstable_heads") if isinstance(search, dict) else None
    heads = plan.index.shape[2]
    names = {f"{layer}/{head}": i * heads + head for i, layer in enumerate(plan.layers) for head in range(heads)}
    return [names[n] for n in marked if isinstance(n, str) and n in names] if isinstance(marked, list) else []


# -- entries -----------------------------------------------------------------------------------------------------------


def _entry(entry: HeadEntry, forecaster: HeadForecaster, grid: TokenGrid) -> dict[str, Any]:
    found = forecaster.head(entry, grid)
    skipped = entry.execution.mode == "skip"
    return {
        "family": family(entry),
        "pattern": "the head is left out" if skipped else str(entry.pattern),
        "parameters": [] if skipped else [(name, _value(value)) for name, value in entry.pattern.parameters()],
        "order": str(entry.order),
        "tail": tail_of(entry),
        "density": round(found.density, 5),
        "kept": round(found.work.kept or 0.0, 5),
        "time": None if found.time is None else round(found.time, 4),
        "carried": found.carried,
    }


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        text = ", ".join(f"({_value(v)})" if isinstance(v, tuple) else _value(v) for v in value) or "none"
    else:
        text = "all" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= MAX_VALUE else text[: MAX_VALUE - 1] + "…"


# -- pictures ----------------------------------------------------------------------------------------------------------


class _Masks:
    """The distinct (entry, order of the picture) of a plan, bit-packed.

    index: ``[phases, layers, heads]`` into them. where: of each ``[first byte, side, bits per value]``; a mask whose
    every block has a bin of its own needs one bit, one that was pooled gets four. order_of: of each, into ``orders``.
    kept_mass: ``[phases, layers, heads]``, the share of the measured attention that is computed exactly, where there
    is any: by bins, as if attention were even inside each. For folders whose search did not record it.
    """

    def __init__(
        self,
        plan: SparsityPlan,
        grid: TokenGrid,
        attention: PooledAttention | None,
        entries: Sequence[HeadEntry],
        index: np.ndarray,
    ) -> None:
        self.index = np.zeros(index.shape, np.uint32)
        self.kept_mass = np.zeros(index.shape)
        self.orders: list[str] = []
        self.order_of: list[int] = []
        self.where: list[tuple[int, int, int]] = []
        seen: dict[tuple[int, TokenOrder], int] = {}
        for at in np.ndindex(index.shape):
            seen.setdefault(self._key(at, plan, attention, entries, index), len(seen))
        side = _side(len(seen), MASK_BYTES, bits=4)
        parts: list[np.ndarray] = []
        size = 0
        for i, order in seen:
            blocks = order.partition(grid.visual_only(), plan.block_size).num_blocks
            share = kept_share(entries[i], grid, plan.block_size, order, min(blocks, side))
            packed, depth = _pack(share)
            self.where.append((size, share.shape[0], depth))
            if str(order) not in self.orders:
                self.orders.append(str(order))
            self.order_of.append(self.orders.index(str(order)))
            parts.append(packed)
            size += len(packed)
        self.packed = np.concatenate(parts)
        shares: dict[tuple[int, TokenOrder], np.ndarray] = {}
        for at in np.ndindex(index.shape):
            key = self._key(at, plan, attention, entries, index)
            self.index[at] = seen[key]
            if attention is None:
                continue
            pooled = np.nan_to_num(attention.pooled[at])
            if key not in shares:
                shares[key] = kept_share(entries[key[0]], grid, plan.block_size, key[1], len(pooled)).astype(np.float32)
            self.kept_mass[at] = float((pooled * shares[key]).sum() / max(float(pooled.sum()), 1e-12))

    @staticmethod
    def _key(
        at: tuple[int, ...],
        plan: SparsityPlan,
        attention: PooledAttention | None,
        entries: Sequence[HeadEntry],
        index: np.ndarray,
    ) -> tuple[int, TokenOrder]:
        i = int(index[at])
        return i, entries[i].order if attention is None else attention.orders[plan.layers[at[1]]][at[2]]


def _side(count: int, budget: int, bits: int) -> int:
    """The side of ``count`` square pictures that fit into ``budget`` bytes."""
    return max(8, min(MAX_SIDE, int((budget * 8 / bits / max(count, 1)) ** 0.5)))


def _pack(share: np.ndarray) -> tuple[np.ndarray, int]:
    """Values in [0, 1], row-major, as bytes and the number of bits of each, the first in the highest bits."""
    flat = share.reshape(-1)
    if ((flat == 0) | (flat == 1)).all():
        return np.packbits(flat > 0), 1
    levels = (flat * 15).round().astype(np.uint8)
    levels = np.append(levels, np.zeros(len(levels) % 2, np.uint8))
    return (levels[::2] << 4) | levels[1::2], 4


def _attention(pooled: np.ndarray, kept_mass: np.ndarray) -> dict[str, Any]:
    """Measured attention on the logarithmic scale of the pictures, in 256 steps; pooled further where it is large."""
    count = int(np.prod(pooled.shape[:3]))
    side = min(pooled.shape[-1], _side(count, ATTENTION_BYTES, bits=8))
    heat = np.empty((*pooled.shape[:3], side, side), np.uint8)
    for at in np.ndindex(pooled.shape[:3]):
        heat[at] = (heat_of(_pool(np.nan_to_num(pooled[at]), side)).clip(0, 1) * 255).round()
    kept = (kept_mass.clip(0, 1) * 10000).round().astype("<u2")
    return {"side": side, "heat": _base64(heat), "kept": _base64(kept)}


def _pool(matrix: np.ndarray, side: int) -> np.ndarray:
    """The means of ``side x side`` bins of a square matrix."""
    edges = np.linspace(0, len(matrix), side + 1).astype(int)
    size = np.diff(edges)
    sums = np.add.reduceat(np.add.reduceat(matrix, edges[:-1], 0), edges[:-1], 1)
    return sums / np.outer(size, size)
