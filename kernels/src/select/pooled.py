"""The rule ``pooled``: blocks whose mean query and mean key have the largest product."""

from __future__ import annotations

import torch

from diffsparse.blocks import BlockIndex
from diffsparse.tokens import TokenLayout

__all__ = ["block_means", "select_pooled"]


def block_means(x: torch.Tensor, tokens: TokenLayout) -> torch.Tensor:
    """Mean row of every block, fp32 ``[B, H, N, D]``, of ``x`` ``[B, S, H, D]`` in the model's token order.

    Empty blocks have zeros.
    """
    batch, seq, heads, dim = x.shape
    n = tokens.num_blocks
    # Which block of its order each token is in, [O, S].
    position = torch.arange(seq, dtype=torch.int32, device=x.device)
    block = torch.stack(
        [torch.searchsorted(start[1:-1].contiguous(), position, right=True) for start in tokens.block_start]
    )
    block = block.gather(1, tokens.scatter.long())
    order = tokens.head_order.long()
    index = block[order].T[None, :, :, None].expand(batch, seq, heads, dim)
    total = torch.zeros(batch, n, heads, dim, dtype=torch.float32, device=x.device).scatter_add_(1, index, x.float())
    length = tokens.lengths().clamp(min=1)[order].float()  # [H, N]
    return total.transpose(1, 2) / length[None, :, :, None]


def select_pooled(q: torch.Tensor, k: torch.Tensor, tokens: TokenLayout, budget: float) -> BlockIndex:
    """Keep the ``ceil(budget * blocks)`` key blocks of the video with the largest ``mean(q) . mean(k)``, row by row.

    The estimate of SpargeAttn (2502.18137, section 3.2) and of many others, with a fixed share in place of a threshold.
    Arguments as of :class:`~diffsparse.kernels.select.Selector`; every item of the batch gets lists of its own.
    """
    n = tokens.num_blocks
    order = tokens.head_order.long()
    visual = torch.stack([tokens.visual_blocks(o) for o in range(tokens.block_start.shape[0])])[order]  # [H, N]
    score = block_means(q, tokens) @ block_means(k, tokens).transpose(2, 3)  # [B, H, N, N]
    score = score.masked_fill(~visual[None, :, None, :], float("-inf"))
    # Orders cut a ragged grid into different numbers of blocks, so that heads may keep different numbers.
    most = (budget * visual.sum(1)).ceil().long()  # [H]
    place = torch.arange(n, device=q.device)
    best = score.argsort(dim=3, descending=True, stable=True)
    first = (place < most[:, None])[None, :, None, :].expand_as(score)
    mask = torch.zeros_like(score, dtype=torch.bool).scatter_(3, best, first)
    return BlockIndex.from_mask(mask, tokens)
