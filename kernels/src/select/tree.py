"""The rule ``tree``: from coarse to fine, only what is below the best nodes is looked at."""

from __future__ import annotations

import math

import torch

from diffsparse.kernels.select.blocked import in_blocks, largest_products, sampled, take
from diffsparse.kernels.select.budgets import keep
from diffsparse.selection import Budget
from diffsparse.tokens import TokenLayout

__all__ = ["score_tree"]

# What was left out at a level comes behind all that went on; logits are far smaller.
_BEHIND = 1e5


def score_tree(
    q: torch.Tensor, k: torch.Tensor, tokens: TokenLayout, scale: float, *, share: float = 0.125, samples: int = 4
) -> torch.Tensor:
    """The largest logit of a block's queries with one key of the other block, for blocks that a tree search reaches.

    HiP (2406.09827): keys are cut into nodes, as many as are kept twice over; a node counts by the key in its
    middle; of the best, as many as are kept, the halves are looked at next, down to single blocks. ``share`` of the
    video's blocks go on at each level, so the budget should be ``Budget("density", share)``; a larger one takes those
    that were left out last. ``samples`` queries of each block are asked. There all levels have their own kernel, which
    saves the time; here the sizes are few, and each level is one product. Other arguments as of
    :class:`~diffsparse.kernels.select.Signal`.
    """
    numbers, there = in_blocks(tokens)
    chosen, real = sampled(tokens, samples)
    queries = take(q, chosen, real)
    n, begin = tokens.num_blocks, tokens.text_blocks[0]
    block = torch.arange(n, device=q.device)
    visual = torch.stack([tokens.visual_blocks(o) for o in range(tokens.block_start.shape[0])])
    visual = visual[tokens.head_order.long()]  # [H, N]
    count = visual.sum(1)
    last = (begin + count - 1)[:, None]  # [H, 1]
    score = alive = None
    for level in range(max(0, math.floor(math.log2(0.5 / share))), -1, -1):
        first = (begin + ((block - begin) >> level << level)).clamp(min=0)  # of the node that each block is in
        middle = (first + (1 << level >> 1)).clamp(max=n - 1).expand_as(visual).minimum(last)
        width = there.sum(2).expand_as(visual).gather(1, middle)
        place = numbers.expand(len(visual), -1, -1).gather(1, middle[..., None].expand(-1, -1, numbers.shape[2]))
        token = place.gather(2, (width // 2)[..., None])[..., 0]  # [H, N]
        keys = take(k, token, torch.ones_like(token, dtype=torch.bool))
        found = largest_products(queries, real, keys, scale)  # [B, H, N, N]
        if score is None or alive is None:
            score = found
            alive = torch.ones_like(found, dtype=torch.bool)
        else:
            score = torch.where(alive, found, score - _BEHIND)
        if level:
            # One block stands for each node.
            head = (block == first) & visual[:, None]
            best = keep(found, alive & head, count, Budget("density", share))
            alive = best.gather(3, first.expand_as(found))
    assert score is not None
    return score
