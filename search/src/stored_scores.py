"""What a search keeps of scores, part by part: sums for every option, and the maps that masks are made from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import torch

from diffsparse.grid import TokenGrid
from diffsparse.order import TokenOrder
from diffsparse.plan import Architecture
from diffsparse.search.candidates import BITMAP_DENSITIES
from diffsparse.search.carried import joined_values
from diffsparse.search.codes import from_codes, to_codes
from diffsparse.search.config import SearchConfig
from diffsparse.search.options import FamilyTable, HeadScores
from diffsparse.search.store import SearchStore

__all__ = ["StoredScores"]

#: Bytes of all maps that measured masks are made from. Where they would be more, steps share one. While a prompt is
#: traced there are those of the prompts before as well.
MAP_BYTES = 1.6e9


class StoredScores(ABC):
    """Writes and reads them, for one search. What else it has to know is the workspace's."""

    config: SearchConfig
    store: SearchStore
    architecture: Architecture
    tables: dict[tuple[TokenGrid, TokenOrder], FamilyTable]

    def __init__(self) -> None:
        self._known: dict[str, dict[str, np.ndarray]] = {}
        self._both: dict[str, dict[str, np.ndarray]] = {}
        # Of one layer, by parts: pictures of attention, and maps.
        self._drawn: tuple[str, dict[int, np.ndarray]] = "", {}
        self._held: tuple[str, dict[int, dict[TokenOrder, torch.Tensor]]] = "", {}

    @property
    @abstractmethod
    def grids(self) -> dict[str, TokenGrid]:
        """The grid of every layer that is searched, in the model's order."""

    @property
    @abstractmethod
    def head_orders(self) -> dict[str, tuple[TokenOrder, ...]]:
        """Those layers' orders, by head."""

    @property
    @abstractmethod
    def prompts_traced(self) -> int:
        """How many prompts are traced."""

    @property
    @abstractmethod
    def trace_length(self) -> int:
        """How many steps were traced."""

    @cached_property
    def side(self) -> int:
        """Bins of the pictures of attention. Orders cut a ragged grid into different numbers of blocks."""
        blocks = [self.table(self.grids[n], o).weight.shape[0] for n in self.grids for o in set(self.head_orders[n])]
        return min(80, *blocks)

    @cached_property
    def parts(self) -> int:
        """How many maps of each head there are, each of traced steps that follow one another."""
        blocks = max(self.table(self.grids[n], o).weight.size for n in self.grids for o in set(self.head_orders[n]))
        every = len(self.grids) * self.architecture.heads * blocks
        return int(np.clip(MAP_BYTES // every, 1, self.config.trace_steps))

    def part(self, step: int) -> int:
        """The part that a traced step is in."""
        return min(step * self.parts // self.config.trace_steps, self.parts - 1)

    @cached_property
    def windows(self) -> list[list[list[int]]]:
        """Ways to cut all parts into runs: one run of all, a few, and each part by itself.

        A phase of a plan has one mask for all its steps. What such a mask leaves at a step is measured for masks of
        longer and shorter runs around it.
        """
        counts = sorted({1, round(self.parts**0.5), self.parts})
        return [[list(map(int, run)) for run in np.array_split(np.arange(self.parts), count)] for count in counts]

    def _window(self, steps: Sequence[int]) -> dict[int, float]:
        """The ways to cut parts whose runs are about as long as these steps' parts, each with its share."""
        length = len({self.part(step) for step in steps})
        lengths = [self.parts / len(runs) for runs in self.windows]  # falling
        at = float(np.interp(-np.log(length), -np.log(lengths), np.arange(len(lengths))))
        low = int(at)
        return {low: 1.0} if at == low else {low: low + 1 - at, low + 1: at - low}

    def traced_in(self, part: int, layer: str) -> int:
        """From how many prompts a layer's sums and maps of a part are."""
        name = f"sums/{part}/{layer}"
        return int(self.store.get_arrays(name)["prompts"]) if name in self.store else 0

    def sums(self, part: int, layer: str) -> dict[str, np.ndarray]:
        """Sums over prompts, ``[steps of the part, heads, ...]`` each: :class:`~diffsparse.search.tally.LayerSums`."""
        return self.store.get_arrays(f"sums/{part}/{layer}")

    def maps(
        self,
        part: int,
        layer: str,
        prompts: int,
        device: torch.device | str = "cpu",
        store: SearchStore | None = None,
    ) -> dict[TokenOrder, torch.Tensor]:
        """What pairs of blocks are worth in a part, by the order of the heads: float32 ``[heads, NB, NB]`` each.

        ``prompts``: of the first so many. Those of one fewer are kept until the last one is traced: its masks are made
        from them, also where a search goes on in the middle of it. ``store``: another file than the record.
        """
        arrays = (self.store if store is None else store).get_arrays(f"map/{prompts}/{part}/{layer}")
        orders = dict.fromkeys(self.head_orders[layer])
        return {order: from_codes(arrays[f"codes{i}"], arrays[f"peak{i}"], device) for i, order in enumerate(orders)}

    def heads_of(self, layer: str) -> dict[TokenOrder, list[int]]:
        """A layer's heads by their orders."""
        found: dict[TokenOrder, list[int]] = {}
        for head, order in enumerate(self.head_orders[layer]):
            found.setdefault(order, []).append(head)
        return found

    def coded(self, layer: str, maps: dict[TokenOrder, torch.Tensor]) -> dict[str, np.ndarray]:
        """A layer's maps as they are stored."""
        codes: dict[str, np.ndarray] = {}
        for i, order in enumerate(dict.fromkeys(self.head_orders[layer])):
            codes[f"codes{i}"], codes[f"peak{i}"] = to_codes(maps[order])
        return codes

    def put_part(
        self, part: int, layer: str, sums: dict[str, np.ndarray], maps: dict[TokenOrder, torch.Tensor]
    ) -> None:
        """The sums of a part and its maps (:meth:`maps`) of as many prompts, both or neither."""
        codes = self.coded(layer, maps)
        self.store.put_all({f"sums/{part}/{layer}": sums, f"map/{int(sums['prompts'])}/{part}/{layer}": codes})

    @property
    @abstractmethod
    def also(self) -> StoredScores | None:
        """The scores at the second size, where there is one."""

    def with_also(
        self,
        maps: dict[TokenOrder, torch.Tensor],
        part: int,
        layer: str,
        prompts: int,
        store: SearchStore | None = None,
    ) -> dict[TokenOrder, torch.Tensor]:
        """Maps of a part, with those of the second size's first ``prompts`` prompts where there is one."""
        if self.config.also_size is None:
            return maps
        arrays = (self.store if store is None else store).get_arrays(f"carried/{prompts}/{part}/{layer}")
        return {
            order: joined_values(value, from_codes(arrays[f"codes{i}"], arrays[f"peak{i}"], value.device))
            for i, (order, value) in enumerate(maps.items())
        }

    def _means_of_both(self, layer: str) -> dict[str, np.ndarray]:
        """:meth:`_means`, with what options leave at the second size, too: the mean of both sizes.

        What is left at the second size counts as the same share of the output at the main one.
        """
        own, also = self._means(layer), self.also
        if also is None:
            return own
        if layer not in self._both:
            other = also._means(layer)
            share = np.divide(
                own["energy"], other["energy"], out=np.zeros_like(own["energy"]), where=other["energy"] > 0
            )
            left = other["left"] * share[..., None, None]
            for order, heads in also.heads_of(layer).items():
                # Families that are alike there have one place, and may differ here.
                table = also.table(also.grids[layer], order)
                left[:, heads, :, : table.num_families] = left[:, heads][..., table.same_as]
            self._both[layer] = {**own, "left": (own["left"] + left) / 2}
        return self._both[layer]

    def _means(self, layer: str) -> dict[str, np.ndarray]:
        """A layer's sums of all traced steps, ``[steps, heads, ...]``, as means over prompts."""
        if layer not in self._known:
            parts = [self.sums(part, layer) for part in range(self.parts) if f"sums/{part}/{layer}" in self.store]
            found = {}
            measured = self.table(self.grids[layer], self.head_orders[layer][0]).num_families
            for name in ("left", "dropped", "energy", "summed", "true", "repaired", "drift", "known"):
                arrays = []
                for part in parts:
                    array = part[name] / (1 if name in ("summed", "true", "repaired") else int(part["prompts"]))
                    if name in ("left", "dropped"):  # masks are measured on the prompts after the first
                        array[..., measured:] *= int(part["prompts"]) / max(int(part["judged"]), 1)
                    arrays.append(array)
                found[name] = np.concatenate(arrays)[: self.trace_length].astype(np.float64)
            self._known[layer] = found
        return self._known[layer]

    def scores(
        self,
        layer: str,
        head: int,
        weights: Mapping[int, float],
        masked: Sequence[int] | None = None,
        repaired: bool | None = None,
    ) -> HeadScores:
        """Scores of a head over the traced steps in ``weights``, each with its weight.

        ``masked``: the steps that share a measured mask; None: those steps. ``repaired``: whether errors are those that
        a repair leaves; None: where the plan will have one.
        """
        return self._head_scores(layer, slice(head, head + 1), weights, masked, repaired)[0]

    def layer_scores(
        self,
        layer: str,
        weights: Mapping[int, float],
        masked: Sequence[int] | None = None,
        repaired: bool | None = None,
        alone: bool = False,
    ) -> list[HeadScores]:
        """Those of all heads of a layer. ``alone``: at the main size, where the search has two."""
        return self._head_scores(layer, slice(None), weights, masked, repaired, alone)

    def _head_scores(
        self,
        layer: str,
        heads: slice,
        weights: Mapping[int, float],
        masked: Sequence[int] | None,
        repaired: bool | None,
        alone: bool = False,
    ) -> list[HeadScores]:
        steps, share = list(weights), np.array(list(weights.values()))
        means = self._means(layer) if alone else self._means_of_both(layer)
        mended = self.config.repair if repaired is None else repaired
        left, energy, summed, true = (
            np.tensordot(share, means[name][steps, heads], 1)
            for name in ("left", "energy", "summed", "repaired" if mended else "true")
        )
        left = self._resolved(left, layer, steps if masked is None else masked)
        return [HeadScores(left[h], float(energy[h]), summed[h], true[h]) for h in range(len(energy))]

    def _resolved(self, found: np.ndarray, layer: str, steps: Sequence[int]) -> np.ndarray:
        """``[..., options]`` with one measured mask of each density: of runs as long as the steps'."""
        first, count = self.table(self.grids[layer], self.head_orders[layer][0]).num_families, len(BITMAP_DENSITIES)
        measured = sum(
            share * found[..., first + i * count : first + (i + 1) * count] for i, share in self._window(steps).items()
        )
        return np.concatenate([found[..., :first], measured], -1)

    def value(self, layer: str, head: int, weights: Mapping[int, float]) -> np.ndarray:
        """What a head's pairs of blocks are worth over the traced steps in ``weights``: float ``[NB, NB]``."""
        share: dict[int, float] = {}
        for step, weight in weights.items():
            share[self.part(step)] = share.get(self.part(step), 0.0) + weight
        members = Counter(self.part(step) for step in range(self.trace_length))
        order = self.head_orders[layer][head]
        place = self.heads_of(layer)[order].index(head)
        found: torch.Tensor | None = None
        for part, weight in share.items():
            factor, own = weight / members[part], self._map(layer, part)[order][place]
            found = own * factor if found is None else found.add_(own, alpha=factor)  # these are large
        assert found is not None
        return found.numpy()

    def _map(self, layer: str, part: int) -> dict[TokenOrder, torch.Tensor]:
        """:meth:`maps`, those of one layer held."""
        if self._held[0] != layer:
            self._held = layer, {}
        held = self._held[1]
        if part not in held:
            held[part] = self.with_also(self.maps(part, layer, self.prompts_traced), part, layer, 2)
        return held[part]

    def drift(self, layer: str, head: int) -> np.ndarray:
        """How fast a head's output changes at each traced step, float ``[steps]``, mean over prompts.

        Squared, per squared change of the noise level, in the units of the output's squared norm
        (:class:`~diffsparse.search.drift.DriftMeter`). The first step, which follows on none, gets its successor's.
        """
        means = self._means(layer)
        known = means["known"][:, head]
        # A step that no prompt tells about is not to be skipped over: it counts as changing without limit.
        mean = np.where(known > 0, means["drift"][:, head] / np.where(known > 0, known, 1.0), np.nan)
        for step in range(len(mean) - 2, -1, -1):
            mean[step] = mean[step + 1] if np.isnan(mean[step]) else mean[step]
        return np.where(np.isnan(mean), np.inf, mean)

    def dropped(self, layer: str, head: int, place: int, steps: Sequence[int]) -> float:
        """Share of the attention weights that an option leaves out: mean over traced steps and prompts."""
        mean = self._means(layer)["dropped"][list(steps), head].mean(0)
        return float(self._resolved(mean, layer, steps)[place])

    def picture(self, layer: str, steps: Sequence[int]) -> np.ndarray:
        """Attention of the first prompt, pooled: float ``[heads, side, side]``, mean over traced steps."""
        if self._drawn[0] != layer:
            self._drawn = layer, {}
        parts = self._drawn[1]
        for part in sorted({self.part(step) for step in steps} - parts.keys()):
            parts[part] = self.sums(part, layer)["pooled"]
        first = {part: min(s for s in range(self.trace_length) if self.part(s) == part) for part in parts}
        found = [parts[self.part(s)][s - first[self.part(s)]].astype(np.float32) for s in steps]
        return np.asarray(np.mean(found, axis=0))

    def table(self, grid: TokenGrid, order: TokenOrder) -> FamilyTable:
        key = (grid.visual_only(), order)
        if key not in self.tables:
            self.tables[key] = FamilyTable(*key, self.config.block)
        return self.tables[key]
