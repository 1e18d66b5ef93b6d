"""The assignment problem of one trial: what may be chosen for every head in every phase, with errors and prices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np

from diffsparse.grid import TokenGrid
from diffsparse.order import TokenOrder
from diffsparse.pipelines.policy import LayerVerdict
from diffsparse.plan import Architecture
from diffsparse.search.choices import Choices
from diffsparse.search.config import SearchConfig
from diffsparse.search.options import FamilyTable, HeadScores, Option

__all__ = ["Items", "LayerSteps", "Measurements"]


@dataclass
class Items:
    """An item for each layer, head and phase, in that order.

    ``whole``: the price of each as a dense head. ``per_call``: the price of a call in which a head computes, over a
    dense one; ``prices`` have what earlier steps' outputs save. ``bytes``: what each option keeps for later steps.
    ``weights``: of the traced steps in each.
    """

    options: list[Sequence[Option]]
    errors: list[np.ndarray]
    prices: list[np.ndarray]
    whole: list[float]
    scores: list[HeadScores]
    weights: list[dict[int, float]]
    unstable: set[tuple[str, int]]
    per_call: list[np.ndarray]
    bytes: list[np.ndarray]

    def head_errors(self, choice: np.ndarray, layers: int, phases: int) -> np.ndarray:
        """Of each chosen option, over what leaving the head out would cost: ``[phases, layers, heads]``."""
        chosen = zip(self.errors, self.scores, choice, strict=True)
        # A head without any output loses nothing.
        relative = [errors[i] / scores.energy if scores.energy > 0 else 0.0 for errors, scores, i in chosen]
        return np.array(relative).reshape(layers, -1, phases).transpose(2, 0, 1)

    def all_dense(self, which: set[int]) -> Items:
        """With nothing but dense heads for some of them."""
        found = self._copy()
        for i in which:
            found.options[i] = [Option(0.0, 1.0, "none", "dense")]
            found.errors[i], found.prices[i] = np.zeros(1), np.array([self.whole[i]])
            found.per_call[i], found.bytes[i] = np.ones(1), np.zeros(1)
        return found

    def _copy(self) -> Items:
        return replace(
            self,
            options=[*self.options],
            errors=[*self.errors],
            prices=[*self.prices],
            per_call=[*self.per_call],
            bytes=[*self.bytes],
        )

    def without_reuse(self) -> Items:
        """With no option that keeps anything for later steps."""
        found = self._copy()
        for i, held in enumerate(self.bytes):
            self._keep(found, i, held == 0)
        return found

    def _keep(self, found: Items, i: int, kept: np.ndarray) -> None:
        own = self.options[i]
        if isinstance(own, Choices):
            found.options[i] = own.kept(kept)
        else:
            found.options[i] = [option for option, keep in zip(own, kept, strict=True) if keep]
        found.errors[i], found.prices[i] = self.errors[i][kept], self.prices[i][kept]
        found.per_call[i], found.bytes[i] = self.per_call[i][kept], self.bytes[i][kept]

    def none_dense(self, which: set[int]) -> Items:
        """With no option for some of them whose calls cost as much as dense ones. Leaving out costs less always."""
        found = self._copy()
        for i in which:
            self._keep(found, i, self.per_call[i] < 1)
        return found


class LayerSteps(NamedTuple):
    """Calls of a layer in a phase in which the same heads compute: how many, their options, and the policy's word.

    ``items``: the layer's, one a head.
    """

    items: list[int]
    options: list[Option]
    calls: int
    verdict: LayerVerdict


class Measurements(Protocol):
    """What a composer reads of a search."""

    config: SearchConfig
    architecture: Architecture

    @property
    def layers(self) -> Sequence[str]: ...

    def scores(self, layer: str, head: int, weights: Mapping[int, float]) -> HeadScores: ...

    def layer_scores(self, layer: str, weights: Mapping[int, float]) -> list[HeadScores]: ...

    def value(self, layer: str, head: int, weights: Mapping[int, float]) -> np.ndarray: ...

    def drift(self, layer: str, head: int) -> np.ndarray: ...

    def table(self, grid: TokenGrid, order: TokenOrder) -> FamilyTable: ...
