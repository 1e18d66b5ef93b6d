"""Summaries of key blocks, which a tail attends instead of the blocks it stands for."""

from __future__ import annotations

import torch

__all__ = ["summarize"]


def summarize(
    keys: torch.Tensor, values: torch.Tensor, length: torch.Tensor, *, moments: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Mean key, mean value and (for ``moments``) the population variance of the keys of each block.

    keys, values: fp32 ``[N, block_size, D]``, zero beyond a block's length. length: ``[N]``, real tokens of each block.
    Returns fp32 ``[N, D]`` each; an empty block has zeros.
    """
    count = length.clamp(min=1).to(keys.dtype)[:, None]
    mean_k = keys.sum(1) / count
    mean_v = values.sum(1) / count
    if not moments:
        return mean_k, mean_v, None
    # Two passes: the mean of squares less the square of the mean cancels where a block's keys are nearly equal.
    spread = keys - mean_k[:, None]
    inside = torch.arange(keys.shape[1], device=keys.device)[None, :] < length[:, None]
    spread.masked_fill_(~inside[..., None], 0.0)
    return mean_k, mean_v, spread.square_().sum(1) / count
