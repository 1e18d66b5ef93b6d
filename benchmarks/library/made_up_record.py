"""The record of a search that never ran: made-up scores in the place of measured ones, for a model of any size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import diffsparse
from diffsparse.entry import TAILS
from diffsparse.grid import TokenGrid
from diffsparse.kernels.costs import CostTable
from diffsparse.order import TokenOrder
from diffsparse.pipelines.policy import ANY_MACHINE
from diffsparse.plan import Architecture
from diffsparse.search.candidates import orders_for
from diffsparse.search.codes import to_codes
from diffsparse.search.config import SearchConfig
from diffsparse.search.facts import Facts
from diffsparse.search.masks import levels_of
from diffsparse.search.scored import LADDER, CallScores
from diffsparse.search.store import SearchStore
from diffsparse.search.stored_search import Probe, StoredSearch
from diffsparse.search.tally import sum_up

__all__ = ["make_up"]

#: Time of sparse calls over dense ones at these densities, about as on an H200.
COSTS = CostTable.of_call("made up", 0.03, (0.02, 0.1, 0.3, 0.6), {tail: (0.06, 0.14, 0.34, 0.65) for tail in TAILS})


def make_up(
    folder: Path, grid: TokenGrid, layers: int, heads: int, steps: int = 50, seed: int = 0, **changes: Any
) -> None:
    """Write ``folder/search.sqlite`` as a search that has measured everything leaves it.

    Scores fall off around the diagonal, and have columns and noise; heads and layers differ in how much. ``changes``:
    of the search's settings.
    """
    rng = np.random.default_rng(seed)
    names = tuple(f"blocks.{i}.attn1" for i in range(layers))
    asked: dict[str, Any] = {"budget": 0.3, "steps": steps, "validation_prompts": 0, "block_size": 128, "seed": seed}
    config = SearchConfig(**asked | changes)
    architecture = Architecture("WanTransformer3DModel", names, heads, 128, (1, 2, 2))
    orders = orders_for(grid.visual_only(), config.block)
    chosen = {name: tuple(orders[i] for i in rng.integers(0, len(orders), heads)) for name in names}
    with SearchStore(folder / "search.sqlite") as store:
        store.claim({"version": diffsparse.__version__})
        found = StoredSearch(architecture, 4, config, store, False, print, lambda *_: None)
        found.put_probe(
            Probe(
                dict.fromkeys(names, grid), chosen, branches=2, forward_seconds=1.0, head_dim=128, size=None, dense={},
                peak_bytes=60 * 10**9, tails={name: ("mean",) * heads for name in names},
            )
        )  # fmt: skip
        found.put_costs(grid, COSTS)
        found.put_machine(replace(ANY_MACHINE, kernel="made up"))
        levels = np.linspace(1, 0, config.trace_steps, endpoint=False).tolist()
        store.put_json(f"levels/{steps}", np.repeat(np.linspace(1, 0, steps, endpoint=False), 2).tolist())
        _put_scores(found, rng)
        for prompt in range(2):
            found.put_trace(prompt, levels, [["transformer"]] * len(levels))
        effects = np.exp(rng.normal(0, 0.5, (len(levels), layers)))
        found.put_sensitivity(effects, np.geomspace(4, 1, len(levels)))
        found.put_reuse_factor(2.0)
        found.put_facts(
            Facts(architecture, config, 4, None, {"id": "made up", "pipeline": "none"}, {"prompts_sha256": "0"}, {}, {})
        )


def _put_scores(found: StoredSearch, rng: np.random.Generator) -> None:
    """One head of each order is scored in earnest; the others are as it is, larger or smaller, and turned."""
    length = found.config.trace_steps
    levels = np.linspace(1, 0, length, endpoint=False).tolist()
    found.store.put_json("trace/0/levels", levels)  # what follows asks how many steps there are
    grid = next(iter(found.grids.values()))
    drawn = {
        order: _head(found, grid, order, rng) for row in found.head_orders.values() for order in dict.fromkeys(row)
    }
    size = found.architecture.heads
    for layer, row in found.head_orders.items():
        scale = np.exp(rng.normal(0, 1.5, size))
        for part in range(found.parts):
            steps = [step for step in range(length) if found.part(step) == part]
            sums: dict[str, np.ndarray] = {}
            for name in drawn[row[0]][0]:
                one = np.stack([drawn[order][0][name] for order in row])  # [heads, ...]
                ratio = name in ("dropped", "pooled")
                one = one * (1 if ratio else scale.reshape(-1, *[1] * (one.ndim - 1)))
                sums[name] = np.stack([one * (1 if ratio else 0.7**step) for step in steps]).astype(np.float32)
            sums["drift"] = sums["energy"] * np.float32(0.3)
            sums["known"] = np.ones_like(sums["drift"])
            for name in sums.keys() - {"summed", "true", "repaired", "pooled"}:
                sums[name] = sums[name] * 2  # sums over two prompts
            sums |= {"prompts": np.array(2), "judged": np.array(1)}
            for name in ("left", "dropped"):  # measured masks are judged on the second prompt alone
                measured = found.table(grid, row[0]).num_families
                sums[name][..., measured:] /= 2
            codes: dict[str, np.ndarray] = {}
            for i, order in enumerate(dict.fromkeys(row)):
                own = [head for head in range(size) if row[head] == order]
                code, peak = drawn[order][1]
                turns = rng.integers(0, code.shape[-1], (len(own), 2))
                codes[f"codes{i}"] = np.stack([np.roll(code, turn, (0, 1)) for turn in turns])
                codes[f"peak{i}"] = (peak * scale[own][:, None, None]).astype(np.float32)
            found.store.put_all({f"sums/{part}/{layer}": sums, f"map/2/{part}/{layer}": codes})


def _head(
    found: StoredSearch, grid: TokenGrid, order: TokenOrder, rng: np.random.Generator
) -> tuple[dict[str, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Sums of one head's scores, without the axis of heads, and its map in codes."""
    table = found.table(grid, order)
    n = len(table.weight)
    away = np.abs(np.arange(n)[:, None] - np.arange(n)) / n
    mass = np.exp(-away * 30) + 0.02 * rng.random(n) ** 4 + 1e-4 * rng.random((n, n))
    error = torch.from_numpy(mass * rng.random((n, n)) ** 2).float()
    share = torch.tensor([{"none": 1.0, "mean": 0.4}.get(tail, 0.3) for tail in TAILS])
    errors = share[:, None, None, None] * error[None, None]
    sums = errors.sum((2, 3))[..., None] * (1 - torch.tensor(LADDER))
    scores = CallScores(
        errors,
        torch.from_numpy(mass / mass.sum(1, keepdims=True)).float()[None],
        error.sum()[None] * 3,
        sums,
        sums * 1.3,
        sums * 0.9,
    )
    level = levels_of(errors[1], table.device_weight(torch.device("cpu")))
    told = sum_up(scores, table, [level] * len(found.windows), found.side)
    codes, peak = to_codes(errors[1])
    return {name: tensor[0].float().numpy() for name, tensor in told.items()}, (codes[0], peak[0])
