"""Radial attention."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np

from diffsparse.grid import TokenGrid
from diffsparse.messages import shown
from diffsparse.order import BlockPartition, TokenOrder
from diffsparse.patterns.base import Pattern
from diffsparse.patterns.boxes import chunks, is_fraction, is_whole

__all__ = ["Radial"]


@dataclass(frozen=True)
class Radial(Pattern):
    """Radial attention (arXiv 2506.19852): the spatial window halves each time the distance in frames doubles.

    ``rule="paper"``: section 4, equation 5, on any order. With frame distance d and D = 2^floor(log2 max(d, 1)), keep
    spatial indices with ``|k - l| + 1 <= s / D``, and where D > s only ``k = l`` in every ceil(D/s)-th frame.
    ``rule="code"``: what the published code computes, on the raster order: half width
    ``max(decay * base(d), min_span)`` with base(d) = 2^(floor(log2 s) - floor(log2 d)), whole frames up to d = 1,
    thinned frames once base falls below ``min_span``, and a block kept where enough of its columns are covered.
    ``sink_frames``: the first frames are keys of every query.

    On a grid of one frame, an image, rows take the place of frames: the further apart two rows are, the closer two
    tokens must lie across them. ``sink_frames`` are then its first rows.
    """

    decay: float = 1.0
    rule: str = "paper"
    sink_frames: int = 0
    min_span: int = 128
    kind: ClassVar[str] = "radial"

    def __post_init__(self) -> None:
        if self.rule not in ("paper", "code"):
            raise ValueError(f"radial's rule is 'paper' or 'code', got {shown(self.rule)}")
        if not (
            is_fraction(self.decay) and self.decay > 0 and is_whole(self.sink_frames) and is_whole(self.min_span, 1)
        ):
            got = shown((self.decay, self.sink_frames, self.min_span))
            raise ValueError(f"radial needs 0 < decay <= 1, integers sink_frames >= 0 and min_span >= 1; got {got}")

    def check_order(self, order: TokenOrder) -> None:
        if self.rule == "code" and not order.is_raster:
            raise ValueError(f"radial(rule='code') is defined on the raster order only, got {order}")

    def block_mask(self, grid: TokenGrid, order: TokenOrder, block_size: int) -> np.ndarray:
        if self.rule == "paper":
            return super().block_mask(grid, order, block_size)
        self.check_order(order)
        return _radial_code_mask(self, *_slices(grid), block_size)

    def pairs(self, queries: BlockPartition, keys: BlockPartition) -> np.ndarray:
        if self.rule == "code":
            raise ValueError("radial(rule='code') has no token rule; use block_mask")
        return _radial_paper_pairs(queries, keys, self.decay, self.sink_frames)

    def __str__(self) -> str:
        return f"radial({self.rule}, {self.decay:g}" + (f", sink {self.sink_frames})" if self.sink_frames else ")")


def _slices(grid: TokenGrid) -> tuple[int, int]:
    """How many frames there are and tokens in each; of an image, rows."""
    return (grid.frames, grid.tokens_per_frame) if grid.frames > 1 else (grid.height, grid.width)


def _frame_segments(blocks: BlockPartition) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Blocks as runs of consecutive indices inside one frame (of an image: row): ``owner, frame, first, last``."""
    _, s = _slices(blocks.grid)
    block = np.repeat(np.arange(blocks.num_blocks), blocks.lengths)
    order = np.lexsort((blocks.permutation, block))
    token, block = blocks.permutation[order], block[order]
    begins = np.ones(len(token), bool)
    begins[1:] = (np.diff(token) != 1) | (np.diff(block) != 0) | (token[1:] % s == 0)
    if begins.sum() > 16 * blocks.num_blocks:  # scattered blocks: one covering run per frame
        begins[1:] = (np.diff(token // s) != 0) | (np.diff(block) != 0)
    first = np.flatnonzero(begins)
    last = np.append(first[1:], len(token)) - 1
    return block[first], token[first] // s, token[first] % s, token[last] % s


def _radial_paper_pairs(queries: BlockPartition, keys: BlockPartition, decay: float, sink: int) -> np.ndarray:
    frames, s = _slices(queries.grid)
    distance = np.arange(frames)
    doubling = 2 ** np.floor(np.log2(np.maximum(distance, 1))).astype(np.int64)
    # Largest |k - l| kept at each frame distance; -1 where the whole frame pair is dropped.
    reach = np.where(doubling <= s, np.floor(decay * s / doubling).astype(np.int64) - 1, -1)
    reach = np.where(distance <= 1, np.maximum(reach, int(decay * s) - 1), reach)
    on_site = (doubling > s) & (distance % -(-doubling // s) == 0)
    reach = np.maximum(reach, np.where(on_site | (doubling <= s), 0, -1))
    q_owner, q_frame, q_first, q_last = _frame_segments(queries)
    k_owner, k_frame, k_first, k_last = _frame_segments(keys)
    q_begin, k_begin = (np.flatnonzero(np.diff(owner, prepend=-1)) for owner in (q_owner, k_owner))
    # Of a query in each frame: the runs' ends, moved by how far it sees; none of a frame pair that is dropped.
    sees = reach[np.abs(np.arange(frames)[:, None] - k_frame)]
    nearest = np.where(sees < 0, s, k_first - sees).astype(np.int32)
    farthest = np.where(sees < 0, -1, k_last + sees).astype(np.int32)
    q_first, q_last = q_first.astype(np.int32)[:, None], q_last.astype(np.int32)[:, None]
    mask = np.empty((queries.num_blocks, keys.num_blocks), bool)
    for lo, hi in chunks(q_begin, len(q_owner), len(k_owner)):
        part = slice(q_begin[lo], q_begin[hi] if hi < len(q_begin) else None)
        kept = (nearest[q_frame[part]] <= q_last[part]) & (farthest[q_frame[part]] >= q_first[part])
        kept = np.logical_or.reduceat(kept, q_begin[lo:hi] - q_begin[lo], axis=0)
        mask[lo:hi] = np.logical_or.reduceat(kept, k_begin, axis=1)
    mask[:, k_owner[k_frame < sink]] = True
    return mask


@lru_cache(maxsize=32)
def _radial_code_mask(pattern: Radial, frames: int, s: int, block: int) -> np.ndarray:
    """The published code's block map for the raster order, bool ``[num_blocks, num_blocks]``."""
    n = -(-frames * s // block)
    mask = np.zeros((n, n), bool)
    seen: dict[tuple[int, int, int], np.ndarray] = {}
    for i in range(frames):
        for j in range(frames):
            distance = abs(i - j)
            base = 2 ** ((s.bit_length() - 1) - (distance.bit_length() - 1)) if distance else s
            if j < pattern.sink_frames or distance <= 1:
                width = s
            else:
                # Where a frame's share is thinner than min_span, only every so many-th frame is kept, at min_span.
                every = pattern.min_span if base < 1 else int(pattern.min_span // base)
                if base < pattern.min_span and distance % every:
                    continue
                width = int(max(pattern.decay * base, pattern.min_span))
            row, column = i * s % block, j * s % block
            key = (width, row, column)
            if key not in seen:
                seen[key] = _covered_blocks(s, width, row, column, block)
            part = seen[key]
            r, c = i * s // block, j * s // block
            mask[r : r + part.shape[0], c : c + part.shape[1]] |= part
    mask.setflags(write=False)
    return mask


def _covered_blocks(s: int, width: int, row_offset: int, column_offset: int, block: int) -> np.ndarray:
    """Blocks of one frame pair's band ``|k - l| <= width`` that are covered well enough to be kept.

    A column of a block counts as covered if more than a third of the block's rows are in the band, and a block is kept
    if more than 0.6 of its touched columns are covered.
    """
    rows = -(-(row_offset + s) // block)
    columns = -(-(column_offset + s) // block)
    top = np.maximum(np.arange(rows) * block - row_offset, 0)[:, None]
    bottom = np.minimum((np.arange(rows) + 1) * block - row_offset, s)[:, None]
    key = np.arange(s)[None]
    count = np.maximum(np.minimum(bottom, key + width + 1) - np.maximum(top, key - width), 0)
    edges = np.maximum(np.arange(columns) * block - column_offset, 0)
    covered = np.add.reduceat(count > block / 3, edges, axis=1)
    touched = np.add.reduceat(count > 0, edges, axis=1)
    return (touched > 0) & (covered > 0.6 * touched)


PATTERNS = (Radial,)
