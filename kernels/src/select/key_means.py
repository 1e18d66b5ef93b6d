"""The rule ``key_means``: the query of a block that a mean key suits best."""

from __future__ import annotations

import torch

from diffsparse.kernels.select.blocked import in_blocks, take
from diffsparse.kernels.select.signals import block_means
from diffsparse.tokens import TokenLayout

__all__ = ["score_key_means"]


def score_key_means(q: torch.Tensor, k: torch.Tensor, tokens: TokenLayout, scale: float) -> torch.Tensor:
    """The largest ``scale * q . mean(k)`` over the queries of a block.

    VMoBA (2506.23858) gates each query by the mean keys of blocks, and lets blocks be slabs of frames,
    columns through all frames and boxes from layer to layer: here that is the order of the head. A kernel works on
    blocks of queries, so a block is worth what it is to the query that needs it most. Arguments as of
    :class:`~diffsparse.kernels.select.Signal`.
    """
    numbers, there = in_blocks(tokens)
    means = scale * block_means(k, tokens).transpose(2, 3)  # [B, H, D, N]
    queries = take(q, numbers, there)
    best = torch.full((), -torch.inf, device=q.device)
    for place in range(tokens.block_size):
        logits = (queries[:, :, :, place] @ means).masked_fill(~there[None, :, :, place, None], -torch.inf)
        best = torch.maximum(best, logits)
    return best
