"""The file beside a plan: it comes back as it was written, belongs to one plan, and is checked when it is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffsparse.grid import TokenGrid
from diffsparse.order import RasterOrder, TileOrder, TokenOrder
from diffsparse.plan import SparsityPlan
from diffsparse.search.errors import BadInput
from diffsparse.search.measured import ATTENTION_NAME, HeadFigures, PooledAttention, figures_beside, plan_digest
from tests.search.plans import make_plan

GRID = TokenGrid(3, 12, 12)


def measured(plan: SparsityPlan, figures: bool = True) -> PooledAttention:
    rng = np.random.default_rng(0)
    orders: dict[str, list[TokenOrder]] = {name: [TileOrder(1, 8, 8), RasterOrder()] for name in plan.layers}
    phases, layers, heads = plan.index.shape
    # Transposed: what is written must not depend on how arrays lie in memory.
    error, kept = (rng.random((layers, heads, phases)).transpose(2, 0, 1) for _ in range(2))
    pooled = rng.random((layers, heads, phases, 9, 9)).transpose(2, 0, 1, 4, 3)
    found = HeadFigures(error, kept, plan_digest(plan))
    return PooledAttention(pooled, orders, GRID, 64, found if figures else None)


@pytest.mark.parametrize("figures", [True, False])
def test_what_was_written_comes_back(tmp_path: Path, figures: bool) -> None:
    plan = make_plan()
    wrote = measured(plan, figures)
    assert wrote.save(tmp_path) == tmp_path / ATTENTION_NAME
    read = PooledAttention.beside(tmp_path)
    assert read is not None and (read.orders, read.grid, read.block_size) == (wrote.orders, GRID, 64)
    assert np.allclose(np.sqrt(read.pooled), np.sqrt(wrote.pooled), atol=2.1e-3)  # half a step of 255, peaks up to 1
    assert (read.figures is not None) == figures and (figures_beside(plan, tmp_path) is not None) == figures
    if read.figures is not None and wrote.figures is not None:
        assert np.allclose(read.figures.error, wrote.figures.error)
        assert np.allclose(read.figures.kept_mass, wrote.figures.kept_mass)


def test_figures_belong_to_one_plan(tmp_path: Path) -> None:
    plan = make_plan()
    measured(plan).save(tmp_path)
    told = replace(plan, record={"more": "is said of it"})
    assert plan_digest(told) == plan_digest(plan) and figures_beside(told, tmp_path) is not None
    reread = SparsityPlan.from_pretrained(plan.save_pretrained(tmp_path))
    assert figures_beside(reread, tmp_path) is not None
    for other in (
        replace(plan, index=1 - np.minimum(plan.index, 1)),
        replace(plan, block_size=128),
        replace(plan, schedule=replace(plan.schedule, sparse_below=0.8)),
        make_plan(heads=3),
    ):
        assert plan_digest(other) != plan_digest(plan) and figures_beside(other, tmp_path) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"error": np.full((2, 2, 2), np.nan)}, "error holds a value that is out of range"),
        ({"error": np.full((2, 2, 2), -0.1)}, "error holds a value that is out of range"),
        ({"kept_mass": np.full((2, 2, 2), 1.1)}, "kept_mass holds a value that is out of range"),
        ({"kept_mass": np.ones((2, 2, 3))}, "kept_mass is not an array of phases, layers and heads"),
        ({"error": np.ones(8), "kept_mass": np.ones(8)}, "error is not an array of phases, layers and heads"),
    ],
)
def test_figures_that_cannot_be(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    from safetensors.numpy import load_file, save_file

    plan = make_plan()
    file = measured(plan).save(tmp_path)
    arrays = load_file(file) | {name: values.astype(np.float32) for name, values in change.items()}
    about = {"grid": "3,12,12", "block_size": "64", "orders": "{}", "plan": plan_digest(plan)}
    save_file(arrays, file, metadata=about)
    with pytest.raises(BadInput, match=f"{message}.*delete it"):
        PooledAttention.beside(tmp_path)
    save_file({name: arrays[name] for name in ("pooled", "peak")}, file, metadata=about)
    with pytest.raises(BadInput, match=r"error.*delete it"):
        PooledAttention.beside(tmp_path)
    save_file({name: arrays[name] for name in ("pooled", "peak")}, file, metadata={**about, "orders": "[]"})
    with pytest.raises(BadInput, match="delete it"):
        PooledAttention.beside(tmp_path)
