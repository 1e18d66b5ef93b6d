"""The rule ``tail_error``: what the tail ``mean`` gets wrong where it stands for a block."""

from __future__ import annotations

import torch

from diffsparse.kernels.select import blocked
from diffsparse.kernels.select.available import no_blocks_kernel
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
    values = part_means(v, tokens, parts)[0]
    number = count[None, :, None].float()  # [1, H, 1, N, p]
    mean = (keys * number[:, :, 0, ..., None]).sum(3) / number[:, :, 0].sum(3).clamp(min=1)[..., None]
    # |sum_p d_p v_p|^2 by the products of a block's values with each other: as many numbers as parts, not channels.
    products = values @ values.transpose(3, 4)  # [B, H, N, p, p]
    # Of large heads in fp32 there is no room for the operands of a product.
    if no_blocks_kernel(q, parts) is None and (blocked.precision(k) != torch.float32 or k.shape[3] <= 128):
        from diffsparse.kernels.select.host import launch_excess

        return launch_excess(query, keys.to(blocked.precision(k)), count, products)
    keys = keys.to(blocked.precision(k)).flatten(2, 3).transpose(2, 3)
    batch, heads, n, _ = mean.shape
    step = max(1, blocked._AT_A_TIME // (batch * heads * n * parts))
    found = []
    for part in query.split(step, dim=2):
        logits = (part.to(keys.dtype) @ keys).float().unflatten(3, (n, parts))
        logits = logits.masked_fill_(number == 0, -torch.inf)
        largest = logits.amax((3, 4), keepdim=True)
        weights = (logits - largest).exp_()
        at_mean = (part @ mean.transpose(2, 3) - largest[..., 0]).exp()[..., None]
        total = (weights * number).sum((3, 4), keepdim=True)
        excess = ((weights - at_mean) * number / total).transpose(2, 3)  # [B, H, N, r, p]
        found.append(((excess @ products) * excess).sum(4).transpose(2, 3))
    return torch.cat(found, dim=2).clamp_(min=0.0).log()
