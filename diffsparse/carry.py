"""A block mask that was measured on one grid, carried over to another.

Tokens are matched by where they lie in the clip: token ``i`` of ``n`` along an axis covers the part from ``i / n`` to
``(i + 1) / n`` of it. A pair of blocks of the new grid gets the share of its token pairs that the old mask keeps. The
pairs with the largest shares are kept, as many as give the old mask's density.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from diffsparse.grid import TokenGrid
from diffsparse.order import BlockPartition, TokenOrder

__all__ = ["best_pairs", "block_shares", "carry_mask"]

# Shares are ranked in steps this fine.
_LEVELS = 1 << 12


def carry_mask(
    mask: np.ndarray,
    source: TokenGrid,
    target: TokenGrid,
    order: TokenOrder,
    block_size: int,
    target_block_size: int | None = None,
) -> np.ndarray:
    """The mask on another grid, bool ``[n, n]`` of the visual blocks of ``target`` in the same order.

    mask: bool ``[m, m]`` of the visual blocks of ``source``, cut into blocks of ``block_size``.
    target_block_size: None is the same.

    Its density (kept pairs of tokens over all pairs) is the old one's, or above it by less than one pair of blocks for
    each row: where all old rows keep a block, all new ones do.
    """
    old = order.partition(source, block_size)
    new = order.partition(target, block_size if target_block_size is None else target_block_size)
    if mask.shape != (old.num_blocks, old.num_blocks):
        raise ValueError(f"the mask has shape {mask.shape}, {order} cuts {source} into {old.num_blocks} blocks")
    lengths = old.lengths.astype(np.float64)
    density = float(lengths @ mask @ lengths) / lengths.sum() ** 2
    if density in (0.0, 1.0):
        return np.full((new.num_blocks, new.num_blocks), bool(density))
    shares = _shares(old, new)
    score = shares @ mask.astype(np.float32) @ shares.T
    lengths = new.lengths.astype(np.float64)
    kept = best_pairs(score, lengths, density * lengths.sum() ** 2)
    if mask.any(1).all():
        kept[np.arange(new.num_blocks), score.argmax(1)] = True
    return kept


def block_shares(source: TokenGrid, target: TokenGrid, order: TokenOrder, block_size: int) -> np.ndarray:
    """Share of each block of ``target`` that lies in each block of ``source``, float32 ``[n, m]``; rows sum to 1."""
    return _shares(order.partition(source, block_size), order.partition(target, block_size))


def best_pairs(score: np.ndarray, lengths: np.ndarray, wanted: float) -> np.ndarray:
    """The pairs with the largest scores (float, at most 1), up to ``wanted`` pairs of tokens: bool ``[n, n]``."""
    level = np.clip(score * _LEVELS, 0, _LEVELS).astype(np.int32)
    work = np.bincount(level.reshape(-1), np.outer(lengths, lengths).reshape(-1), _LEVELS + 1)
    above = np.cumsum(work[::-1])[::-1]  # of this level and all above it
    edge = int(np.searchsorted(-above, -wanted, side="right")) - 1  # the lowest level that is needed
    kept: np.ndarray = level > edge
    # Of pairs that score alike some are kept, spread evenly: in the order of their index the first rows would get all.
    tied = np.flatnonzero(level.reshape(-1) == edge)
    tied = tied[np.random.default_rng(0).permutation(len(tied))]
    rows, columns = np.divmod(tied, len(lengths))
    left = wanted - (above[edge + 1] if edge < _LEVELS else 0.0)
    fits = np.cumsum(lengths[rows] * lengths[columns]) <= left + 0.5
    kept[rows[fits], columns[fits]] = True
    return kept


def _shares(old: BlockPartition, new: BlockPartition) -> np.ndarray:
    """Share of each new block that lies in each old one, float32 ``[new blocks, old blocks]``; rows sum to 1."""
    pair = np.zeros(1, np.int64), np.zeros(1, np.int64)
    weight = np.ones(1)
    # Row-major token numbers of both grids, one axis after another.
    for n, m in zip(new.grid.shape, old.grid.shape, strict=True):
        i, j, share = _overlaps(n, m)
        pair = tuple(np.add.outer(p * size, k).reshape(-1) for p, size, k in zip(pair, (n, m), (i, j), strict=True))  # type: ignore[assignment]
        weight = np.multiply.outer(weight, share).reshape(-1)
    rows, columns = _blocks_of_tokens(new)[pair[0]], _blocks_of_tokens(old)[pair[1]]
    total = np.bincount(rows * old.num_blocks + columns, weight, new.num_blocks * old.num_blocks)
    shares = total.reshape(new.num_blocks, old.num_blocks) / new.lengths[:, None]
    return shares.astype(np.float32)


def _blocks_of_tokens(partition: BlockPartition) -> np.ndarray:
    """The block of each token (row-major), int64 ``[num_visual]``."""
    blocks = np.empty(len(partition.permutation), np.int64)
    blocks[partition.permutation] = np.repeat(np.arange(partition.num_blocks), partition.lengths)
    return blocks


@lru_cache(maxsize=256)
def _overlaps(target: int, source: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Target tokens, the source tokens under them along one axis, and which share of the target token each takes."""
    # In units of 1 / (target * source) all ends are integers.
    begin = np.maximum.outer(np.arange(target) * source, np.arange(source) * target)
    end = np.minimum.outer(np.arange(1, target + 1) * source, np.arange(1, source + 1) * target)
    i, j = np.nonzero(end > begin)
    return i, j, (end - begin)[i, j] / source
