"""Layouts for compiled code, made alike so that layers and phases with different entries share one graph."""

from __future__ import annotations

from dataclasses import replace

import torch

from diffsparse.entry import NUMERICS, TAILS
from diffsparse.layout import BlockLayout
from diffsparse.plan import SparsityPlan

__all__ = ["alike", "mark_sizes"]

# Axes whose lengths depend on a layer's entries: number of orders, of blocks, of kept blocks.
_VARYING_TOKENS = {"gather": (0,), "scatter": (0,), "block_start": (0, 1)}
_VARYING_INDEX = {"row_ptr": (1,), "col_idx": (0,)}
_VARYING_PACKED = {"row_ptr": (1,), "col_idx": (1, 2)}


def alike(layout: BlockLayout, plan: SparsityPlan) -> BlockLayout:
    """The layout with what Dynamo makes constants of (flags, sizes of 1) the same for all layers of a plan."""
    orders = {}
    if layout.tokens.gather.shape[0] == 1:
        # A size of 1 is a constant even where the axis may vary; no head points at the second row.
        orders = {name: getattr(layout.tokens, name).repeat(2, 1) for name in _VARYING_TOKENS}
    index = layout.index
    if not layout.is_packed and len(index.col_idx) < 2:  # of a layer that computes nothing: an earlier step's serves
        index = replace(index, col_idx=torch.nn.functional.pad(index.col_idx, (0, 2 - len(index.col_idx))))
    # A registered tail decides which backend runs a layer, so layers that have one are by themselves.
    tails = set(layout.heads.tails)
    if tails <= set(TAILS):
        tails = plan.tails & set(TAILS)
    needs_gather = any(not entry.order.is_raster for entry in plan.entries)
    return replace(
        layout,
        index=index,
        tokens=replace(layout.tokens, needs_gather=needs_gather, **orders),
        heads=replace(
            layout.heads,
            numerics=tuple(n for n in NUMERICS if any(entry.execution.numerics == n for entry in plan.entries)),
            tails=tuple(sorted(tails)),
        ),
    )


def mark_sizes(layout: BlockLayout) -> BlockLayout:
    """The same layout, whose varying sizes Dynamo takes for variables at once, not only after it saw a second one."""
    of_index = _VARYING_PACKED if layout.is_packed else _VARYING_INDEX
    for part, varying in ((layout.tokens, _VARYING_TOKENS), (layout.index, of_index)):
        for name, axes in varying.items():
            torch._dynamo.maybe_mark_dynamic(getattr(part, name), axes)
    return layout
