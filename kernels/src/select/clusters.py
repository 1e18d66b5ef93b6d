"""The rule ``clusters``: blocks by the clusters of queries and keys that their tokens are in."""

from __future__ import annotations

import torch

from diffsparse.kernels.select.blocked import in_blocks, take
from diffsparse.tokens import TokenLayout

__all__ = ["k_means", "score_clusters"]


def k_means(
    rows: torch.Tensor, there: torch.Tensor, start: torch.Tensor, rounds: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lloyd's algorithm: each row's cluster, one-hot in the precision of the rows, ``[B, H, P, C]``; and the centres.

    rows: ``[B, H, P, D]``. there: bool ``[H or 1, P]``; rows that are not there are in no cluster. start: the first
    centres, fp32 ``[B, H, C, D]``; after as many ``rounds`` they come back, each the mean of its rows, and a centre
    that no row is nearest to where it was. Of two centres as near as each other the first has the row.
    """
    centres = start
    inside = there[None, ..., None].to(rows.dtype)

    def assigned() -> torch.Tensor:
        near = (rows @ centres.to(rows.dtype).transpose(2, 3)).float() - centres.square().sum(3)[:, :, None] / 2
        number = near.argmax(3)
        return torch.zeros_like(near, dtype=rows.dtype).scatter_(3, number[..., None], 1.0) * inside

    for _ in range(rounds):
        which = assigned()
        count = which.sum(2, dtype=torch.float32)[..., None]
        centres = torch.where(count > 0, (which.transpose(2, 3) @ rows).float() / count.clamp(min=1), centres)
    return assigned(), centres


def score_clusters(
    q: torch.Tensor,
    k: torch.Tensor,
    tokens: TokenLayout,
    scale: float,
    *,
    queries: int = 32,
    keys: int = 64,
    rounds: int = 2,
) -> torch.Tensor:
    """The logarithm of the attention that a block's queries pay to a block of keys, each token taken for its centre.

    Sparse VideoGen 2 (2505.18875), SVG-EAR (2603.08982) and SVOO (2603.18636) cluster queries and keys, score clusters
    by their centres and sizes, and attend clusters, whose tokens they put side by side. Here clusters only tell what
    blocks are worth: tokens stay in the entry's order. Clusters are found anew in each call, from tokens evenly spaced
    over the video, in ``rounds`` rounds; there they start from those of the step before. ``queries`` and ``keys``: how
    many clusters. Other arguments as of :class:`~diffsparse.kernels.select.Signal`.
    """
    numbers, there = in_blocks(tokens)
    order, visual = tokens.gather.long(), torch.stack([tokens.visual_blocks(o) for o in range(len(tokens.gather))])
    if len(order) > 1:
        order, visual = (x[tokens.head_order.long()] for x in (order, visual))
    inside = there & visual[..., None]
    place = torch.arange(max(queries, keys), device=q.device)
    shares = []
    for x, count in ((q, queries), (k, keys)):
        first = ((2 * place[:count] + 1) * tokens.num_visual).div(2 * count, rounding_mode="floor")
        chosen = order[:, tokens.text_before + first]
        start = take(x, chosen, torch.ones_like(chosen, dtype=torch.bool)).float()
        rows = take(x, numbers, inside).flatten(2, 3)
        which, centres = k_means(rows, inside.flatten(1), start, rounds)
        shares.append((which.unflatten(2, there.shape[1:]).sum(3, dtype=torch.float32), centres))
    (of_queries, asking), (of_keys, asked) = shares  # [B, H, N, C] tokens of each block in each cluster
    logits = scale * asking @ asked.transpose(2, 3)
    size = of_keys.sum(2)[:, :, None]  # [B, H, 1, C]
    weight = (logits - (logits + size.log()).logsumexp(3, keepdim=True)).masked_fill(size == 0, -torch.inf).exp()
    return (of_queries @ weight @ of_keys.transpose(2, 3)).log()
