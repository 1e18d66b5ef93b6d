"""Layouts for compiled code, made alike so that layers and phases with different entries share one graph."""

from __future__ import annotations

from dataclasses import replace

import torch

from diffsparse.entry import NUMERICS
from diffsparse.layout import BlockLayout
from diffsparse.plan import SparsityPlan

__all__ = ["alike", "mark_sizes"]

# Axes whose lengths depend on a layer's entries: number of orders, of blocks, of kept blocks.
_VARYING = {"gather": (0,), "scatter": (0,), "block_start": (0, 1), "row_ptr": (0,), "col_idx": (0, 1)}


def alike(layout: BlockLayout, plan: SparsityPlan) -> BlockLayout:
    """The layout with what Dynamo makes constants of (flags, sizes of 1) the same for all layers of a plan."""
    orders = {}
    if layout.gather.shape[0] == 1:
        # A size of 1 is a constant even where the axis may vary; no head points at the second row.
        orders = {name: getattr(layout, name).repeat(2, 1) for name in ("gather", "scatter", "block_start")}
    return replace(
        layout,
        has_tail=any(entry.execution.tail != "none" for entry in plan.entries),
        numerics=tuple(n for n in NUMERICS if any(entry.execution.numerics == n for entry in plan.entries)),
        needs_gather=any(not entry.order.is_raster for entry in plan.entries),
        **orders,
    )


def mark_sizes(layout: BlockLayout) -> BlockLayout:
    """The same layout, whose varying sizes Dynamo takes for variables at once, not only after it saw a second one."""
    for name, axes in _VARYING.items():
        tensor = getattr(layout, name)
        torch._dynamo.maybe_mark_dynamic(tensor, axes[: tensor.ndim])  # lists have one axis, packed ones two
    return layout
