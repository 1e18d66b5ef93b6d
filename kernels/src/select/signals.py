"""What rules that score pairs of blocks have in common, and what their scores mean."""

from __future__ import annotations

from typing import Protocol

import torch

from diffsparse.kernels.select.available import no_blocks_kernel
from diffsparse.kernels.select.blocked import in_blocks, take_rows
from diffsparse.tokens import TokenLayout

__all__ = ["Signal", "block_means"]


class Signal(Protocol):
    """Scores every pair of a query block and a key block, for a :class:`~diffsparse.Budget` to keep the best.

    ``q``, ``k``: ``[B, S, H, D]`` in the model's token order. ``tokens``: how they are cut. ``scale``: factor of the
    logits. Returns fp32 ``[B, H, N, N]``: natural logarithms of the weight that the rule expects a block of keys to
    have for a block of queries, up to a number for each row. Parameters follow as keyword arguments with defaults.
    A score of +inf says that the pair is kept whatever it weighs: a budget that counts blocks counts it first, and one
    that sums up weights keeps it beside the others, up to its ``most``. Pairs with text, and blocks that an order does
    not have, may score anything: what is kept of them is not the rule's business.

    It runs in the middle of a generation, so it works on the device of q and reads nothing back from it.
    """

    def __call__(self, q: torch.Tensor, k: torch.Tensor, tokens: TokenLayout, scale: float) -> torch.Tensor: ...


def block_means(x: torch.Tensor, tokens: TokenLayout) -> torch.Tensor:
    """Mean row of every block, fp32 ``[B, H, N, D]``, of ``x`` ``[B, S, H, D]`` in the model's token order.

    Empty blocks have zeros. Reads ``x`` once; where no kernel runs it copies it, in its own precision.
    """
    if no_blocks_kernel(x) is None:
        from diffsparse.kernels.select.host import launch_parts

        return launch_parts(x, tokens)[0].squeeze(3)
    numbers, there = in_blocks(tokens)
    rows = take_rows(x, numbers.flatten(1)).unflatten(1, numbers.shape[1:])  # [B, N, W, H, D]
    rows.masked_fill_(~there.permute(1, 2, 0)[None, ..., None], 0.0)
    total = rows.sum(2, dtype=torch.float32).transpose(1, 2)
    return total / there.sum(2).clamp(min=1)[None, ..., None]
