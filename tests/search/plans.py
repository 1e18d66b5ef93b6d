"""A plan for the tiny pipeline, and what a search leaves beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from diffsparse.entry import Execution, HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.order import RasterOrder, TileOrder, TokenOrder
from diffsparse.patterns import Empty, Window
from diffsparse.plan import Architecture, SparsityPlan
from diffsparse.schedule import Schedule
from diffsparse.search.measured import HeadFigures, PooledAttention, plan_digest


def make_plan(layers: int = 2, heads: int = 2, head_dim: int = 32) -> SparsityPlan:
    """Two phases; windows with and without a tail, a dense and a skipped head."""
    names = tuple(f"blocks.{i}.attn1" for i in range(layers))
    tile = TileOrder(1, 8, 8)
    entries = [
        HeadEntry(tile, Window(size=(1.0, 0.4, 0.4)), execution=Execution(tail="moments")),
        HeadEntry(),
        HeadEntry(RasterOrder(), Window(size=(2, None, None))),
        HeadEntry(tile, Empty(), execution=Execution(mode="skip")),
    ]
    table = {
        name: [[entries[(i + p + h) % len(entries)] for h in range(heads)] for p in range(2)]
        for i, name in enumerate(names)
    }
    return SparsityPlan.from_table(
        table,
        schedule=Schedule(sparse_below=0.9, phase_bounds=(0.5,)),
        architecture=Architecture("WanTransformer3DModel", names, heads, head_dim, (1, 1, 1)),
        record={
            "calibration": {
                "grid": "3x12x12", "steps": 3, "guidance_scale": 3.0, "height": 48, "width": 48, "num_frames": 9,
            }
        },
    )  # fmt: skip


def with_attention(folder: Path, plan: SparsityPlan, grid: str = "3,12,12", *, figures: bool = False) -> None:
    """Writes random attention beside a plan; with ``figures``, each head's error and kept mass too."""
    rng = np.random.default_rng(0)
    pooled = rng.random((*plan.index.shape, 12, 12))
    orders: dict[str, list[TokenOrder]] = {layer: [TileOrder(1, 8, 8)] * plan.index.shape[2] for layer in plan.layers}
    of_heads = HeadFigures(rng.random(plan.index.shape), rng.random(plan.index.shape), plan_digest(plan))
    PooledAttention(pooled, orders, TokenGrid.parse(grid), 64, of_heads if figures else None).save(folder)
