"""The rule ``anchor``: how far the best key of a block falls behind the best of the first and the own block."""

from __future__ import annotations

import torch

from diffsparse.kernels.select.blocked import in_blocks, largest_products, take
from diffsparse.kernels.select.near import always_keep, near
from diffsparse.kernels.select.signals import block_means
from diffsparse.tokens import TokenLayout

__all__ = ["score_anchor"]


def score_anchor(q: torch.Tensor, k: torch.Tensor, tokens: TokenLayout, scale: float) -> torch.Tensor:
    """The largest ``scale * mean(q) . k`` of a block, less the block's anchor.

    AnchorAttention (2505.23520): the anchor of a query is its largest logit in the first block of keys and in its own,
    which are always kept; that of a block of queries is their mean. Other keys are kept where the logit of the mean
    query falls behind by no more than a threshold: ``Budget("score", -12)``. There single columns of keys are kept;
    here blocks are, by their best key. Arguments as of :class:`~diffsparse.kernels.select.Signal`.
    """
    numbers, there = in_blocks(tokens)
    keys = take(k, numbers, there)
    best = largest_products(keys, there, block_means(q, tokens), scale).transpose(2, 3)
    queries = (scale * take(q, numbers, there).float()).to(keys.dtype)
    begin = tokens.text_blocks[0]
    inside = there[None, :, :, None]  # [1, H, N, 1, W]
    own = (queries @ keys.transpose(3, 4)).masked_fill_(~inside, -torch.inf).amax(4)
    sink = (queries @ keys[:, :, begin, None].transpose(3, 4)).masked_fill_(~inside[:, :, begin, None], -torch.inf)
    highest = torch.maximum(own, sink.amax(4)).float().masked_fill_(~there[None], 0.0)  # [B, H, N, W]
    anchor = highest.sum(3) / there.sum(2).clamp(min=1)
    return always_keep(best - anchor[..., None], near(tokens, 1, 1))
