"""What is kept of scored blocks: one function for every kind of :class:`~diffsparse.selection.Budget`."""

from __future__ import annotations

import torch

from diffsparse.selection import SHARE_ROUNDING, Budget

__all__ = ["keep", "row_weights"]

# Weights are summed in fp32: a sum may fall short of the whole by as much, which must not cost another block.
_ROUNDING = 1e-6
_LARGEST = torch.finfo(torch.float32).max


def row_weights(scores: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Weights of a row's candidates, the softmax of their finite scores, which sum to 1; 0 of all others."""
    return scores.masked_fill(~candidates, -torch.inf).softmax(dim=-1).nan_to_num_(0.0)


def keep(scores: torch.Tensor, candidates: torch.Tensor, blocks: torch.Tensor, budget: Budget) -> torch.Tensor:
    """The pairs of blocks that a budget keeps: bool ``[B, H, N, N]``. Reads nothing back from the device.

    scores: fp32 ``[B, H, N, N]``, natural logarithms of weights; NaN counts as -inf. candidates: bool, of a shape that
    expands to that: the pairs that may be kept. blocks: int64 ``[H]``, of how many key blocks a share is taken.
    Of equal scores the block that comes first is kept.
    """
    scores = scores.nan_to_num(nan=-_LARGEST, posinf=_LARGEST, neginf=-_LARGEST)
    candidates = candidates.expand_as(scores)
    best = scores.masked_fill(~candidates, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    wanted = _wanted(scores, candidates, best, blocks, budget)
    low, high = (_share(share, blocks).clamp(min=1)[:, None] for share in (budget.least, budget.most))  # [H, 1]
    wanted = wanted.maximum(low).minimum(high).minimum(candidates.sum(-1))
    place = torch.arange(scores.shape[-1], device=scores.device)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, place < wanted[..., None])


def _wanted(
    scores: torch.Tensor, candidates: torch.Tensor, best: torch.Tensor, blocks: torch.Tensor, budget: Budget
) -> torch.Tensor:
    """How many of its best blocks each row keeps by the kind of the budget: int64, expands to ``[B, H, N]``."""
    kind, value = budget.kind, budget.value
    if kind == "top_k":
        return torch.full_like(blocks, int(value))[:, None]
    if kind == "density":
        return _share(value, blocks)[:, None]
    if kind == "score":
        return ((scores >= value) & candidates).sum(-1)
    weights = row_weights(scores, candidates)
    if kind == "weight":
        return ((weights >= value) & candidates).sum(-1)
    if kind == "top_p":
        ordered = weights.gather(-1, best)
        return (_sums_before(ordered) < value - _ROUNDING).sum(-1)
    # Of a head: pairs of all its rows by their weights.
    ordered, pairs = weights.masked_fill(~candidates, -1.0).flatten(2).sort(dim=-1, descending=True, stable=True)
    if kind == "quantile":
        rows = candidates.any(-1).sum(-1, keepdim=True)  # [B, H, 1]
        first = torch.arange(pairs.shape[-1], device=pairs.device) < _share(value, rows * blocks[:, None])
    else:
        ordered = ordered.clamp(min=0.0).double()
        first = _sums_before(ordered) < (value - _ROUNDING) * ordered.sum(-1, keepdim=True)
    return (torch.zeros_like(first).scatter_(-1, pairs, first).view_as(candidates) & candidates).sum(-1)


def _sums_before(ordered: torch.Tensor) -> torch.Tensor:
    """The sum of what stands before each value."""
    return ordered.cumsum(-1) - ordered


def _share(share: float, blocks: torch.Tensor) -> torch.Tensor:
    """:func:`~diffsparse.selection.share_of` of numbers on a device."""
    return (share * blocks.double() - SHARE_ROUNDING).ceil().long()
