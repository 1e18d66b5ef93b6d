"""As ``mean``, with half the variance of the block's logits added to the logit: the second cumulant of their sum of
exponentials, under a diagonal covariance of the keys."""

from __future__ import annotations

import torch

from diffsparse.kernels.tails.mean import MEAN
from diffsparse.tails import TAIL_COST

__all__ = ["MOMENTS", "Moments"]


class Moments:
    """Second order in the weights; values as with ``mean``. Its variances do not exist in 8 bits."""

    name = "moments"
    cost = TAIL_COST[name]

    def summaries(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`Tail.summaries`; one for a block."""
        logits, means = MEAN.summaries(queries, keys, values)
        return logits + (0.5 * queries.square() @ keys.var(0, unbiased=False))[:, None], means


MOMENTS = Moments()
