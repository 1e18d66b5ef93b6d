"""The second size of a search: masks are made from both sizes, and options are judged at both.

One generation at the second size comes before the trace. Its maps, carried over to the main grid, count in the masks
that the trace judges. Another one comes after the trace: masks of all maps are carried to the second size and judged
there, on a prompt whose scores at that size they were not made from. Both are traced as the main size is, into a
section of the same record (:attr:`StoredSearch.also`), so that a killed search goes on.
"""

from __future__ import annotations

import torch

from diffsparse.grid import TokenGrid
from diffsparse.order import TokenOrder
from diffsparse.search.carried import Carry
from diffsparse.search.errors import BadInput
from diffsparse.search.layers import main_grid
from diffsparse.search.observe import Tracer, first_step
from diffsparse.search.parts import EarlierMasks
from diffsparse.search.stages.probe import why_unseen
from diffsparse.search.stages.trace import trace_prompts
from diffsparse.search.workspace import Workspace

__all__ = ["CarriedMasks", "begin_also", "end_also"]


def begin_also(work: Workspace) -> None:
    """Before the trace: the second size's grids, and what pairs of blocks are worth there.

    Raises :class:`BadInput` for a size at which nothing else is measured than at the main one.
    """
    also = work.also
    if also is None:
        return
    if not also.has_probe:
        _probe(work, also)
    if not also.is_traced(0):
        trace_prompts(also, [0], "also")
        also.recording = None
    if not also.is_traced(1):
        _carry(work, also, 1)


def end_also(work: Workspace) -> None:
    """After the trace: what masks of both sizes leave at the second one."""
    also = work.also
    if also is None or "also/done" in work.store:
        return
    if not also.is_traced(1):
        also.masks = CarriedMasks(work, also)
        trace_prompts(also, [1], "also")
    if (ran := also.trace_length) != work.trace_length:
        raise BadInput(
            f"a generation of {work.trace_length} steps has {ran} at the size {work.config.also_text}, so the two "
            "cannot be compared; give another --also-size"
        )
    _carry(work, also, 2)
    work.store.put_json("also/done", True)
    work.store.remove("carried/1/")
    work.store.remove("also/map/")


def _probe(work: Workspace, also: Workspace) -> None:
    tracer, text = Tracer(work.pipe, work.config.block, work.config.seed), work.config.also_text
    unseen = first_step(also.pipe, also.prompts[0], also.config.seed, also.settings(3), tracer.look)
    for layer, grid in work.grids.items():
        if layer not in tracer.grids:
            raise BadInput(f"{layer} cannot be searched at --also-size {text}: {why_unseen(unseen, layer)}")
        if (tracer.grids[layer].frames > 1) != (grid.frames > 1):
            raise BadInput(f"--also-size {text}: one size has frames and the other is an image; give two of a kind")
    grid, other = main_grid(work.grids), main_grid(tracer.grids)
    if grid.shape == other.shape:
        raise BadInput(f"--also-size {text} has the tokens of the main size, {grid.visual_only()}; give another size")
    also.put_probe(work.probe_at({layer: tracer.grids[layer] for layer in work.grids}))
    work.say(f"also measured at {text}: {other} = {other.seq_len} tokens")


def _carry(work: Workspace, also: Workspace, prompts: int) -> None:
    """Keep the second size's maps of so many prompts as they are on the main grid."""
    carries: dict[tuple[TokenGrid, TokenOrder], Carry] = {}
    for part in range(work.parts):
        for layer in work.layers:
            name = f"carried/{prompts}/{part}/{layer}"
            # Fewer steps may run than are asked for, so that a part may be empty.
            if name in work.store or f"sums/{part}/{layer}" not in also.store:
                continue
            maps = {}
            for order, value in also.maps(part, layer, prompts, work.device).items():
                key = also.grids[layer], order
                if key not in carries:
                    tables = also.table(*key), work.table(work.grids[layer], order)
                    carries[key] = Carry(*tables, work.device)
                maps[order] = carries[key].values(value)
            work.store.put_arrays(name, work.coded(layer, maps))


class CarriedMasks:
    """What masks of the main grid, made from all prompts and both sizes, compute at the second size."""

    def __init__(self, work: Workspace, also: Workspace) -> None:
        self.work, self.also = work, also
        self._main = EarlierMasks(work, work.prompts_traced)
        self._known: dict[tuple[str, int, TokenOrder], tuple[list[int], torch.Tensor]] = {}
        self._carries: dict[tuple[str, TokenOrder], Carry] = {}

    def levels(self, part: int, layer: str, order: TokenOrder, device: torch.device) -> list[torch.Tensor]:
        """As :meth:`EarlierMasks.levels`, on the second size's blocks."""
        found: list[torch.Tensor] = []
        main: list[torch.Tensor] | None = None
        for window, runs in enumerate(self.work.windows):
            run = next(members for members in runs if part in members)
            known = self._known.get((layer, window, order))
            if known is None or known[0] != run:
                if main is None:
                    main = self._main.levels(part, layer, order, device)
                known = self._known[layer, window, order] = run, self._carry(layer, order, main[window]).cpu()
            found.append(known[1].to(device))
        return found

    def _carry(self, layer: str, order: TokenOrder, level: torch.Tensor) -> torch.Tensor:
        if (layer, order) not in self._carries:
            source, target = (one.table(one.grids[layer], order) for one in (self.work, self.also))
            self._carries[layer, order] = Carry(source, target, level.device)
        return self._carries[layer, order].levels(level)
