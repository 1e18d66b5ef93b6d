"""Blocks that rules pick from q and k: how often they are asked, what serves several steps, and the compiled operator.

What is kept belongs to one generation, one of its phases and one branch of guidance. Where these end is seen by
:class:`~diffsparse.pipelines.reuse.ReuseStore`, which holds the store of this module.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from diffsparse.blocks import BlockIndex
from diffsparse.grid import TokenGrid
from diffsparse.kernels.select.pick import Picked, assemble, pick_group
from diffsparse.layout import BlockLayout
from diffsparse.pipelines.context import CTX
from diffsparse.selection import is_due

if TYPE_CHECKING:
    from diffsparse.pipelines.call import Call
    from diffsparse.pipelines.reuse import ReuseStep

__all__ = ["PickStore", "pick_compiled"]

_NAME = "diffsparse::pick_blocks"


@dataclass(frozen=True, eq=False)
class _Held:
    """What was picked for a group of heads, for calls of ``batch`` items on a grid."""

    level: float
    phase: int
    grid: TokenGrid
    batch: int
    numbers: tuple[int, ...]
    picked: Picked

    def fits(self, step: ReuseStep, grid: TokenGrid, batch: int) -> bool:
        """Whether it was picked for calls like those of a step."""
        return (self.phase, self.grid, self.batch) == (step.phase, grid, batch)


_Key = tuple[int, int, int, object, tuple[int, ...]]  # branch, layer, which of its calls in the forward, rule, heads


class PickStore:
    """Picked blocks that serve later steps, by guidance branch, layer and heads.

    ``peak``: the most bytes that were held at a time. ``asked``, ``served``: how often a rule ran for a group of heads,
    and how often an earlier step's blocks took its place.
    """

    def __init__(self) -> None:
        self.peak = self.asked = self.served = 0
        self._held: dict[_Key, _Held] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that are held now."""
        return sum(held.picked.nbytes for held in self._held.values())

    def clear(self) -> None:
        """Forget all blocks."""
        self._held.clear()

    def drop(self, branches: Collection[int]) -> None:
        """Forget what was picked for these branches."""
        self._held = {key: held for key, held in self._held.items() if key[0] not in branches}

    def pick(
        self,
        step: ReuseStep | None,
        layer: int,
        number: int,
        layout: BlockLayout,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
    ) -> tuple[BlockIndex, torch.Tensor]:
        """The blocks of one call, ``[B, S, H, D]``, packed, and its density, fp32 ``[]``, on its device.

        step: the forward, or None where what others picked cannot be told from its own: then all rules are asked.
        number: which of the layer's calls in this forward it is.
        """
        batch, found = q.shape[0], {}
        for group in () if layout.heads.picks is None else layout.heads.picks.groups:
            cadence = group.selection.cadence
            key = (0 if step is None else step.branch, layer, number, group.selection, group.numbers)
            held = None if step is None else self._held.get(key)
            if held is not None and (step is None or not held.fits(step, layout.grid, batch)):
                held = None
            if held is not None and step is not None and not is_due(cadence, held.level, step.level):
                found[group] = held.picked
                self.served += 1
                continue
            self._held.pop(key, None)
            before = held.picked if held is not None and cadence == "shrink" else None
            found[group] = pick_group(layout, group, q, k, v, scale, before)
            self.asked += 1
            if step is not None and group.selection.is_kept and step.ahead != -1.0:
                self._held[key] = _Held(step.level, step.phase, layout.grid, batch, group.numbers, found[group])
                self.peak = max(self.peak, self.nbytes)
        return assemble(layout, found)


# What it reads and keeps differs from step to step, so that a CUDA graph must not replay it.
@torch.library.custom_op(
    _NAME, mutates_args=(), tags=[tag] if (tag := getattr(torch.Tag, "cudagraph_unsafe", None)) else []
)
def _pick(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_start: torch.Tensor, layer: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    call: Call | None = CTX.call
    index = int(layer)
    layout = None if call is None else call.state.layers[index].layout
    if call is None or layout is None:
        raise RuntimeError("compiled attention that picks its blocks ran outside its model's forward")
    found = call.pick(index, layout, q, k, v, scale)[0]
    return found.row_ptr, found.col_idx


@_pick.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_start: torch.Tensor, layer: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    n, (batch, _, heads, _) = block_start.shape[1] - 1, q.shape
    row_ptr = torch.empty(batch, heads * n + 1, dtype=torch.int32, device=q.device)
    return row_ptr, torch.empty(batch, heads * n, (n + 7) // 8, dtype=torch.uint8, device=q.device)


def pick_compiled(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: BlockLayout, layer: torch.Tensor, scale: float | None
) -> BlockIndex:
    """:meth:`Call.pick` of the forward that runs, of a layer by its index (int64, on the CPU)."""
    factor = float(q.shape[-1] ** -0.5 if scale is None else scale)
    row_ptr, col_idx = torch.ops.diffsparse.pick_blocks(q, k, v, layout.tokens.block_start, layer, factor)
    return BlockIndex(row_ptr, col_idx, layout.num_blocks)
