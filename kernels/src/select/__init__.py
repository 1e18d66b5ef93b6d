"""Rules that pick blocks from q and k at denoising time: a file each, found by name.

Most rules are a *signal*, which scores every pair of blocks (``signals``), and a budget says what is kept of them
(``budgets``). A *selector* picks blocks by itself. ``pick`` runs those of a layout.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from diffsparse.blocks import BlockIndex
from diffsparse.heads import SKIP
from diffsparse.kernels.select.pick import assemble, pick_blocks, pick_group
from diffsparse.kernels.select.rules import (
    Selector,
    register_selector,
    register_signal,
    rule_mask,
    selectors,
)
from diffsparse.kernels.select.signals import Signal
from diffsparse.layout import BlockLayout
from diffsparse.selection import Budget, OnlineSelection

__all__ = [
    "Selector",
    "Signal",
    "assemble",
    "pick_blocks",
    "pick_group",
    "register_selector",
    "register_signal",
    "select_blocks",
    "selectors",
]


def select_blocks(
    name: str,
    q: torch.Tensor,
    k: torch.Tensor,
    layout: BlockLayout,
    budget: float | Budget,
    *,
    v: torch.Tensor | None = None,
    scale: float | None = None,
    within: bool = False,
    **parameters: float,
) -> BlockLayout:
    """The layout with the blocks that a rule picks for these queries and keys, in place of its own.

    q, k: ``[B, S, H, D]``, as for :func:`~diffsparse.kernels.sparse_attention`. Orders, tails and precisions stay, and
    skipped heads stay empty. Its densities are not known without reading the device, so they are empty.
    budget: a share of the video's key blocks, which every row keeps, or a :class:`~diffsparse.Budget`. v: the values,
    which some rules read, too. scale: factor of the logits; ``head_dim ** -0.5`` where None. within: only blocks that
    the layout has may be picked. parameters: of the rule.

    Raises ValueError for a name that no rule has, a budget outside (0, 1], parameters that the rule does not take, and
    an index that does not fit the layout.
    """
    if not isinstance(budget, Budget):
        if not 0 < budget <= 1:
            raise ValueError(f"a budget is a share of the key blocks in (0, 1], got {budget}")
        budget = Budget("density", float(budget))
    selection = OnlineSelection(name, budget, tuple(parameters.items()))
    if v is not None and v.shape != k.shape:
        raise ValueError(f"v has the shape of k, {list(k.shape)}; got {list(v.shape)}")
    if q.shape != k.shape or q.ndim != 4 or q.shape[1:3] != (layout.seq_len, layout.num_heads):
        raise ValueError(
            f"q and k are [batch, {layout.seq_len}, {layout.num_heads}, head_dim] here, got {list(q.shape)} and "
            f"{list(k.shape)}"
        )
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    family = layout.index.mask() if within else None
    mask = rule_mask(name, q, k, v, layout.tokens, budget, scale, selection.values, family)
    if family is not None:
        mask = mask & family
    index = BlockIndex.from_mask(mask, layout.tokens).without(layout.heads.table[:, SKIP] != 0)
    return replace(layout, index=index, heads=replace(layout.heads, picks=None), densities=())
