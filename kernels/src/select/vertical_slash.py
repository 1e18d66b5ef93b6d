"""The rule ``vertical_slash``: columns and diagonals that some queries of the whole call attend."""

from __future__ import annotations

import torch

from diffsparse.kernels.select.blocked import block_mass, in_blocks, spread_rows, take
from diffsparse.tokens import TokenLayout

__all__ = ["score_vertical_slash"]


def score_vertical_slash(
    q: torch.Tensor, k: torch.Tensor, tokens: TokenLayout, scale: float, *, rows: int = 64
) -> torch.Tensor:
    """The logarithm of a block's share as a column and as a part of a diagonal, over ``rows`` queries.

    MInference (2407.02490) by blocks: the attention of a few queries to block ``j`` is summed up by ``j``
    (vertical lines), and by the distance of ``j`` from the query's own block (slashes); a pair of blocks gets the mean
    of its column and the mean of its diagonal. There the last queries are taken, and attention is causal; here they are
    evenly spaced over the head's order, as no query of a video sees more than others. Other arguments as of
    :class:`~diffsparse.kernels.select.Signal`.
    """
    numbers, there = in_blocks(tokens)
    n = tokens.num_blocks
    chosen, own = spread_rows(tokens, rows)  # [H, R]
    mass = block_mass(take(q, chosen, torch.ones_like(chosen, dtype=torch.bool)), take(k, numbers, there), there, scale)
    batch, heads = mass.shape[:2]
    key = torch.arange(n, device=q.device)
    column = mass.mean(2)  # [B, H, N]
    # Diagonals are told by j - i + N - 1; how many of the queries have a block there differs.
    which = (key - own[..., None] + n - 1).flatten(1)  # [H, R * N]
    total = torch.zeros(batch, heads, 2 * n - 1, device=q.device)
    total = total.scatter_add(2, which[None].expand(batch, -1, -1), mass.flatten(2))
    real = (
        there.any(2)[:, None].expand(heads, own.shape[1], -1).flatten(1)
    )  # blocks that an order lacks are on no diagonal
    seen = torch.zeros_like(total[0]).scatter_add(1, which, real.to(total.dtype))
    slash = total / seen.clamp(min=1)
    diagonal = (key[None, :] - key[:, None] + n - 1).flatten()
    return (column[:, :, None, :] + slash[..., diagonal].unflatten(2, (n, n))).log()
