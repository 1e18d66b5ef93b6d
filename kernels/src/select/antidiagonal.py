"""The rule ``antidiagonal``: sums along the antidiagonals of small tiles."""

from __future__ import annotations

import torch

from diffsparse.kernels.select.blocked import block_mass, in_blocks, take
from diffsparse.tokens import TokenLayout

__all__ = ["score_antidiagonal"]


def score_antidiagonal(
    q: torch.Tensor, k: torch.Tensor, tokens: TokenLayout, scale: float, *, stride: int = 8
) -> torch.Tensor:
    """Attention between groups of ``stride`` tokens, by the antidiagonals of their tiles.

    XAttention (2503.16428): the logit of two groups is ``scale / stride`` times the sum of the products of
    query ``stride - 1 - t`` and key ``t`` of them; its softmax over all groups of keys is summed over the groups of two
    blocks. The score is the logarithm of that. Groups begin anew in each block; tokens that a short block lacks count
    as zeros, and groups without a token take no part. Other arguments as of
    :class:`~diffsparse.kernels.select.Signal`.
    """
    numbers, there = in_blocks(tokens)
    spare = -tokens.block_size % stride
    numbers, there = (torch.nn.functional.pad(x, (0, spare)) for x in (numbers, there))
    numbers, there = (x.unflatten(2, (-1, stride)) for x in (numbers, there))  # [H, N, groups, stride]
    queries = take(q, numbers, there).flip(4).flatten(4)
    keys = take(k, numbers, there).flatten(4)
    group = there.any(-1)  # [H, N, groups]
    mass = block_mass(queries.flatten(2, 3), keys, group, scale / stride)
    mass = mass.unflatten(2, group.shape[1:]).masked_fill(~group[None, ..., None], 0.0)
    return mass.sum(3).log()
