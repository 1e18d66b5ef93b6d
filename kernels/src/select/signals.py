"""What rules that score pairs of blocks have in common, and what their scores mean."""

from __future__ import annotations

from typing import Protocol

import torch

from diffsparse.tokens import TokenLayout

__all__ = ["Signal", "block_means", "blocks_of_tokens"]


class Signal(Protocol):
    """Scores every pair of a query block and a key block, for a :class:`~diffsparse.Budget` to keep the best.

    ``q``, ``k``: ``[B, S, H, D]`` in the model's token order. ``tokens``: how they are cut. ``scale``: factor of the
    logits. Returns fp32 ``[B, H, N, N]``: natural logarithms of the weight that the rule expects a block of keys to
    have for a block of queries, up to a number for each row. Parameters follow as keyword arguments with defaults.
    Pairs with text, and blocks that an order does not have, may score anything: what is kept of them is not the rule's
    business.

    It runs in the middle of a generation, so it works on the device of q and reads nothing back from it.
    """

    def __call__(self, q: torch.Tensor, k: torch.Tensor, tokens: TokenLayout, scale: float) -> torch.Tensor: ...


def blocks_of_tokens(tokens: TokenLayout) -> torch.Tensor:
    """The block of every token in every order: int64 ``[O, S]``, tokens in the model's order."""
    position = torch.arange(tokens.seq_len, dtype=torch.int32, device=tokens.device)
    block = torch.stack(
        [torch.searchsorted(start[1:-1].contiguous(), position, right=True) for start in tokens.block_start]
    )
    return block.gather(1, tokens.scatter.long())


def block_means(x: torch.Tensor, tokens: TokenLayout) -> torch.Tensor:
    """Mean row of every block, fp32 ``[B, H, N, D]``, of ``x`` ``[B, S, H, D]`` in the model's token order.

    Empty blocks have zeros.
    """
    batch, seq, heads, dim = x.shape
    n = tokens.num_blocks
    order = tokens.head_order.long()
    index = blocks_of_tokens(tokens)[order].T[None, :, :, None].expand(batch, seq, heads, dim)
    total = torch.zeros(batch, n, heads, dim, dtype=torch.float32, device=x.device).scatter_add_(1, index, x.float())
    length = tokens.lengths().clamp(min=1)[order].float()  # [H, N]
    return total.transpose(1, 2) / length[None, :, :, None]
