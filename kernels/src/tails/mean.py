"""A block is attended through its mean key and its mean value, as often as it has tokens."""

from __future__ import annotations

import math

import torch

from diffsparse.tails import TAIL_COST

__all__ = ["MEAN", "Mean"]


class Mean:
    """First order: right where a block's keys are nearly equal."""

    name = "mean"
    cost = TAIL_COST[name]

    def summaries(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`Tail.summaries`; one for a block."""
        logits = queries @ keys.mean(0) + math.log(len(keys))
        return logits[:, None], values.mean(0, keepdim=True)


MEAN = Mean()
