"""What is kept of scored blocks: one function for every kind of :class:`~diffsparse.selection.Budget`."""

from __future__ import annotations

import torch

from diffsparse.kernels.select.largest import count_in_reach, count_largest, sums_before
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
    best = scores.masked_fill(~candidates, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    wanted = _wanted(scores, candidates, forced, best, blocks, budget)
    low, high = (_share(share, blocks).clamp(min=1)[:, None] for share in (budget.least, budget.most))  # [H, 1]
    wanted = wanted.maximum(low).minimum(high).minimum(candidates.sum(-1))
    place = torch.arange(scores.shape[-1], device=scores.device)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, place < wanted[..., None])


def _wanted(
    scores: torch.Tensor,
    candidates: torch.Tensor,
    forced: torch.Tensor,
    best: torch.Tensor,
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
        ordered = scores.masked_fill(~candidates, -torch.inf).gather(-1, best).flatten(1, 2)[:, None]
        pairs = (candidates.any(-1).sum(-1) * blocks).sum(1, keepdim=True)
        return count_largest(ordered, _share(value, pairs)).view(scores.shape[:3])
    free = candidates & ~forced
    weights = row_weights(scores, free)
    if kind == "weight":
        return ((weights >= value) & free | forced).sum(-1)
    ordered = weights.gather(-1, best)  # what is kept anyway comes first, and weighs nothing
    if kind == "top_p":
        return (sums_before(ordered) < value - _ROUNDING).sum(-1)
    if kind == "recall_heads":
        return _by_recall(ordered, candidates, blocks, value)
    first = forced.gather(-1, best)
    ordered = ordered.masked_fill(~candidates.gather(-1, best), -1.0).masked_fill(first, _FORCED)
    rows = candidates.any(-1).sum(-1)  # [B, H]
    pairs, weight = rows * blocks, free.any(-1).sum(-1).double()  # the weights of a row sum to 1
    if budget.over_heads:
        ordered, pairs, weight = ordered.flatten(1, 2)[:, None], pairs.sum(1, True), weight.sum(1, True)
    if kind in ("quantile", "quantile_heads"):
        found = count_largest(ordered, _share(value, pairs))
    else:
        must = forced.sum((-1, -2)).double()
        must = must.sum(1, True) if budget.over_heads else must
        found = count_in_reach(ordered, _FORCED * must + (value - _ROUNDING) * weight)
    return found.view(weights.shape[:3])


def _by_recall(ordered: torch.Tensor, candidates: torch.Tensor, blocks: torch.Tensor, value: float) -> torch.Tensor:
    """Counts as of ``density``, of which heads with a good recall give half to those with the least."""
    heads, n = ordered.shape[1], ordered.shape[-1]
    count = _share(value, blocks).clamp(min=1, max=n)
    kept = ordered.cumsum(-1).gather(-1, (count - 1)[None, :, None, None].expand(*ordered.shape[:3], 1))[..., 0]
    recall = kept.sum(-1) / candidates.any(-1).sum(-1).clamp(min=1)  # [B, H]
    givers = (recall > _GOOD_RECALL).sum(1, keepdim=True).clamp(max=heads // 2)
    rank = recall.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    factor = torch.where(rank < givers, 0.5, torch.where(rank >= heads - givers, 1.5, 1.0))
    return _share(1.0, value * factor * blocks)[..., None]


def _share(share: float, blocks: torch.Tensor) -> torch.Tensor:
    """:func:`~diffsparse.selection.share_of` of numbers on a device."""
    return (share * blocks.double() - SHARE_ROUNDING).ceil().long()
