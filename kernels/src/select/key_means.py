"""The rule ``key_means``: the query of a block that a mean key suits best."""

from __future__ import annotations

import torch

from diffsparse.kernels.select.blocked import in_blocks, largest_products, take
from diffsparse.kernels.select.near import always_keep, near
from diffsparse.kernels.select.signals import block_means
from diffsparse.tokens import TokenLayout

__all__ = ["score_key_means"]


def score_key_means(
    q: torch.Tensor, k: torch.Tensor, tokens: TokenLayout, scale: float, *, beside: int = 0
) -> torch.Tensor:
    """The largest ``scale * q . mean(k)`` over the queries of a block.

    VMoBA (2506.23858) gates each query by the mean keys of blocks, and lets blocks be slabs of frames,
    columns through all frames and boxes from layer to layer: here that is the order of the head. A kernel works on
    blocks of queries, so a block is worth what it is to the query that needs it most. There a query's own block is
    always kept, as here with ``beside`` = 1. Other arguments as of :class:`~diffsparse.kernels.select.Signal`.
    """
    numbers, there = in_blocks(tokens)
    score = largest_products(take(q, numbers, there), there, block_means(k, tokens), scale)
    return always_keep(score, near(tokens, beside, 0))
