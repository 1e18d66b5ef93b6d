"""Rules that pick blocks from q and k at denoising time: a file each, found by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch

from diffsparse.blocks import BlockIndex
from diffsparse.heads import SKIP
from diffsparse.kernels.select.pooled import select_pooled
from diffsparse.layout import BlockLayout
from diffsparse.tokens import TokenLayout

__all__ = ["Selector", "register_selector", "select_blocks", "selector", "selectors"]


class Selector(Protocol):
    """Picks the blocks that heads compute, from the queries and keys of the call itself.

    ``q``, ``k``: ``[B, S, H, D]`` in the model's token order. ``tokens``: how they are cut. ``budget``: the share of
    the video's key blocks that a row of blocks keeps, in (0, 1]. Returns an index with lists for every item of the
    batch, or one that serves all.

    It runs in the middle of a generation, so it works on the device of q and reads nothing back from it.
    :meth:`BlockIndex.from_mask` makes an index that way, and adds the text, which is always kept.
    """

    def __call__(self, q: torch.Tensor, k: torch.Tensor, tokens: TokenLayout, budget: float) -> BlockIndex: ...


_SELECTORS: dict[str, Selector] = {"pooled": select_pooled}


def register_selector(name: str, rule: Selector) -> None:
    """Make a rule known by a name. Raises ValueError where the name is taken or is not an identifier."""
    if not name.isidentifier():
        raise ValueError(f"a selector's name is an identifier, such as 'pooled'; got {name!r}")
    if name in _SELECTORS:
        raise ValueError(f"there is a selector {name!r} already; take another name")
    _SELECTORS[name] = rule


def selectors() -> tuple[str, ...]:
    """The names of all rules."""
    return tuple(_SELECTORS)


def selector(name: str) -> Selector:
    """The rule of that name. Raises ValueError where there is none."""
    if name not in _SELECTORS:
        raise ValueError(f"there is no selector {name!r}; there are {', '.join(_SELECTORS)}")
    return _SELECTORS[name]


def select_blocks(name: str, q: torch.Tensor, k: torch.Tensor, layout: BlockLayout, budget: float) -> BlockLayout:
    """The layout with the blocks that a rule picks for these queries and keys, in place of its own.

    q, k: ``[B, S, H, D]``, as for :func:`~diffsparse.kernels.sparse_attention`. Orders, tails and precisions stay, and
    skipped heads stay empty. Its densities are not known without reading the device, so they are empty.

    Raises ValueError for a name that no rule has, a budget outside (0, 1], and an index that does not fit the layout.
    """
    rule = selector(name)
    if not 0 < budget <= 1:
        raise ValueError(f"a budget is a share of the key blocks in (0, 1], got {budget}")
    if q.shape != k.shape or q.ndim != 4 or q.shape[1:3] != (layout.seq_len, layout.num_heads):
        raise ValueError(
            f"q and k are [batch, {layout.seq_len}, {layout.num_heads}, head_dim] here, got {list(q.shape)} and "
            f"{list(k.shape)}"
        )
    index = rule(q, k, layout.tokens, budget)
    found = (index.num_blocks, index.num_heads, index.device)
    wanted = (layout.num_blocks, layout.num_heads, layout.device)
    if found != wanted or index.batch not in (1, q.shape[0]):
        raise ValueError(
            f"the selector {name!r} gave an index of {found[0]} blocks and {found[1]} heads on {found[2]} for "
            f"{index.batch} item(s); wanted {wanted[0]}, {wanted[1]}, {wanted[2]}, and 1 or {q.shape[0]}"
        )
    return replace(layout, index=index.without(layout.heads.table[:, SKIP] != 0), densities=())
