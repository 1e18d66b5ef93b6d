"""The rule ``pooled``: blocks whose mean query and mean key have the largest product."""

from __future__ import annotations

import torch

from diffsparse.kernels.select.signals import block_means
from diffsparse.tokens import TokenLayout

__all__ = ["block_means", "score_pooled"]


def score_pooled(q: torch.Tensor, k: torch.Tensor, tokens: TokenLayout, scale: float) -> torch.Tensor:
    """``scale * mean(q) . mean(k)`` of every pair of blocks: fp32 ``[B, H, N, N]``.

    The estimate of SpargeAttn (2502.18137, section 3.2), DraftAttention (2505.14708) and many others. Arguments as of
    :class:`~diffsparse.kernels.select.Signal`.
    """
    return scale * block_means(q, tokens) @ block_means(k, tokens).transpose(2, 3)
