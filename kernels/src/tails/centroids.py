"""A block is cut in two along the principal axis of its keys, and each half is attended through its means."""

from __future__ import annotations

import torch

from diffsparse.kernels.summaries import AXIS_STEPS
from diffsparse.kernels.tails.mean import MEAN
from diffsparse.tails import TAIL_COST

__all__ = ["CENTROIDS", "Centroids"]


class Centroids:
    """A block's values go with its keys, so that two mean values are nearer to what is attended than one."""

    name = "centroids"
    cost = TAIL_COST[name]

    def summaries(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`Tail.summaries`; two for a block, of which one of a single token has one."""
        parts = [MEAN.summaries(queries, keys[half], values[half]) for half in _halves(keys)]
        return torch.cat([logits for logits, _ in parts], 1), torch.cat([means for _, means in parts])


def _halves(keys: torch.Tensor) -> list[torch.Tensor]:
    """Places of a block's tokens, cut at the median of their keys along the principal axis."""
    if len(keys) == 1:
        return [torch.zeros(1, dtype=torch.int64, device=keys.device)]
    centred = keys - keys.mean(0)
    axis = centred[centred.square().sum(1).argmax()]
    for _ in range(AXIS_STEPS):
        axis = centred.T @ (centred @ (axis / axis.norm().clamp(min=1e-30)))
    ranked = (centred @ axis).argsort(dim=0, stable=True)
    return [ranked[: len(keys) // 2], ranked[len(keys) // 2 :]]


CENTROIDS = Centroids()
