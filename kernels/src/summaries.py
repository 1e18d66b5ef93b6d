"""Summaries of key blocks, which a tail attends instead of the blocks it stands for."""

from __future__ import annotations

import torch

__all__ = ["AXIS_STEPS", "half_lengths", "in_first_half", "summarize", "summarize_halves"]

#: Power iterations towards a block's principal axis. A rough axis cuts nearly as well as the exact one.
AXIS_STEPS = 3


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
    mean_k = keys.sum(1) / count
    inside = torch.arange(keys.shape[1], device=keys.device)[None, :] < length[:, None]
    spread = (keys - mean_k[:, None]).masked_fill_(~inside[..., None], 0.0)
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
    number, block, _ = keys.shape
    outside = torch.arange(block, device=keys.device)[None, :] >= length[:, None]
    centred = keys - (keys.sum(1) / length.clamp(min=1).to(keys.dtype)[:, None])[:, None]
    # The axis is only needed as what each key has along it, so the iteration runs on products between keys: one matrix
    # product, where the axis itself takes two passes over all keys in every step.
    gram = torch.bmm(centred, centred.transpose(1, 2))
    far = gram.diagonal(dim1=1, dim2=2).masked_fill(outside, -1.0).argmax(1)
    along = gram[torch.arange(number, device=keys.device), far].masked_fill_(outside, 0.0)
    for _ in range(AXIS_STEPS):
        along = along / along.norm(dim=1, keepdim=True).clamp(min=1e-30)
        along = torch.bmm(along[:, None], gram)[:, 0].masked_fill_(outside, 0.0)
    ranked = along.masked_fill_(outside, float("inf")).argsort(dim=1, stable=True)
    low = torch.arange(block, device=keys.device)[None, :] < (length // 2)[:, None]
    return torch.zeros_like(outside).scatter_(1, ranked, low)


def summarize_halves(
    keys: torch.Tensor, values: torch.Tensor, length: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean keys and values of the first halves of all blocks, then of the second ones: ``[2, N, D]`` each.

    Arguments as in :func:`summarize`; an empty half has zeros.
    """
    first = in_first_half(keys, length).to(keys.dtype)[:, None]
    counts = half_lengths(length).clamp(min=1).to(keys.dtype)[..., None]
    means = []
    for x in (keys, values):
        sums = torch.bmm(first, x)[:, 0]
        means.append(torch.stack([sums, x.sum(1) - sums]) / counts)
    return means[0], means[1]
