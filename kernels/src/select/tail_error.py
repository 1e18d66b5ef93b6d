"""The rule ``tail_error``: what the tail ``mean`` gets wrong where it stands for a block."""

from __future__ import annotations

import torch

from diffsparse.kernels.select import blocked
from diffsparse.kernels.select.signals import block_means
from diffsparse.kernels.select.sub_block import part_means
from diffsparse.tokens import TokenLayout

__all__ = ["score_tail_error"]


def score_tail_error(
    q: torch.Tensor, k: torch.Tensor, tokens: TokenLayout, scale: float, *, v: torch.Tensor, parts: int = 16
) -> torch.Tensor:
    """``log |sum_i (e^{s_i} - e^{s}) v_i|^2``: what a block adds to the mean query's output beyond its mean.

    ``s_i`` are the logits of the mean query with the keys of a block, ``s`` that with their mean, both less the
    logarithm of the sum over all keys. SVG-EAR (2603.08982) routes by such an error, there of clusters, with the
    lengths of single tokens' errors added up; here errors of a block may cancel, as they do in the output. Keys and
    values are the means of ``parts`` runs of a block; with as many as it has tokens they are the tokens. The scores of
    all rows and heads compare: ``Budget("best_heads", ...)``. Other arguments as of
    :class:`~diffsparse.kernels.select.Signal`; ``v`` has the shape of ``k``.
    """
    query = scale * block_means(q, tokens)
    keys, count = part_means(k, tokens, parts)  # [B, H, N, p, D], [H or 1, N, p]
    length = count.sum(2).clamp(min=1)
    mean = (keys * count[None, ..., None]).sum(3) / length[None, ..., None]
    precision = torch.float32 if v.device.type == "cpu" else v.dtype
    keys, values = keys.to(precision), part_means(v, tokens, parts)[0].to(precision)
    number = count[None, :, None].float()  # [1, H, 1, N, p]
    batch, heads, n, dim = mean.shape
    step = max(1, blocked._AT_A_TIME // (batch * heads * n * max(parts, dim)))
    rows = []
    for part in query.split(step, dim=2):
        logits = (part.to(precision) @ keys.flatten(2, 3).transpose(2, 3)).float().unflatten(3, (n, parts))
        logits = logits.masked_fill(number == 0, -torch.inf)
        whole = (logits + number.log()).flatten(3).logsumexp(3)[..., None]  # [B, H, r, 1]
        at_mean = part @ mean.transpose(2, 3)
        excess = number * ((logits - whole[..., None]).exp() - (at_mean - whole).exp()[..., None])
        output = excess.to(precision).transpose(2, 3) @ values  # [B, H, N, r, D]
        rows.append(torch.linalg.vector_norm(output, dim=4, dtype=torch.float32).transpose(2, 3))
    return 2 * torch.cat(rows, dim=2).log()
