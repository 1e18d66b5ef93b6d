"""A search whose scores are made up, and the plans that are composed from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffsparse.entry import TAILS
from diffsparse.grid import TokenGrid
from diffsparse.kernels.costs import CostTable
from diffsparse.order import TileOrder, TokenOrder
from diffsparse.pipelines.policy import ANY_MACHINE, Machine
from diffsparse.plan import Architecture
from diffsparse.search.candidates import BITMAP_DENSITIES
from diffsparse.search.compose import Candidate, Composer
from diffsparse.search.masks import mask_at
from diffsparse.search.options import FamilyTable, HeadScores
from diffsparse.search.score import LADDER
from diffsparse.search.search import SearchConfig

GRID, TILE = TokenGrid(2, 16, 16), TileOrder(1, 8, 8)
LAYERS = ("blocks.0.attn1", "blocks.1.attn1")
TRACED = (1.0, 0.7, 0.4, 0.1)


LEVELS = np.interp(np.arange(6) / 6, np.arange(5) / 4, [*TRACED, 0.0]).tolist()


def head_scores(
    error: np.ndarray, table: FamilyTable, energy: float, summed: np.ndarray, true: np.ndarray, value: Any = None
) -> HeadScores:
    """Of a head with errors ``[tails, NB, NB]`` of leaving a pair out, whose masks are made from ``value``."""
    left = np.zeros((len(error), table.num_families + len(BITMAP_DENSITIES)))
    for place, mask in zip(table.places, table.masks, strict=True):
        left[:, place] = (error * ~mask).sum((1, 2))
    for i, density in enumerate(BITMAP_DENSITIES):
        mask = mask_at(error[1] if value is None else value, table.weight, density)
        left[:, table.num_families + i] = (error * ~mask).sum((1, 2))
    return HeadScores(left, energy, summed, true)


class Scores:
    """A search's measurements. Head 1 of the first layer puts out nothing at all."""

    silent: tuple[int, int] | None = (0, 1)

    def __init__(self, config: SearchConfig) -> None:
        self.config = config
        self.architecture = Architecture("WanTransformer3DModel", LAYERS, 2, 32, (1, 1, 1))
        self.layers = LAYERS
        self.tables: dict[TokenOrder, FamilyTable] = {}

    def errors(self, layer: str, head: int, step: int) -> np.ndarray:
        """Block scores of one traced step that fall off with distance, and some noise: ``[tails, NB, NB]``."""
        j = LAYERS.index(layer)
        silent = (j, head) == self.silent
        rng = np.random.default_rng([j, head, step])
        n = len(self.table(GRID, TILE).weight)
        near = np.exp(-abs(np.arange(n)[:, None] - np.arange(n)) / (1 + 2 * j + head))
        noise = rng.random((n, n))  # what a pair is worth without a tail it is mostly worth with one, too
        return np.stack([near * noise / (1 + t) for t in range(len(TAILS))]) * (not silent)

    def head(self, layer: str, head: int, step: int) -> HeadScores:
        """Of one traced step."""
        return self.scores(layer, head, {step: 1.0})

    def scores(self, layer: str, head: int, weights: Mapping[int, float]) -> HeadScores:
        error = self._mixed(layer, head, weights)
        sums = error.sum((1, 2))[:, None] * (1 - np.array(LADDER))
        return head_scores(error, self.table(GRID, TILE), float(3 * error.sum()), sums, 1.5 * sums)

    def layer_scores(self, layer: str, weights: Mapping[int, float]) -> list[HeadScores]:
        return [self.scores(layer, head, weights) for head in range(self.architecture.heads)]

    def value(self, layer: str, head: int, weights: Mapping[int, float]) -> np.ndarray:
        """What pairs of blocks are worth: their errors with the mean tail."""
        return np.asarray(self._mixed(layer, head, weights)[1])

    def _mixed(self, layer: str, head: int, weights: Mapping[int, float]) -> np.ndarray:
        return np.asarray(sum(w * self.errors(layer, head, step) for step, w in weights.items()))

    def drift(self, layer: str, head: int) -> np.ndarray:
        """Outputs of the first layer change fast, those of the second hardly."""
        energy = [self.head(layer, head, step).energy for step in range(len(TRACED))]
        return np.array(energy) * (10.0 if layer == LAYERS[0] else 0.01)

    def table(self, grid: TokenGrid, order: TokenOrder) -> FamilyTable:
        if order not in self.tables:
            self.tables[order] = FamilyTable(grid, order, 64)
        return self.tables[order]


def composer(
    levels: Sequence[float] = LEVELS,
    costs: CostTable | None = None,
    machine: Machine = ANY_MACHINE,
    memory: float = 0.0,
    **changes: Any,
) -> Composer:
    """Of a search for a density of 0.5, but for ``changes`` of its settings."""
    asked = {"budget": None, "density": 0.5, "steps": 6, "validation_prompts": 0} | changes
    costs = costs or CostTable.of_call(
        "cpu", 1.0, (0.02, 0.1, 0.3, 0.6), {tail: (0.1, 0.2, 0.4, 0.7) for tail in TAILS}
    )
    orders = {(layer, head): TILE for layer in LAYERS for head in range(2)}
    effects, growth = np.full((len(TRACED), 2), 1.0), np.array([4.0, 2.0, 1.0, 1.0])
    search = Scores(SearchConfig(**asked))
    grids = dict.fromkeys(LAYERS, GRID)
    return Composer(search, levels, grids, orders, {GRID: costs}, machine, effects, growth, TRACED, memory=memory)


def found(count: int = 1, **settings: Any) -> tuple[Scores, list[Candidate]]:
    """Plans of :func:`composer`, which takes the settings."""
    made = composer(**settings)
    assert isinstance(made.search, Scores)
    return made.search, made.candidates(count)
