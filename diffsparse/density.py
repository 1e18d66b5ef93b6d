"""Density: executed query-key work over all query-key pairs. The one formula that everything else asks."""

from __future__ import annotations

import numpy as np

from diffsparse.tails import TAIL_COST

__all__ = ["TAIL_COST", "call_density", "tail_density"]


def tail_density(tail: str, num_blocks: int, tokens: int) -> float:
    """What attending a summary of each of ``num_blocks`` blocks costs, over all pairs of ``tokens`` tokens."""
    return TAIL_COST[tail] * num_blocks / tokens


def call_density(mask: np.ndarray, lengths: np.ndarray, tail: str) -> float:
    """Of one head's call: the pairs of tokens that its kept blocks hold, and its tail, over all pairs.

    mask: kept blocks, bool ``[N, N]``.  lengths: tokens of each block, ``[N]``.  A head that keeps every block has no
    tail to attend.
    """
    tokens = float(lengths.sum())
    kept = float(lengths @ mask @ lengths) / tokens**2
    cost = 0.0 if mask.all() else tail_density(tail, len(mask), round(tokens))
    return min(1.0, kept + cost)
