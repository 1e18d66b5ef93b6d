"""A layout as the operator takes it, in three arguments, and back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from diffsparse.blocks import BlockIndex
from diffsparse.heads import HeadSpec
from diffsparse.layout import BlockLayout
from diffsparse.repair import HeadRepair
from diffsparse.tokens import TokenLayout

__all__ = ["as_operands", "from_operands"]

#: Stands before the name of a tail.
_TAIL = "tail:"


def as_operands(layout: BlockLayout) -> tuple[list[torch.Tensor], list[int], str]:
    """The tensors of a layout, how its tokens are cut, and what holds for its heads, as names between commas."""
    tokens, index, heads = layout.tokens, layout.index, layout.heads
    tensors = [tokens.gather, tokens.scatter, tokens.block_start, tokens.head_order]
    tensors += [index.row_ptr, index.col_idx, heads.table]
    if heads.repair is not None:
        tensors += heads.repair.tensors
    traits = list(heads.numerics)
    if tokens.needs_gather:
        traits.append("gather")
    traits += [f"{_TAIL}{name}" for name in heads.tails]
    return tensors, [tokens.block_size, tokens.text_before, tokens.num_visual], ",".join(traits)


@lru_cache(maxsize=64)
def _read(traits: str) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    """Numerics, tails, and whether any order has to be gathered. Kept, since every call of a plan has the same few."""
    names = traits.split(",")
    tails = tuple(name.removeprefix(_TAIL) for name in names if name.startswith(_TAIL))
    numerics = tuple(name for name in names if name != "gather" and not name.startswith(_TAIL))
    return numerics, tails, "gather" in names


def from_operands(
    tensors: Sequence[torch.Tensor], cut: Sequence[int], traits: str
) -> tuple[TokenLayout, BlockIndex, HeadSpec]:
    """The parts of the layout that :func:`as_operands` took apart."""
    gather, scatter, block_start, head_order, row_ptr, col_idx, table, *repair = tensors
    block_size, text_before, num_visual = cut
    numerics, tails, needs_gather = _read(traits)
    tokens = TokenLayout(gather, scatter, block_start, head_order, block_size, text_before, num_visual, needs_gather)
    heads = HeadSpec(table, numerics, tails, HeadRepair(*repair) if repair else None)
    return tokens, BlockIndex(row_ptr, col_idx, tokens.num_blocks), heads
