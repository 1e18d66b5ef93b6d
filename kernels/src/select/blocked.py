"""Tokens laid out by blocks, and the attention that some queries pay to blocks of keys: for rules that look closer."""

from __future__ import annotations

from typing import Literal

import torch

from diffsparse.tokens import TokenLayout

__all__ = ["block_mass", "in_blocks", "sample_places", "take"]

# Logits that are held at a time, over the batch and the heads: 64 MiB in fp32.
_AT_A_TIME = 2**24


def in_blocks(tokens: TokenLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Each head's tokens by its blocks: int64 ``[H, N, W]``, the model's numbers; and bool, which places hold one.

    ``W`` is the block size. Places behind a block's end have the number of some other token.
    """
    order = tokens.head_order.long()
    start = tokens.block_start[:, :-1].long()
    place = torch.arange(tokens.block_size, device=tokens.device)
    there = place < tokens.lengths()[..., None]  # [O, N, W]
    position = (start[..., None] + place).clamp(max=tokens.seq_len - 1)
    number = tokens.gather.long().gather(1, position.flatten(1)).view_as(position)
    return number[order], there[order]


def take(x: torch.Tensor, numbers: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """Rows of ``x``, ``[B, S, H, D]``, by number, ``[H, ...]``: fp32 ``[B, H, ..., D]``; 0 where none is there."""
    batch, _, heads, dim = x.shape
    flat = numbers.flatten(1).T[None, :, :, None].expand(batch, -1, heads, dim)  # [B, P, H, D]
    rows = x.gather(1, flat).transpose(1, 2).reshape(batch, *numbers.shape, dim).float()
    return rows.masked_fill(~there[None, ..., None], 0.0)


def sample_places(length: torch.Tensor, count: int) -> torch.Tensor:
    """Places of ``count`` tokens in each block, evenly spaced: int64 ``[..., count]`` for lengths ``[...]``.

    Of a block with fewer tokens some come several times.
    """
    part = torch.arange(count, device=length.device)
    return ((2 * part + 1) * length[..., None].long()).div(2 * count, rounding_mode="floor")


def block_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    there: torch.Tensor,
    scale: float,
    reduce: Literal["sum", "max"] = "sum",
) -> torch.Tensor:
    """Softmax weights of queries over all keys, summed over each block of keys or their largest there.

    q: fp32 ``[B, H, R, D]``. k: fp32 ``[B, H, N, W, D]``. there: bool ``[H, N, W]``, keys that take part.
    Returns fp32 ``[B, H, R, N]``. Queries are taken some at a time, so that memory holds no map of all tokens.
    """
    batch, heads, rows, _ = q.shape
    blocks, width = k.shape[2:4]
    keys = k.flatten(2, 3).transpose(2, 3)
    outside = ~there.flatten(1)[None, :, None]
    step = max(1, _AT_A_TIME // (batch * heads * blocks * width))
    parts = []
    for first in range(0, rows, step):
        logits = (scale * q[:, :, first : first + step]) @ keys
        weights = logits.masked_fill_(outside, -torch.inf).softmax(dim=-1).unflatten(-1, (blocks, width))
        parts.append(weights.sum(-1) if reduce == "sum" else weights.amax(-1))
    return torch.cat(parts, dim=2)
