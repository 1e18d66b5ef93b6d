"""Pairs of blocks that a rule keeps for where they are, whatever they weigh."""

from __future__ import annotations

import torch

from diffsparse.tokens import TokenLayout

__all__ = ["always_keep", "near"]


def near(tokens: TokenLayout, beside: int, first: int) -> torch.Tensor:
    """Pairs less than ``beside`` blocks apart, and the video's ``first`` blocks of keys for all: bool ``[N, N]``."""
    block = torch.arange(tokens.num_blocks, device=tokens.device)
    begin = tokens.text_blocks[0]
    sink = (block >= begin) & (block < begin + first)
    return ((block[:, None] - block[None, :]).abs() < beside) | sink[None, :]


def always_keep(scores: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """Scores with +inf for these pairs, of a shape that expands to theirs."""
    return scores.masked_fill(pairs, torch.inf)
