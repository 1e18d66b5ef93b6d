"""A layout as the operator takes it, in three arguments, and back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from diffsparse.blocks import BlockIndex
from diffsparse.heads import HeadSpec
from diffsparse.layout import BlockLayout
from diffsparse.online import OnlineRepair
from diffsparse.repair import HeadRepair
from diffsparse.tokens import TokenLayout

__all__ = ["as_operands", "from_operands"]

#: Stands before the name of a tail.
_TAIL = "tail:"
#: Stands before the number of rows of an online repair.
_ONLINE = "online:"


def as_operands(layout: BlockLayout, index: BlockIndex | None = None) -> tuple[list[torch.Tensor], list[int], str]:
    """The tensors of a layout, how its tokens are cut, and what holds for its heads, as names between commas.

    ``index``: blocks in place of its own.
    """
    tokens, heads = layout.tokens, layout.heads
    if index is None:
        index = layout.index
    tensors = [tokens.gather, tokens.scatter, tokens.block_start, tokens.head_order]
    tensors += [index.row_ptr, index.col_idx, heads.table]
    traits = list(heads.numerics)
    if isinstance(heads.repair, OnlineRepair):
        traits.append(f"{_ONLINE}{heads.repair.rows}")
    elif heads.repair is not None:
        tensors += heads.repair.tensors
    if tokens.needs_gather:
        traits.append("gather")
    traits += [f"{_TAIL}{name}" for name in heads.tails]
    return tensors, [tokens.block_size, tokens.text_before, tokens.num_visual], ",".join(traits)


@lru_cache(maxsize=64)
def _read(traits: str) -> tuple[tuple[str, ...], tuple[str, ...], bool, OnlineRepair | None]:
    """Numerics, tails, whether any order has to be gathered, and the online repair. Kept: a plan has few."""
    names = traits.split(",")
    tails = tuple(name.removeprefix(_TAIL) for name in names if name.startswith(_TAIL))
    numerics = tuple(name for name in names if name != "gather" and not name.startswith((_TAIL, _ONLINE)))
    rows = [int(name.removeprefix(_ONLINE)) for name in names if name.startswith(_ONLINE)]
    return numerics, tails, "gather" in names, OnlineRepair(rows[0]) if rows else None


def from_operands(
    tensors: Sequence[torch.Tensor], cut: Sequence[int], traits: str
) -> tuple[TokenLayout, BlockIndex, HeadSpec]:
    """The parts of the layout that :func:`as_operands` took apart."""
    gather, scatter, block_start, head_order, row_ptr, col_idx, table, *repair = tensors
    block_size, text_before, num_visual = cut
    numerics, tails, needs_gather, online = _read(traits)
    tokens = TokenLayout(gather, scatter, block_start, head_order, block_size, text_before, num_visual, needs_gather)
    heads = HeadSpec(table, numerics, tails, HeadRepair(*repair) if repair else online)
    return tokens, BlockIndex(row_ptr, col_idx, tokens.num_blocks), heads
