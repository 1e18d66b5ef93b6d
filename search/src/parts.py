"""Takes the scores of a prompt's traced steps into the search's sums and maps, part by part."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from diffsparse.entry import TAILS
from diffsparse.order import TokenOrder
from diffsparse.search.apart import Apart
from diffsparse.search.masks import levels_of
from diffsparse.search.scored import CallScores
from diffsparse.search.store import SearchStore
from diffsparse.search.tally import LayerSums, sum_up
from diffsparse.search.workspace import Workspace

__all__ = ["EarlierMasks", "PromptSums", "put_prompt"]

#: What only the first prompt is measured for.
OF_THE_FIRST = ("summed", "true", "repaired", "pooled")


class EarlierMasks:
    """What masks of the prompts before one compute. ``store``: of their maps, where the record is not at hand."""

    def __init__(self, work: Workspace, prompt: int, store: SearchStore | None = None) -> None:
        self.work, self.prompt, self.store = work, prompt, work.store if store is None else store
        # By layer and window: the run of parts that masks were made of, and what they compute.
        self._levels: dict[tuple[str, int], tuple[list[int], dict[TokenOrder, torch.Tensor]]] = {}

    def levels(self, part: int, layer: str, order: TokenOrder, device: torch.device) -> list[torch.Tensor]:
        """By densities, for each window of parts: uint8 ``[heads of the order, NB, NB]``."""
        windows = range(len(self.work.windows))
        return [self._made(part, layer, window, device)[order].to(device) for window in windows]

    def _made(self, part: int, layer: str, window: int, device: torch.device) -> dict[TokenOrder, torch.Tensor]:
        run = next(members for members in self.work.windows[window] if part in members)
        known = self._levels.get((layer, window))
        if known is None or known[0] != run:
            # A pipeline may run fewer steps than it is asked for: parts in which no step is were not written.
            first, *others = [p for p in run if f"map/{self.prompt}/{p}/{layer}" in self.store]
            total = self._maps(first, layer, device)
            for other in others:
                for of, value in self._maps(other, layer, device).items():
                    total[of] += value
            grid = self.work.grids[layer]
            # Held on the host.
            levels = {o: levels_of(v, self.work.table(grid, o).device_weight(device)).cpu() for o, v in total.items()}
            known = self._levels[layer, window] = run, levels
        return known[1]

    def _maps(self, part: int, layer: str, device: torch.device) -> dict[TokenOrder, torch.Tensor]:
        maps = self.work.maps(part, layer, self.prompt, device, self.store)
        return self.work.with_also(maps, part, layer, 1, self.store)


class PromptSums:
    """The sums and maps of one prompt, which are written layer by layer when the last step of a part is over.

    Nothing is held but one part, and what masks of earlier prompts compute in it. A part that has the prompt already,
    because a search was killed after it, is left alone. ``seen``: steps and layers that scores came of. ``apart``:
    where it is put where the prompts before are not known yet; then its masks are judged later
    (:mod:`diffsparse.search.judged`).
    """

    def __init__(self, work: Workspace, prompt: int, apart: Apart | None = None) -> None:
        self.work, self.prompt, self.apart = work, prompt, apart
        self.alone = len(work.traced()) == 1
        self.seen: set[tuple[int, str]] = set()
        self._part: int | None = None
        self._sums: dict[tuple[int, str], LayerSums] = {}
        self._drift: dict[tuple[int, str], np.ndarray] = {}
        self._maps: dict[tuple[str, TokenOrder], torch.Tensor] = {}
        self._done: dict[str, int] = {}
        self._earlier = work.masks or EarlierMasks(work, prompt)
        self._tails = {layer: [TAILS.index(tail) for tail in tails] for layer, tails in work.probe.tails.items()}

    def wants(self, step: int, layer: str) -> bool:
        """Whether scores of this layer at this step are still to be taken in."""
        if layer not in self.work.grids:
            return False
        if (part := self.work.part(step)) != self._part:
            self.flush()
            self._part = part
        self.seen.add((step, layer))
        if layer not in self._done:
            known = self.apart is not None and self.apart.has_part(self.prompt, part, layer)
            self._done[layer] = self.prompt + 1 if known else self.work.traced_in(part, layer)
        return self._done[layer] <= self.prompt

    def add(
        self, step: int, layer: str, order: TokenOrder, heads: Sequence[int], scores: CallScores, items: int
    ) -> None:
        """Scores of all heads of a call that have the same order."""
        table = self.work.table(self.work.grids[layer], order)
        tails = torch.tensor([self._tails[layer][head] for head in heads], device=scores.error.device)
        value = scores.error[tails, torch.arange(len(heads), device=tails.device)]
        levels: Sequence[torch.Tensor | None]
        if self.alone:  # no other prompt tells what its masks leave
            levels = [levels_of(value, table.device_weight(value.device))] * len(self.work.windows)
        elif self._done[layer] and self.apart is None:
            assert self._part is not None
            levels = self._earlier.levels(self._part, layer, order, value.device)
        else:  # nothing is left of this prompt by masks, which says nothing about them and is not counted (`judged`)
            levels = [None] * len(self.work.windows)
        side = self.work.side if self.prompt == 0 else None
        sums = self._sums.setdefault((step, layer), LayerSums(self.work.architecture.heads))
        sums.add(heads, sum_up(scores, table, levels, side), items)
        # Items of all calls of a step count alike.
        share = items / (self.work.probe.branches * self.work.probe.items)
        found = (value * share).to(torch.bfloat16).cpu()
        known = self._maps.get((layer, order))
        self._maps[layer, order] = found if known is None else known.add_(found)

    def add_drift(self, step: int, layer: str, drift: np.ndarray) -> None:
        """How fast each head's output changes: that of the step's last call counts, which knows of all."""
        self._drift[step, layer] = drift

    def flush(self) -> None:
        """Write the part that is over."""
        for layer in dict.fromkeys(layer for _, layer in self._sums):
            self._write(layer)
        self._sums, self._drift, self._maps, self._done = {}, {}, {}, {}

    def _write(self, layer: str) -> None:
        assert self._part is not None
        steps = sorted(step for step, name in self._sums if name == layer)
        new = {
            name: np.stack([self._sums[step, layer].arrays[name] for step in steps])
            for name in self._sums[steps[0], layer].arrays
        }
        drift = np.stack([self._drift[step, layer] for step in steps])
        known = np.isfinite(drift)
        new |= {"drift": np.where(known, drift, 0.0).astype(np.float32), "known": known.astype(np.float32)}
        maps = {order: self._maps[layer, order] for order in self.work.heads_of(layer)}
        if self.apart is not None:
            self.apart.put_part(self.prompt, self._part, layer, new | {"steps": np.array(steps)}, list(maps.values()))
        else:
            put_prompt(self.work, self._part, layer, self._done[layer], new, maps, self.alone)


def put_prompt(
    work: Workspace,
    part: int,
    layer: str,
    known: int,
    new: dict[str, np.ndarray],
    found: dict[TokenOrder, torch.Tensor],
    alone: bool = False,
) -> None:
    """Add a prompt's sums and maps of a part to those of the ``known`` prompts before it, always in their order.

    ``alone``: its masks were judged by itself.
    """
    judged = int(alone or known > 0)
    maps = {order: value.to(work.device).float() for order, value in found.items()}
    if known:
        old = work.sums(part, layer)
        judged += int(old["judged"])
        first = {name: old[name] for name in OF_THE_FIRST}
        new = {name: array + old[name] for name, array in new.items() if name not in OF_THE_FIRST} | first
        for order, value in work.maps(part, layer, known, work.device).items():
            maps[order] += value
    work.put_part(part, layer, new | {"prompts": np.array(known + 1), "judged": np.array(judged)}, maps)
