"""The rule ``spatial_temporal``: a head sees near frames, or near places of all frames, whichever errs less."""

from __future__ import annotations

import torch

from diffsparse.kernels.select.blocked import in_blocks, spread_rows, take
from diffsparse.tokens import TokenLayout

__all__ = ["score_spatial_temporal"]

# Of blocks as far as each other by one measure, those come first that are nearer by the other.
_OTHER = 1e-3


def _distances(tokens: TokenLayout) -> torch.Tensor:
    """Of each two blocks, how far their centres are in frames and in places: fp32 ``[2, H or 1, N, N]``."""
    numbers, there = in_blocks(tokens)
    assert tokens.shape is not None
    frames, height, width = tokens.shape
    token = (numbers - tokens.text_before).clamp(min=0, max=tokens.num_visual - 1)
    axes = torch.stack(
        [
            token.div(height * width, rounding_mode="floor"),
            token.div(width, rounding_mode="floor") % height,
            token % width,
        ]
    )
    centre = (axes.float() * there).sum(3) / there.sum(2).clamp(min=1)  # [3, H, N]
    apart = (centre[..., :, None] - centre[..., None, :]).abs()
    place = torch.hypot(apart[1], apart[2])
    return torch.stack([apart[0] + _OTHER * place / max(height, width), place + _OTHER * apart[0] / max(1, frames)])


def score_spatial_temporal(
    q: torch.Tensor,
    k: torch.Tensor,
    tokens: TokenLayout,
    scale: float,
    *,
    v: torch.Tensor,
    share: float = 0.25,
    rows: int = 64,
) -> torch.Tensor:
    """Minus the distance in frames, or minus the distance in places of a frame, between the centres of two blocks.

    Sparse VideoGen (2502.01776): ``rows`` queries are attended exactly, and with either mask; a head takes the mask
    whose output is nearer. Masks keep the nearest ``share`` of the video's blocks, so the budget is
    ``Budget("density", share)``. There tokens of heads that look through time are put in another order, so that their
    mask is a band; here the order is the entry's, and boxes of a few frames serve both. Other arguments as of
    :class:`~diffsparse.kernels.select.Signal`; ``v`` has the shape of ``k``.
    """
    numbers, there = in_blocks(tokens)
    far = _distances(tokens)  # [2, H or 1, N, N]
    visual = torch.stack([tokens.visual_blocks(o) for o in range(tokens.block_start.shape[0])])
    visual = visual[tokens.head_order.long()]  # [H, N]
    far = far.expand(-1, len(visual), -1, -1)
    count = (share * visual.sum(1).double() - 1e-9).ceil()[:, None, None]
    chosen, own = spread_rows(tokens, rows)  # [H, R]
    mine = far.gather(2, own[None, ..., None].expand(2, -1, -1, far.shape[3])).masked_fill(~visual[:, None], torch.inf)
    kept = (mine.argsort(dim=3, stable=True).argsort(dim=3) < count) | ~visual[:, None]  # [2, H, R, N]
    keys, values = take(k, numbers, there), take(v, numbers, there).flatten(2, 3)
    queries = (scale * take(q, chosen, torch.ones_like(chosen, dtype=torch.bool)).float()).to(keys.dtype)
    logits = (queries @ keys.flatten(2, 3).transpose(2, 3)).masked_fill(~there.flatten(1)[None, :, None], -torch.inf)
    exact = logits.softmax(3, dtype=torch.float32).to(values.dtype) @ values
    errors = []
    for mask in kept:
        inside = mask[None, ..., None].expand(-1, -1, -1, -1, keys.shape[3]).flatten(3)
        sparse = logits.masked_fill(~inside, -torch.inf).softmax(3, dtype=torch.float32).to(values.dtype) @ values
        errors.append((sparse.float() - exact.float()).square().sum((2, 3)))  # [B, H]
    in_time = (errors[1] < errors[0])[..., None, None]
    return -torch.where(in_time, far[1], far[0])
