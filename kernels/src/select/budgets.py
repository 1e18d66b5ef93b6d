"""What is kept of scored blocks: one function for every kind of :class:`~diffsparse.selection.Budget`."""

from __future__ import annotations

import torch

from diffsparse.kernels.select.largest import count_in_reach, count_largest
from diffsparse.kernels.select.ranking import Ranking, ranking_of
from diffsparse.selection import SHARE_ROUNDING, Budget

__all__ = ["keep", "row_weights"]

# Weights are summed in fp32: a sum may fall short of the whole by as much, which must not cost another block.
_ROUNDING = 1e-6
_LARGEST = torch.finfo(torch.float32).max
# What stands for "kept whatever it weighs" where weights are compared: they are at most 1.
_FORCED = 2.0
# AdaSpa's bound: heads that keep so much of their weights can do with fewer blocks.
_GOOD_RECALL = 0.8


def row_weights(scores: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Weights of a row's candidates, the softmax of their finite scores, which sum to 1; 0 of all others."""
    return scores.masked_fill(~candidates, -torch.inf).softmax(dim=-1).nan_to_num_(0.0)


def keep(scores: torch.Tensor, candidates: torch.Tensor, blocks: torch.Tensor, budget: Budget) -> torch.Tensor:
    """The pairs of blocks that a budget keeps: bool ``[B, H, N, N]``. Reads nothing back from the device.

    scores: fp32 ``[B, H, N, N]``, natural logarithms of weights; NaN counts as -inf, and +inf is kept whatever it
    weighs. candidates: bool, of a shape that expands to that: the pairs that may be kept. blocks: int64 ``[H]``, of how
    many key blocks a share is taken. Of equal scores the block that comes first is kept.
    """
    candidates = candidates.expand_as(scores)
    forced = scores.isposinf() & candidates
    scores = scores.nan_to_num(nan=-_LARGEST, posinf=_LARGEST, neginf=-_LARGEST)
    ranking = ranking_of(scores, candidates)
    wanted = _wanted(scores, candidates, forced, ranking, blocks, budget)
    low, high = (_share(share, blocks).clamp(min=1)[:, None] for share in (budget.least, budget.most))  # [H, 1]
    return ranking.best(wanted.maximum(low).minimum(high).minimum(candidates.sum(-1)))


def _wanted(
    scores: torch.Tensor,
    candidates: torch.Tensor,
    forced: torch.Tensor,
    ranking: Ranking,
    blocks: torch.Tensor,
    budget: Budget,
) -> torch.Tensor:
    """How many of its best blocks each row keeps by the kind of the budget: int64, expands to ``[B, H, N]``."""
    kind, value = budget.kind, budget.value
    if kind == "top_k":
        return torch.full_like(blocks, int(value))[:, None]
    if kind == "density":
        return _share(value, blocks)[:, None]
    if kind == "score":
        return ((scores >= value) & candidates).sum(-1)
    if kind == "best_heads":
        values = scores.masked_fill(~candidates, -torch.inf)
        pairs = (candidates.any(-1).sum(-1) * blocks).sum(1, keepdim=True)
        return count_largest(ranking.rows(values, together=True), _share(value, pairs)).view(scores.shape[:3])
    free = candidates & ~forced
    weights = row_weights(scores, free)  # what is kept anyway comes first, and weighs nothing
    if kind == "weight":
        return ((weights >= value) & free | forced).sum(-1)
    if kind == "top_p":
        return ranking.prefix(weights, value - _ROUNDING)
    if kind == "recall_heads":
        return _by_recall(ranking, weights, candidates, blocks, value)
    rows = candidates.any(-1).sum(-1)  # [B, H]
    pairs, weight = rows * blocks, free.any(-1).sum(-1).double()  # the weights of a row sum to 1
    if budget.over_heads:
        pairs, weight = pairs.sum(1, True), weight.sum(1, True)
    rated = ranking.rows(weights.masked_fill(~candidates, -1.0).masked_fill(forced, _FORCED), budget.over_heads)
    if kind in ("quantile", "quantile_heads"):
        found = count_largest(rated, _share(value, pairs))
    else:
        must = forced.sum((-1, -2)).double()
        must = must.sum(1, True) if budget.over_heads else must
        found = count_in_reach(rated, _FORCED * must + (value - _ROUNDING) * weight)
    return found.view(weights.shape[:3])


def _by_recall(
    ranking: Ranking, weights: torch.Tensor, candidates: torch.Tensor, blocks: torch.Tensor, value: float
) -> torch.Tensor:
    """Counts as of ``density``, of which heads with a good recall give half to those with the least."""
    heads, n = weights.shape[1], weights.shape[-1]
    count = _share(value, blocks).clamp(min=1, max=n)[None, :, None]
    recall = ranking.weigh(weights, count).sum(-1) / candidates.any(-1).sum(-1).clamp(min=1)  # [B, H]
    givers = (recall > _GOOD_RECALL).sum(1, keepdim=True).clamp(max=heads // 2)
    rank = recall.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    factor = torch.where(rank < givers, 0.5, torch.where(rank >= heads - givers, 1.5, 1.0))
    return _share(1.0, value * factor * blocks)[..., None]


def _share(share: float, blocks: torch.Tensor) -> torch.Tensor:
    """:func:`~diffsparse.selection.share_of` of numbers on a device."""
    return (share * blocks.double() - SHARE_ROUNDING).ceil().long()
