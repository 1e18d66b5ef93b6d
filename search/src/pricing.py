"""What an option costs where it would run: the policy's word, that of a run itself, on a search's own measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from diffsparse.grid import TokenGrid
from diffsparse.kernels.costs import CostTable
from diffsparse.order import TokenOrder
from diffsparse.pipelines.policy import ANY_MACHINE, FULL, LayerVerdict, Machine, judge_layer
from diffsparse.search.config import SearchConfig
from diffsparse.search.options import FamilyTable, Option, work_density
from diffsparse.work import HeadWork, block_fill

__all__ = ["Pricing"]


class Pricing:
    """Prices of options on the layers of a search.

    ``grids``: of every layer's calls. ``costs``: on each of them. ``blocks``: of the visual tokens of each grid, in the
    order that is tried first. ``heads``: of a layer. ``machine``: on which the plan is to run, under ``"auto"``.
    """

    def __init__(
        self,
        config: SearchConfig,
        grids: Mapping[str, TokenGrid],
        costs: Mapping[TokenGrid, CostTable],
        blocks: Mapping[TokenGrid, int],
        heads: int,
        machine: Machine,
    ) -> None:
        self.config, self.grids, self.costs, self.blocks = config, grids, costs, blocks
        self.heads, self.machine = heads, machine
        #: Why options that are sparse by themselves would run dense.
        self.reasons: set[str] = set()
        self._known: dict[tuple[object, ...], float] = {}
        self._tables: dict[tuple[TokenGrid, TokenOrder], np.ndarray] = {}

    def work(self, option: Option, layer: str, order: TokenOrder) -> HeadWork:
        """What a head of a layer has to do, as :func:`diffsparse.work.head_work` has it of the option's entry."""
        grid, size = self.grids[layer], self.config.block
        inside = order.partition(grid.visual_only(), size).num_blocks
        text = sum(-(-tokens // size) for tokens in (grid.text_before, grid.text_after))
        share = option.density if option.blocks is None else option.blocks
        online = self.config.online if option.kind != "dense" else None
        density = work_density(option, grid, self.blocks[grid])
        return HeadWork(
            density=density if online is None else min(1.0, density + online.density(grid)),
            extra=0.0 if online is None else online.time(grid),
            blocks=1.0 - (1.0 - share) * (inside / (inside + text)) ** 2,
            tail=option.tail,
            gathered=option.kind != "dense" and not order.is_raster,
            skipped=option.kind == "skip",
            numerics="auto",
            visual=option.density,
            fill=block_fill(order, grid, size),
        )

    def cost(self, option: Option, layer: str, order: TokenOrder) -> float:
        """Of one head call of a layer, over a dense one: in time, or in work where a density is wanted.

        It is that of a layer whose heads are all alike. In time it is dense where such a layer would run dense on the
        machine; a density is what a plan asks for, whatever the machine makes of it.
        """
        grid = self.grids[layer]
        key = (grid, order, option.kind, option.tail, option.density, option.blocks)
        if key not in self._known:
            work = [self.work(option, layer, order)] * self.heads
            if self.config.density is not None:
                self._known[key] = judge_layer(work, grid.seq_len, ANY_MACHINE).density
            else:
                verdict = self._verdict(work, grid)
                self.reasons |= {verdict.reason} - {None, FULL}  # type: ignore[arg-type]
                assert verdict.time is not None  # all costs are known
                self._known[key] = verdict.time
        return self._known[key]

    def of_table(self, table: FamilyTable, layer: str) -> np.ndarray:
        """:meth:`cost` of all options of a table on a layer's grid, float ``[options]``."""
        key = (self.grids[layer], table.order)
        if key not in self._tables:
            self._tables[key] = np.array([self.cost(option, layer, table.order) for option in table.options])
        return self._tables[key]

    def layer(self, options: Sequence[Option], layer: str, orders: Sequence[TokenOrder]) -> LayerVerdict:
        """Of a layer on the machine, one option and order a head: whether it runs sparse, and its time over dense."""
        work = [self.work(option, layer, order) for option, order in zip(options, orders, strict=True)]
        return self._verdict(work, self.grids[layer])

    def _verdict(self, work: Sequence[HeadWork], grid: TokenGrid) -> LayerVerdict:
        return judge_layer(work, grid.seq_len, self.machine, self.costs[grid])
