"""The rule ``self_similar``: means, where blocks are alike in themselves; what is not is kept."""

from __future__ import annotations

import torch

from diffsparse.kernels.select.available import no_blocks_kernel
from diffsparse.kernels.select.blocked import in_blocks, take
from diffsparse.kernels.select.near import always_keep
from diffsparse.kernels.select.pooled import score_pooled
from diffsparse.tokens import TokenLayout

__all__ = ["score_self_similar", "self_similarity"]


def self_similarity(x: torch.Tensor, tokens: TokenLayout) -> torch.Tensor:
    """The mean cosine between two rows of a block, itself included: fp32 ``[B, H, N]``; 1 of an empty block.

    That is the squared length of the mean of the rows at length 1.
    """
    if no_blocks_kernel(x) is None:
        from diffsparse.kernels.select.host import launch_parts

        empty = (tokens.lengths() == 0)[tokens.head_order.long()]  # [H, N]
        return launch_parts(x, tokens, unit=True)[0].square().sum((3, 4)).masked_fill(empty[None], 1.0)
    numbers, there = in_blocks(tokens)
    rows = take(x, numbers, there)
    length = torch.linalg.vector_norm(rows, dim=4, keepdim=True, dtype=torch.float32)
    inverse = length.clamp(min=torch.finfo(torch.float32).tiny).reciprocal().to(rows.dtype)
    mean = (rows * inverse).sum(3, dtype=torch.float32) / there.sum(2).clamp(min=1)[None, ..., None]
    return mean.square().sum(3).masked_fill(~there.any(2)[None], 1.0)


def score_self_similar(
    q: torch.Tensor, k: torch.Tensor, tokens: TokenLayout, scale: float, *, similarity: float = 0.6
) -> torch.Tensor:
    """As ``pooled``, but pairs of which a block's tokens are less alike than ``similarity`` are always kept.

    SpargeAttn (2502.18137, section 3.2): a mean stands for a block only where its tokens are alike, which is told by
    the mean cosine of two of them. Other arguments as of :class:`~diffsparse.kernels.select.Signal`.
    """
    odd = [self_similarity(x, tokens) < similarity for x in (q, k)]
    return always_keep(score_pooled(q, k, tokens, scale), odd[0][..., None] | odd[1][:, :, None])
