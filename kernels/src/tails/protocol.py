"""What a tail says of itself."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

__all__ = ["Tail"]


@runtime_checkable
class Tail(Protocol):
    """What a query block attends instead of the blocks that it drops."""

    @property
    def name(self) -> str:
        """What ``Execution(tail=...)`` and plan files call it. It never changes."""
        ...

    @property
    def cost(self) -> float:
        """Of one dropped block, in rows of dense attention: 1 for one summary that is attended as one key."""
        ...

    def summaries(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One dropped block, by the plain formula: what the reference computes, and other backends have to match.

        queries: ``[R, D]``, already times the factor of the logits. keys, values: ``[n, D]``, all tokens of the block,
        of which there is at least one. All are in the precision in which the reference computes.

        Returns the logits ``[R, M]`` of the block's ``M`` summaries, ln of the number of tokens that each stands for
        added, and their values ``[M, D]``.
        """
        ...
