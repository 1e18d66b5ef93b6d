"""Summaries of key blocks, which a tail attends instead of the blocks it stands for."""

from __future__ import annotations

import torch

__all__ = ["AXIS_STEPS", "half_lengths", "in_first_half", "summarize", "summarize_halves"]

#: Power iterations towards a block's principal axis. A rough axis cuts nearly as well as the exact one.
AXIS_STEPS = 3


def _centred(keys: torch.Tensor, length: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean key ``[N, D]`` of each block, and the keys less it, zero beyond a block's length."""
    mean = keys.sum(1) / length.clamp(min=1).to(keys.dtype)[:, None]
    inside = torch.arange(keys.shape[1], device=keys.device)[None, :] < length[:, None]
    return mean, (keys - mean[:, None]).masked_fill_(~inside[..., None], 0.0)


def summarize(
    keys: torch.Tensor, values: torch.Tensor, length: torch.Tensor, *, moments: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Mean key, mean value and (for ``moments``) the population variance of the keys of each block.

    keys, values: fp32 ``[N, block_size, D]``, zero beyond a block's length. length: ``[N]``, real tokens of each block.
    Returns fp32 ``[N, D]`` each; an empty block has zeros.
    """
    count = length.clamp(min=1).to(keys.dtype)[:, None]
    mean_v = values.sum(1) / count
    if not moments:
        return keys.sum(1) / count, mean_v, None
    # Two passes: the mean of squares less the square of the mean cancels where a block's keys are nearly equal.
    mean_k, spread = _centred(keys, length)
    return mean_k, mean_v, spread.square_().sum(1) / count


def half_lengths(length: torch.Tensor) -> torch.Tensor:
    """Tokens in the two halves of blocks of ``length`` tokens: ``[2, N]``; the first has the smaller number."""
    first = length // 2
    return torch.stack([first, length - first])


def in_first_half(keys: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """Which tokens make the first half of their block: bool ``[N, block_size]``. Arguments as in :func:`summarize`.

    Tokens are ranked along the block's principal axis, ties by their place; the first ``length // 2`` are the first
    half. The axis comes from power iteration, begun at the key farthest from the mean.
    """
    _, spread = _centred(keys, length)
    far = spread.square().sum(2).argmax(1)
    axis = spread[torch.arange(len(spread), device=spread.device), far]
    for _ in range(AXIS_STEPS):
        axis = axis / axis.norm(dim=1, keepdim=True).clamp(min=1e-30)
        axis = torch.einsum("nbd,nb->nd", spread, torch.einsum("nbd,nd->nb", spread, axis))
    along = torch.einsum("nbd,nd->nb", spread, axis)
    along = torch.where(torch.arange(keys.shape[1], device=keys.device) < length[:, None], along, float("inf"))
    rank = along.argsort(dim=1, stable=True).argsort(1)
    return rank < (length // 2)[:, None]


def summarize_halves(
    keys: torch.Tensor, values: torch.Tensor, length: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean keys and values of the first halves of all blocks, then of the second ones: ``[2, N, D]`` each.

    Arguments as in :func:`summarize`; an empty half has zeros.
    """
    first = in_first_half(keys, length).to(keys.dtype)
    counts = half_lengths(length).clamp(min=1).to(keys.dtype)[..., None]
    means = []
    for x in (keys, values):
        sums = torch.einsum("nb,nbd->nd", first, x)
        means.append(torch.stack([sums, x.sum(1) - sums]) / counts)
    return means[0], means[1]
