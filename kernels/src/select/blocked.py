"""Tokens laid out by blocks, and the attention that some queries pay to blocks of keys: for rules that look closer.

What is made here of q and k has their precision, so that a GPU multiplies 16-bit numbers on its tensor cores and no
copy is larger than it has to be; a CPU is faster with single precision. Sums and softmax are in fp32.
"""

from __future__ import annotations

from typing import Literal

import torch

from diffsparse.tokens import TokenLayout

__all__ = [
    "block_mass",
    "in_blocks",
    "largest_products",
    "precision",
    "sample_places",
    "sampled",
    "spread_rows",
    "take",
    "take_rows",
]

# Logits that are held at a time, over the batch and the heads: 128 MiB in fp32.
_AT_A_TIME = 2**25


def precision(x: torch.Tensor) -> torch.dtype:
    """In which products of these values are taken."""
    return torch.float32 if x.device.type == "cpu" else x.dtype


def in_blocks(tokens: TokenLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Each head's tokens by its blocks: int64 ``[H, N, W]``, the model's numbers; and bool, which places hold one.

    ``W`` is the block size. Where there is one order alone, it serves all heads, and ``H`` is 1. Places behind a
    block's end have the number of some other token.
    """
    start = tokens.block_start[:, :-1].long()
    place = torch.arange(tokens.block_size, device=tokens.device)
    there = place < tokens.lengths()[..., None]  # [O, N, W]
    position = (start[..., None] + place).clamp(max=tokens.seq_len - 1)
    number = tokens.gather.long().gather(1, position.flatten(1)).view_as(position)
    if len(number) == 1:
        return number, there
    order = tokens.head_order.long()
    return number[order], there[order]


def take_rows(x: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Rows of ``x``, ``[B, S, H, D]``, by number, ``[H or 1, P]``: a copy, ``[B, P, H, D]``."""
    if len(numbers) == 1:
        return x.index_select(1, numbers[0])
    batch, _, heads, dim = x.shape
    return x.gather(1, numbers.T[None, :, :, None].expand(batch, -1, heads, dim))


def take(x: torch.Tensor, numbers: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """Rows of ``x``, ``[B, S, H, D]``, by number, ``[H or 1, ...]``: ``[B, H, ..., D]``; 0 where none is there.

    In the precision of ``x``, on a CPU in fp32.
    """
    rows = take_rows(x, numbers.flatten(1)).to(precision(x)).transpose(1, 2).unflatten(2, numbers.shape[1:])
    return rows.masked_fill(~there[None, ..., None], 0.0)


def sample_places(length: torch.Tensor, count: int) -> torch.Tensor:
    """Places of ``count`` tokens in each block, evenly spaced: int64 ``[..., count]`` for lengths ``[...]``.

    Of a block with fewer tokens some come several times.
    """
    part = torch.arange(count, device=length.device)
    return ((2 * part + 1) * length[..., None].long()).div(2 * count, rounding_mode="floor")


def spread_rows(tokens: TokenLayout, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries evenly spaced over the video in each head's order: int64 ``[H, R]``, the model's numbers, and the block
    that each is in."""
    order = tokens.head_order.long()
    whole = torch.full((1,), tokens.num_visual, device=tokens.device)
    position = tokens.text_before + sample_places(whole, min(rows, tokens.num_visual))[0]  # the same in every order
    start = tokens.block_start[:, 1:-1].contiguous()
    own = torch.stack([torch.searchsorted(s, position.int(), right=True) for s in start])
    return tokens.gather.long()[:, position][order], own[order]


def sampled(tokens: TokenLayout, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of each block, evenly spaced, each once: int64 ``[H, N, n]``, the model's numbers; and which are there."""
    numbers, there = in_blocks(tokens)
    if count >= tokens.block_size:
        return numbers, there
    length = there.sum(-1)
    place = torch.where(
        length[..., None] > count,
        sample_places(length, count),
        torch.arange(count, device=tokens.device),
    )
    return numbers.gather(2, place), place < length[..., None]


def block_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    there: torch.Tensor,
    scale: float,
    reduce: Literal["sum", "max"] = "sum",
) -> torch.Tensor:
    """Softmax weights of queries over all keys, summed over each block of keys or their largest there.

    q: ``[B, H, R, D]``. k: ``[B, H, N, W, D]``. there: bool ``[H or 1, N, W]``, keys that take part.
    Returns fp32 ``[B, H, R, N]``. Queries are taken some at a time, so that memory holds no map of all tokens.
    """
    batch, heads, rows, _ = q.shape
    blocks, width = k.shape[2:4]
    keys = k.flatten(2, 3).transpose(2, 3)
    queries = (scale * q.float()).to(q.dtype)
    outside = ~there.flatten(1)[None, :, None]
    step = max(1, _AT_A_TIME // (batch * heads * blocks * width))
    parts = []
    for first in range(0, rows, step):
        logits = (queries[:, :, first : first + step] @ keys).masked_fill_(outside, -torch.inf)
        weights = logits.softmax(dim=-1, dtype=torch.float32).unflatten(-1, (blocks, width))
        parts.append(weights.sum(-1) if reduce == "sum" else weights.amax(-1))
    return torch.cat(parts, dim=2)


def largest_products(rows: torch.Tensor, there: torch.Tensor, others: torch.Tensor, scale: float) -> torch.Tensor:
    """The largest product that a row of each block has with each of some others, times ``scale``, which is positive.

    rows: ``[B, H, N, W, D]``. there: bool ``[H or 1, N, W]``, rows that take part. others: ``[B, H, M, D]``.
    Returns fp32 ``[B, H, N, M]``; -inf of a block without rows. Blocks are taken some at a time.
    """
    batch, heads, blocks, width, _ = rows.shape
    right = (scale * others.float()).to(rows.dtype).transpose(2, 3)
    outside = ~there[None, ..., None]
    step = max(1, _AT_A_TIME // (batch * heads * width * others.shape[2]))
    parts = []
    for first in range(0, blocks, step):
        last = first + step
        products = (rows[:, :, first:last].flatten(2, 3) @ right).unflatten(2, (-1, width))
        parts.append(products.masked_fill_(outside[:, :, first:last], -torch.inf).amax(3))
    return torch.cat(parts, dim=2).float()
