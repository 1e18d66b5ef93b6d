"""The rule ``switch``: means for heads that means describe, vertical lines and slashes for the others."""

from __future__ import annotations

import torch

from diffsparse.kernels.select.blocked import block_mass, in_blocks, sampled, take
from diffsparse.kernels.select.pooled import score_pooled
from diffsparse.kernels.select.signals import block_means
from diffsparse.kernels.select.vertical_slash import score_vertical_slash
from diffsparse.tokens import TokenLayout

__all__ = ["divergence", "score_switch"]


def divergence(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The square root of the Jensen-Shannon divergence, in nats, of distributions over the last axis."""
    middle = (a + b) / 2
    parts = [torch.xlogy(x, x / middle.clamp(min=torch.finfo(middle.dtype).tiny)).sum(-1) for x in (a, b)]
    return (sum(parts) / 2).clamp(min=0.0).sqrt()  # type: ignore[union-attr]


def score_switch(
    q: torch.Tensor,
    k: torch.Tensor,
    tokens: TokenLayout,
    scale: float,
    *,
    tau: float = 0.1,
    blocks: int = 4,
    rows: int = 64,
) -> torch.Tensor:
    """As ``pooled`` for heads whose means tell how their blocks are attended, as ``vertical_slash`` for the others.

    FlexPrefill (2502.20766): the attention of one block of queries to the blocks of keys is computed exactly, and from
    the means; where the two differ by less than ``tau``, by the square root of the Jensen-Shannon divergence, means are
    trusted. There it is the last block, as attention is causal; here ``blocks`` blocks, evenly spaced, of which
    ``rows`` queries in all are asked, and the mean of their differences counts. Both scores are computed for all heads,
    as the choice is made on the device. Other arguments as of :class:`~diffsparse.kernels.select.Signal`.
    """
    numbers, there = in_blocks(tokens)
    visual = torch.stack([tokens.visual_blocks(o) for o in range(tokens.block_start.shape[0])])
    count = visual.sum(1)[tokens.head_order.long()]  # [H]
    part = torch.arange(blocks, device=q.device)
    tested = tokens.text_blocks[0] + ((2 * part + 1) * count[:, None]).div(2 * blocks, rounding_mode="floor")  # [H, T]
    chosen, real = (x.expand(len(tested), *x.shape[1:]) for x in sampled(tokens, max(1, rows // blocks)))
    chosen, real = (x.gather(1, tested[..., None].expand(-1, -1, x.shape[2])) for x in (chosen, real))
    queries = take(q, chosen, real)  # [B, H, T, r, D]
    number = real.sum(2).clamp(min=1)[None, ..., None]
    mass = block_mass(queries.flatten(2, 3), take(k, numbers, there), there, scale).unflatten(2, real.shape[1:])
    exact = mass.masked_fill(~real[None, ..., None], 0.0).sum(3) / number  # [B, H, T, N]
    means = queries.sum(3, dtype=torch.float32) / number
    logits = scale * means @ block_means(k, tokens).transpose(2, 3)
    guess = logits.masked_fill(~there.any(2)[None, :, None], -torch.inf).softmax(3)
    trusted = divergence(exact, guess).mean(2) < tau  # [B, H]
    pooled, lines = score_pooled(q, k, tokens, scale), score_vertical_slash(q, k, tokens, scale, rows=rows)
    return torch.where(trusted[..., None, None], pooled, lines)
