"""The rule ``proxy``: heads side by side are scored together, and each keeps as much as it needs."""

from __future__ import annotations

from dataclasses import replace

import torch

from diffsparse.kernels.select.mass import score_sampled_max
from diffsparse.kernels.select.pooled import score_pooled
from diffsparse.tokens import TokenLayout

__all__ = ["score_proxy"]


def score_proxy(
    q: torch.Tensor, k: torch.Tensor, tokens: TokenLayout, scale: float, *, together: int = 4, samples: int = 16
) -> torch.Tensor:
    """Scores that rank blocks as a proxy of ``together`` heads does, and fall off as the head's own.

    ProxyAttn (2509.24745): the mean queries and keys of a group of heads, token by token, make a proxy, whose blocks
    are scored by the largest sampled weight (``samples`` of each block); the order of the blocks is the same for
    all heads of the group, but each has a budget of its own, after how its own weights fall off. Here a head's own
    weights are those of its mean queries and keys: the best of them is given to the proxy's best block, and so on. The
    last group may have fewer heads. Other arguments as of :class:`~diffsparse.kernels.select.Signal`.
    """
    heads = q.shape[2]
    group = torch.arange(heads, device=q.device).div(together, rounding_mode="floor")
    queries, keys = (
        torch.stack([part.mean(2, dtype=torch.float32) for part in x.split(together, dim=2)], dim=2).to(x.dtype)
        for x in (q, k)
    )
    if len(tokens.gather) == 1:
        leaders = replace(tokens, head_order=tokens.head_order[::together])
        ranked = score_sampled_max(queries, keys, leaders, scale, samples=samples).index_select(1, group)
    else:  # a head's blocks are those of its own order
        queries, keys = (x.index_select(2, group) for x in (queries, keys))
        ranked = score_sampled_max(queries, keys, tokens, scale, samples=samples)
    visual = torch.stack([tokens.visual_blocks(o) for o in range(tokens.block_start.shape[0])])
    other = ~visual[tokens.head_order.long()][None, :, None]  # text is not ranked
    own = score_pooled(q, k, tokens, scale).masked_fill(other, -torch.inf).sort(dim=3, descending=True).values
    places = ranked.masked_fill(other, -torch.inf).argsort(dim=3, descending=True, stable=True)
    return torch.empty_like(own).scatter_(3, places, own)
