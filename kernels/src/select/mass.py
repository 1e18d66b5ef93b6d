"""The rules ``mass`` and ``sampled_max``: exact attention weights of some queries of each block."""

from __future__ import annotations

import torch

from diffsparse.kernels.select.blocked import block_mass, in_blocks, sampled, take
from diffsparse.tokens import TokenLayout

__all__ = ["score_mass", "score_sampled_max"]


def score_mass(q: torch.Tensor, k: torch.Tensor, tokens: TokenLayout, scale: float, *, rows: int = 4) -> torch.Tensor:
    """The logarithm of the attention that ``rows`` queries of a block pay to a block of keys.

    Their logits with all keys go through one softmax, as exact attention does. With as many rows as a block has tokens
    it is the exact mass by blocks: AdaSpa (2502.21079) and SparseD (2509.24014). Fewer,
    evenly spaced in the block, cost as much less. Other arguments as of :class:`~diffsparse.kernels.select.Signal`.
    """
    numbers, there = in_blocks(tokens)
    chosen, real = sampled(tokens, rows)
    queries = take(q, chosen, real)
    mass = block_mass(queries.flatten(2, 3), take(k, numbers, there), there, scale)
    return mass.unflatten(2, real.shape[1:]).masked_fill(~real[None, ..., None], 0.0).sum(3).log()


def score_sampled_max(
    q: torch.Tensor, k: torch.Tensor, tokens: TokenLayout, scale: float, *, samples: int = 16, relative: int = 0
) -> torch.Tensor:
    """The logarithm of the largest weight between ``samples`` queries and ``samples`` keys of two blocks.

    The softmax is over the sampled keys of all blocks: Pyramid Sparse Attention (2512.04025) with a quarter of a
    block's tokens, Video-BLADE (2508.10774) with 16 or 32. They are evenly spaced here, at random there. ``relative``:
    where it is 1, a weight counts against the largest that its query has, as kernels that skip by a running maximum
    see it (LiteAttention, 2511.11062). Other arguments as of :class:`~diffsparse.kernels.select.Signal`.
    """
    chosen, there = sampled(tokens, samples)
    queries, keys = take(q, chosen, there), take(k, chosen, there)
    mass = block_mass(queries.flatten(2, 3), keys, there, scale, "max")
    if relative:
        mass = mass / mass.amax(3, keepdim=True)
    return mass.unflatten(2, there.shape[1:]).masked_fill(~there[None, ..., None], 0.0).amax(3).log()
