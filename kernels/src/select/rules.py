"""The rules by name: those that score pairs of blocks, and those that pick blocks by themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from diffsparse.blocks import BlockIndex
from diffsparse.kernels.select.anchor import score_anchor
from diffsparse.kernels.select.antidiagonal import score_antidiagonal
from diffsparse.kernels.select.budgets import keep
from diffsparse.kernels.select.clusters import score_clusters
from diffsparse.kernels.select.key_means import score_key_means
from diffsparse.kernels.select.low_bit import score_low_bit
from diffsparse.kernels.select.mass import score_mass, score_sampled_max
from diffsparse.kernels.select.pooled import score_pooled
from diffsparse.kernels.select.pooled_max import score_pooled_max
from diffsparse.kernels.select.proxy import score_proxy
from diffsparse.kernels.select.self_similar import score_self_similar
from diffsparse.kernels.select.signals import Signal
from diffsparse.kernels.select.spatial_temporal import score_spatial_temporal
from diffsparse.kernels.select.spread import score_spread
from diffsparse.kernels.select.sub_block import score_sub_block
from diffsparse.kernels.select.switch import score_switch
from diffsparse.kernels.select.tail_error import score_tail_error
from diffsparse.kernels.select.tree import score_tree
from diffsparse.kernels.select.vertical_slash import score_vertical_slash
from diffsparse.selection import Budget, add_rule
from diffsparse.tokens import TokenLayout

__all__ = [
    "MEANS",
    "Selector",
    "budget_mask",
    "register_selector",
    "register_signal",
    "rule_mask",
    "rule_scores",
    "selectors",
]


class Selector(Protocol):
    """Picks the blocks that heads compute, from the queries and keys of the call itself.

    ``q``, ``k``: ``[B, S, H, D]`` in the model's token order. ``tokens``: how they are cut. ``budget``: the share of
    the video's key blocks that a row of blocks keeps, in (0, 1]. Returns an index with lists for every item of the
    batch, or one that serves all. Parameters follow as keyword arguments with defaults.

    It runs in the middle of a generation, so it works on the device of q and reads nothing back from it.
    :meth:`BlockIndex.from_mask` makes an index that way, and adds the text, which is always kept.
    """

    def __call__(self, q: torch.Tensor, k: torch.Tensor, tokens: TokenLayout, budget: float) -> BlockIndex: ...


# Any callable, as each has parameters of its own.
_SIGNALS: dict[str, Callable[..., torch.Tensor]] = {
    "pooled": score_pooled,
    "pooled_max": score_pooled_max,
    "sub_block": score_sub_block,
    "antidiagonal": score_antidiagonal,
    "mass": score_mass,
    "sampled_max": score_sampled_max,
    "vertical_slash": score_vertical_slash,
    "key_means": score_key_means,
    "spread": score_spread,
    "self_similar": score_self_similar,
    "low_bit": score_low_bit,
    "anchor": score_anchor,
    "proxy": score_proxy,
    "tree": score_tree,
    "switch": score_switch,
    "clusters": score_clusters,
    "spatial_temporal": score_spatial_temporal,
    "tail_error": score_tail_error,
}
# Those of them that read values, too.
_WITH_VALUES = {"spatial_temporal", "tail_error"}
#: Those that read no more than means or bounds of blocks or their parts, so that a kernel saves the copy.
MEANS = frozenset({"pooled", "pooled_max", "sub_block", "spread", "self_similar", "tail_error"})
_SELECTORS: dict[str, Callable[..., BlockIndex]] = {}


def register_selector(name: str, rule: Selector, parameters: Mapping[str, float] | None = None) -> None:
    """Make a rule that picks blocks known by a name, so that plans can have it. ``parameters``: names and defaults.

    Raises ValueError where the name is taken or is not an identifier.
    """
    _check_name(name)
    _SELECTORS[name] = rule
    add_rule(name, parameters or {}, scores=False)


def register_signal(
    name: str, signal: Signal, parameters: Mapping[str, float] | None = None, *, values: bool = False
) -> None:
    """Make a rule that scores pairs of blocks known by a name; any budget serves it. ``parameters``: names and
    defaults. ``values``: it takes the values, too, as ``v=``, of the shape of ``k``.

    Raises ValueError where the name is taken or is not an identifier.
    """
    _check_name(name)
    _SIGNALS[name] = signal
    if values:
        _WITH_VALUES.add(name)
    add_rule(name, parameters or {}, scores=True)


def _check_name(name: str) -> None:
    if not name.isidentifier():
        raise ValueError(f"a selector's name is an identifier, such as 'pooled'; got {name!r}")
    if name in _SELECTORS or name in _SIGNALS:
        raise ValueError(f"there is a selector {name!r} already; take another name")


def selectors() -> tuple[str, ...]:
    """The names of all rules."""
    return (*_SIGNALS, *_SELECTORS)


def rule_scores(
    name: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    tokens: TokenLayout,
    scale: float,
    parameters: Mapping[str, float],
) -> torch.Tensor:
    """What a rule scores pairs of blocks: fp32 ``[B, H, N, N]``. Raises ValueError where it lacks values."""
    if name not in _WITH_VALUES:
        return _SIGNALS[name](q, k, tokens, scale, **parameters)
    if v is None:
        raise ValueError(f"the rule {name!r} reads values, too: pass v")
    return _SIGNALS[name](q, k, tokens, scale, v=v, **parameters)


def budget_mask(
    scores: torch.Tensor, tokens: TokenLayout, budget: Budget, family: torch.Tensor | None = None
) -> torch.Tensor:
    """The video's pairs of blocks that a budget keeps: bool ``[B, H, N, N]``. ``family``: as in :func:`rule_mask`."""
    visual = torch.stack([tokens.visual_blocks(o) for o in range(tokens.block_start.shape[0])])
    visual = visual[tokens.head_order.long()]  # [H, N]
    candidates = visual[:, :, None] & visual[:, None, :]
    candidates = candidates[None] if family is None else candidates & family
    return keep(scores, candidates, visual.sum(1), budget)


def rule_mask(
    name: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    tokens: TokenLayout,
    budget: Budget,
    scale: float,
    parameters: Mapping[str, float],
    family: torch.Tensor | None = None,
) -> torch.Tensor:
    """The video's pairs of blocks that a rule keeps: bool ``[B or 1, H, N, N]``; what it says of text is left open.

    family: bool ``[B or 1, H, N, N]``, the pairs that may be kept, or None for all. A rule that scores looks for its
    budget among them; one that picks by itself does not know of them.

    budget, parameters: as an :class:`~diffsparse.OnlineSelection` of that rule may have them. Raises ValueError for an
    index of the wrong shape.
    """
    if name in _SIGNALS:
        return budget_mask(rule_scores(name, q, k, v, tokens, scale, parameters), tokens, budget, family)
    selector = _SELECTORS[name]
    index = selector(q, k, tokens, budget.value, **parameters)
    found = (index.num_blocks, index.num_heads, index.device)
    wanted = (tokens.num_blocks, tokens.num_heads, tokens.device)
    if found != wanted or index.batch not in (1, q.shape[0]):
        raise ValueError(
            f"the selector {name!r} gave an index of {found[0]} blocks and {found[1]} heads on {found[2]} for "
            f"{index.batch} item(s); wanted {wanted[0]}, {wanted[1]}, {wanted[2]}, and 1 or {q.shape[0]}"
        )
    return index.mask()
