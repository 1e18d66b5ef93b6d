"""The rule ``sub_block``: mean queries and keys of the parts of blocks."""

from __future__ import annotations

import torch

from diffsparse.kernels.select import blocked
from diffsparse.kernels.select.available import no_blocks_kernel
from diffsparse.kernels.select.blocked import in_blocks, take, take_rows
from diffsparse.tokens import TokenLayout

__all__ = ["part_means", "score_sub_block"]


def part_means(x: torch.Tensor, tokens: TokenLayout, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean rows of ``parts`` equal runs of every block: fp32 ``[B, H, N, parts, D]``; and how many tokens they have,
    int64 ``[H or 1, N, parts]``.

    Token ``i`` of a block of ``n`` is in part ``floor(i * parts / n)``.
    """
    if no_blocks_kernel(x, parts) is None:
        from diffsparse.kernels.select.host import launch_parts

        return launch_parts(x, tokens, parts)[0], _counts(tokens, parts)
    numbers, there = in_blocks(tokens)
    length = there.sum(-1, keepdim=True).clamp(min=1)  # [H, N, 1]
    place = torch.arange(tokens.block_size, device=x.device)
    part = (place * parts).div(length, rounding_mode="floor")
    inside = (part[..., None, :] == torch.arange(parts, device=x.device)[:, None]) & there[..., None, :]  # [H, N, p, W]
    count = inside.sum(-1)
    if len(numbers) == 1:  # heads stay side by side, as they are
        rows = take_rows(x, numbers.flatten(1)).to(blocked.precision(x)).unflatten(1, numbers.shape[1:])
        sums = inside[0].to(rows.dtype) @ rows.flatten(3)  # [B, N, p, H * D]
        means = sums.float().unflatten(3, x.shape[2:]).permute(0, 3, 1, 2, 4)
    else:
        rows = take(x, numbers, there)
        means = (inside.to(rows.dtype)[None] @ rows).float()
    return means / count.clamp(min=1)[None, ..., None], count


def _counts(tokens: TokenLayout, parts: int) -> torch.Tensor:
    """How many tokens are in the parts of every block: int64 ``[H or 1, N, parts]``."""
    length = tokens.lengths().long()
    if len(length) > 1:
        length = length[tokens.head_order.long()]
    # Part p begins at the first i with floor(i * parts / n) = p, which is ceil(p * n / parts).
    begin = (torch.arange(parts + 1, device=length.device) * length[..., None] + parts - 1).div(
        parts, rounding_mode="floor"
    )
    return begin.diff(dim=-1)


def score_sub_block(
    q: torch.Tensor, k: torch.Tensor, tokens: TokenLayout, scale: float, *, parts: int = 4
) -> torch.Tensor:
    """``log sum exp(scale * q_a . k_b)`` over the mean queries ``a`` and mean keys ``b`` of two blocks' parts.

    SubBlock of SGLang's sparse attention for diffusion, with 4 x 4 parts. Other arguments as of
    :class:`~diffsparse.kernels.select.Signal`.
    """
    queries, asking = part_means(q, tokens, parts)
    keys, asked = part_means(k, tokens, parts)
    if no_blocks_kernel(q, parts) is None:
        from diffsparse.kernels.select.host import launch_parts_score

        return launch_parts_score(queries, keys, asking, asked, scale)
    real, there = asking > 0, asked > 0
    score = torch.full((), -torch.inf, device=q.device)
    for a in range(parts):
        for b in range(parts):
            logits = scale * queries[..., a, :] @ keys[..., b, :].transpose(2, 3)
            outside = ~(real[:, :, None, a] & there[:, None, :, b])
            score = torch.logaddexp(score, logits.masked_fill(outside[None], -torch.inf))
    return score
