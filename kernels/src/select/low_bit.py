"""The rule ``low_bit``: products of queries and keys in four bits, against what the nearest blocks weigh."""

from __future__ import annotations

import torch

from diffsparse.kernels.select.blocked import in_blocks, largest_products, sampled, take
from diffsparse.kernels.select.near import always_keep, near
from diffsparse.tokens import TokenLayout

__all__ = ["four_bits", "score_low_bit"]

_LEVELS = 7  # of four bits with a sign, zero in the middle


def four_bits(x: torch.Tensor) -> torch.Tensor:
    """Rows ``[..., D]`` rounded to 15 levels, from minus the largest of each row to plus it: fp32.

    Which level is nearest is told in fp32: quotients of 16 bits would round twice.
    """
    x = x.float()
    step = (x.abs().amax(-1, keepdim=True) / _LEVELS).clamp(min=torch.finfo(x.dtype).tiny)
    return (x / step).round() * step


def score_low_bit(
    q: torch.Tensor, k: torch.Tensor, tokens: TokenLayout, scale: float, *, samples: int = 16
) -> torch.Tensor:
    """The largest weight of a key of a block, over the weight that its query gives the first and its own block.

    SALE (2505.24179): logits of queries and keys in four bits; a key counts by ``exp(logit)`` over the sum of that over
    the keys of the first block and of the query's own, which are always kept; a block counts by its best key and
    query. The score is the logarithm of that. There all queries and keys are taken, in blocks of 64 and 32, and a
    threshold is calibrated for each head; here ``samples`` of each block, evenly spaced, against all keys of the two
    blocks. Other arguments as of :class:`~diffsparse.kernels.select.Signal`.
    """
    numbers, there = in_blocks(tokens)
    chosen, real = sampled(tokens, samples)
    parts = take(q, chosen, real), take(k, numbers, there), take(k, chosen, real)
    # In the precision of the call first, so that a CPU, which multiplies in fp32, has the numbers that a GPU has.
    queries, keys, few = (four_bits(x).to(q.dtype).to(x.dtype) for x in parts)
    begin = tokens.text_blocks[0]
    block = torch.arange(tokens.num_blocks, device=q.device)
    own = (queries @ keys.transpose(3, 4)).float().mul_(scale).masked_fill(~there[None, :, :, None], -torch.inf)
    sink = (queries @ keys[:, :, begin, None].transpose(3, 4)).float().mul_(scale)
    twice = (~there[:, begin, None, None] | (block == begin)[:, None, None])[None]
    known = torch.cat([own, sink.masked_fill(twice, -torch.inf)], dim=4).logsumexp(4)  # [B, H, N, samples]
    best = largest_products(few, real, queries.flatten(2, 3), scale).transpose(2, 3).unflatten(2, real.shape[1:])
    relative = (best - known[..., None]).masked_fill(~real[None, ..., None], -torch.inf).amax(3)
    return always_keep(relative, near(tokens, 1, 1))
