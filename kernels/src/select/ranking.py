"""The best blocks of each row of scores: by sorting, or by kernels that compare without sorting."""

from __future__ import annotations

from typing import Protocol

import torch

from diffsparse.kernels.backends.installed import no_triton_for
from diffsparse.kernels.select.largest import Rows, ScannedRows, SortedRows

__all__ = ["Compared", "Ranking", "Sorted", "ranking_of"]

#: Blocks of a row that a program of a kernel holds in its registers.
_MOST_BLOCKS = 8192


class Ranking(Protocol):
    """Rows of scores, fp32 ``[B, H, N, N]`` and finite, of which some, the candidates, may be kept.

    A row's best are its candidates by descending score, and of equal ones those that come first.
    """

    def best(self, count: torch.Tensor) -> torch.Tensor:
        """Mask of the ``count`` best: bool ``[B, H, N, N]``. count: integers that expand to ``[B, H, N]``, at most as
        many as a row has candidates."""

    def prefix(self, weights: torch.Tensor, target: float) -> torch.Tensor:
        """How many of the best have weights that sum to ``target``, or all: integers ``[B, H, N]``.

        weights: fp32 ``[B, H, N, N]``, not below 0, that grow with the scores but for those that weigh nothing.
        """

    def weigh(self, weights: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """What the ``count`` best weigh: fp32 ``[B, H, N]``."""

    def rows(self, values: torch.Tensor, together: bool = False) -> Rows:
        """Values ``[B, H, N, N]`` that grow with the scores, by groups: a head is one, or all are, ``together``."""


class Sorted:
    """By one stable sort."""

    def __init__(self, scores: torch.Tensor, candidates: torch.Tensor) -> None:
        self.order = scores.masked_fill(~candidates, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        self.number = candidates.sum(-1)

    def best(self, count: torch.Tensor) -> torch.Tensor:
        """As of :class:`Ranking`."""
        place = torch.arange(self.order.shape[-1], device=self.order.device)
        return torch.zeros_like(self.order, dtype=torch.bool).scatter_(-1, self.order, place < count[..., None])

    def prefix(self, weights: torch.Tensor, target: float) -> torch.Tensor:
        """As of :class:`Ranking`."""
        ordered = weights.gather(-1, self.order)
        return (ordered.cumsum(-1) - ordered < target).sum(-1).minimum(self.number)

    def weigh(self, weights: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """As of :class:`Ranking`."""
        sums = torch.nn.functional.pad(weights.gather(-1, self.order).cumsum(-1), (1, 0))
        return sums.gather(-1, count.expand(weights.shape[:-1])[..., None])[..., 0]

    def rows(self, values: torch.Tensor, together: bool = False) -> SortedRows:
        """As of :class:`Ranking`."""
        ordered = values.gather(-1, self.order)
        return SortedRows(ordered.flatten(1, 2)[:, None] if together else ordered)


class Compared:
    """By kernels, a row to a program. Sums are taken in another order than those of :class:`Sorted`."""

    def __init__(self, scores: torch.Tensor, candidates: torch.Tensor) -> None:
        self.scores, self.candidates = scores.contiguous(), candidates.contiguous()

    def best(self, count: torch.Tensor) -> torch.Tensor:
        """As of :class:`Ranking`."""
        from diffsparse.kernels.select.host import launch_best

        wanted = count.expand(self.scores.shape[:-1]).int().contiguous()
        return launch_best(self.scores, self.candidates, wanted)

    def prefix(self, weights: torch.Tensor, target: float) -> torch.Tensor:
        """As of :class:`Ranking`."""
        from diffsparse.kernels.select.host import launch_prefix

        return launch_prefix(self.scores, self.candidates, weights.contiguous(), target)

    def weigh(self, weights: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """As of :class:`Ranking`."""
        return (weights * self.best(count.minimum(self.candidates.sum(-1)))).sum(-1)

    def rows(self, values: torch.Tensor, together: bool = False) -> ScannedRows:
        """As of :class:`Ranking`."""
        return ScannedRows(values.flatten(1, 2)[:, None] if together else values)


def ranking_of(scores: torch.Tensor, candidates: torch.Tensor) -> Ranking:
    """The ranking that suits the device."""
    if no_triton_for(scores) is not None or scores.shape[-1] > _MOST_BLOCKS:
        return Sorted(scores, candidates)
    return Compared(scores, candidates)
