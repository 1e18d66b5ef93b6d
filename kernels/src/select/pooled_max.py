"""The rule ``pooled_max``: what the mean query could have in common with the best key of a block."""

from __future__ import annotations

import torch

from diffsparse.kernels.select.available import no_blocks_kernel
from diffsparse.kernels.select.blocked import in_blocks, take
from diffsparse.kernels.select.signals import block_means
from diffsparse.tokens import TokenLayout

__all__ = ["block_bounds", "score_pooled_max"]


def score_pooled_max(q: torch.Tensor, k: torch.Tensor, tokens: TokenLayout, scale: float) -> torch.Tensor:
    """The most that ``scale * mean(q) . x`` can be for an ``x`` between a block's least and largest keys.

    Least and largest are taken channel by channel, so no key of the block has a larger product. The bound of Quest
    (2406.10774), there for one query. Arguments as of :class:`~diffsparse.kernels.select.Signal`.
    """
    mean = scale * block_means(q, tokens)
    least, largest = block_bounds(k, tokens)
    return mean.clamp(min=0) @ largest.transpose(2, 3) + mean.clamp(max=0) @ least.transpose(2, 3)


def block_bounds(x: torch.Tensor, tokens: TokenLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest numbers of every block, channel by channel: fp32 ``[B, H, N, D]`` each.

    ``x``: ``[B, S, H, D]`` in the model's token order. Empty blocks have zeros.
    """
    if no_blocks_kernel(x) is None:
        from diffsparse.kernels.select.host import launch_parts

        return launch_parts(x, tokens, bounds=True)[1:]
    numbers, there = in_blocks(tokens)
    rows = take(x, numbers, there)
    outside = ~there[None, ..., None]
    empty = ~there.any(2)[None, ..., None]
    least = rows.masked_fill(outside, torch.inf).amin(3).float().masked_fill_(empty, 0.0)
    largest = rows.masked_fill_(outside, -torch.inf).amax(3).float().masked_fill_(empty, 0.0)
    return least, largest
