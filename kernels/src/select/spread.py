"""The rule ``spread``: how far a block's mean score stands out from those of the other blocks."""

from __future__ import annotations

import torch

from diffsparse.kernels.select.near import always_keep, near
from diffsparse.kernels.select.signals import block_means
from diffsparse.tokens import TokenLayout

__all__ = ["score_spread"]


def score_spread(
    q: torch.Tensor, k: torch.Tensor, tokens: TokenLayout, scale: float, *, beside: int = 0, first: int = 0
) -> torch.Tensor:
    """``mean(q) . (mean(k) - m)`` over ``sqrt(sum_c mean(q)_c^2 V_c)``: a score in standard deviations.

    ``m`` and ``V`` are mean and variance of the mean keys of all blocks of the video, channel by channel. Sol-Attn
    (2607.24027) computes a block exactly where this is above 1: ``Budget("score", 1.0)``. It is no logarithm of a
    weight, and ``scale`` cancels out. There blocks less than ``beside`` = 2 blocks from the diagonal and the ``first``
    block of keys are always kept. Other arguments as of :class:`~diffsparse.kernels.select.Signal`.
    """
    order = tokens.head_order.long()
    visual = torch.stack([tokens.visual_blocks(o) for o in range(tokens.block_start.shape[0])])[order]
    weight = visual[None, :, :, None].float()  # [1, H, N, 1]
    count = weight.sum(2, keepdim=True).clamp(min=1)
    query, key = block_means(q, tokens), block_means(k, tokens)
    centred = key - (key * weight).sum(2, keepdim=True) / count
    variance = (centred.square() * weight).sum(2) / count[:, :, 0]  # [B, H, D]
    spread = (query.square() * variance[:, :, None]).sum(3, keepdim=True).sqrt()  # [B, H, N, 1]
    score = query @ centred.transpose(2, 3) / spread.clamp(min=torch.finfo(torch.float32).tiny)
    return always_keep(score, near(tokens, beside, first))
