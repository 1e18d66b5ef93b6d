"""What scores of an attention call are of and are: blocks in an order, sampled queries, and arrays of errors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from diffsparse.grid import TokenGrid
from diffsparse.order import TokenOrder

__all__ = ["CHUNK_BYTES", "LADDER", "BlockIndex", "CallScores", "sample_queries", "sample_text"]

# Kept shares of every query block's key blocks at which the true error is measured.
LADDER = (0.0, 0.02, 0.06, 0.15, 0.35, 0.7)

# Logits of one chunk of sampled queries against all keys are held at once, in fp32.
CHUNK_BYTES = 128 * 2**20


@dataclass(frozen=True)
class BlockIndex:
    """An order's visual blocks as padded gather indices. ``NB`` blocks of at most ``n`` tokens.

    ``tokens``: int64 ``[NB, n]``, indices into the whole sequence (padding repeats the block's first token).
    ``valid``: bool ``[NB, n]``. ``length``: fp32 ``[NB]``. ``text``: int64 ``[T]``, the text tokens.
    """

    tokens: torch.Tensor
    valid: torch.Tensor
    length: torch.Tensor
    text: torch.Tensor

    @classmethod
    def build(cls, grid: TokenGrid, order: TokenOrder, block_size: int, device: torch.device) -> BlockIndex:
        """Index the visual blocks of ``order`` on ``grid``."""
        blocks = order.partition(grid, block_size)
        width = int(blocks.lengths.max())
        position = blocks.start[:-1, None] + np.arange(width)
        valid = np.arange(width) < blocks.lengths[:, None]
        tokens = grid.text_before + blocks.permutation[np.where(valid, position, blocks.start[:-1, None])]
        after = grid.text_before + grid.num_visual
        text = np.concatenate([np.arange(grid.text_before), np.arange(after, grid.seq_len)])
        return cls(
            torch.from_numpy(tokens).to(device),
            torch.from_numpy(valid).to(device),
            torch.from_numpy(blocks.lengths.astype(np.float32)).to(device),
            torch.from_numpy(text).to(device),
        )


@dataclass(frozen=True)
class CallScores:
    """Scores of one attention call. ``H`` heads, ``NB`` visual blocks.

    ``error``: fp32 ``[tails, H, NB, NB]`` (tails in the order of ``entry.TAILS``): squared output error over a query
    block's tokens when a key block is dropped.
    ``mass``: fp32 ``[H, NB, NB]``: attention mass per query, mean over the query block.
    ``energy``: fp32 ``[H]``: squared norm of the head's output over all queries, in the same units. Those of text are
    among them: whatever is dropped they see every key, but a head that is left out has no output for them either.
    ``summed``, ``true``: fp32 ``[tails, H, len(LADDER)]``: with the best key blocks of every query block kept, the sum
    of the dropped blocks' scores and the error that dropping them all really makes. ``repaired``: what a repair leaves
    of that error, at most all of it.
    """

    error: torch.Tensor
    mass: torch.Tensor
    energy: torch.Tensor
    summed: torch.Tensor
    true: torch.Tensor
    repaired: torch.Tensor


def sample_queries(index: BlockIndex, samples: int, generator: torch.Generator | None) -> torch.Tensor:
    """``samples`` tokens of every block, int64 ``[NB, samples]``, for all heads alike; those of a short one repeat."""
    pick = (torch.rand(len(index.length), samples, generator=generator) * index.length.cpu()[:, None]).long()
    return index.tokens.gather(1, pick.to(index.tokens.device))


def sample_text(
    index: BlockIndex, samples: int, width: int, key_mask: torch.Tensor | None, generator: torch.Generator | None
) -> tuple[torch.Tensor, float]:
    """Text queries, ``samples`` for every ``width`` of them, padding left out; and how many each stands for."""
    text = index.text if key_mask is None else index.text[key_mask[index.text]]
    count = min(len(text), samples * -(-len(text) // width))
    pick = torch.randperm(len(text), generator=generator)[:count].to(text.device)
    return text[pick], len(text) / max(1, count)
