"""How tokens are cut into blocks: each head's order, where blocks begin, where text lies. Follows from the grid alone.

Each head reads the sequence in its own order, ``[text before | visual tokens in the head's order | text after]``.
Blocks never cross the borders between text and video, so blocks at borders may be short.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from diffsparse.grid import TokenGrid
from diffsparse.order import TokenOrder

__all__ = ["BLOCK_SIZES", "HeadSelection", "TokenLayout", "block_starts", "cut_tokens", "take_heads"]

BLOCK_SIZES = (64, 128)

#: Some of the heads: a slice, or their numbers.
HeadSelection = slice | Sequence[int]

# Kinds of blocks, in the order in which lists hold them.
TEXT_BEFORE, FULL, SHORT, TEXT_AFTER = range(4)


def take_heads(per_head: torch.Tensor, selection: HeadSelection, dim: int = 0) -> torch.Tensor:
    """Some heads of a tensor that has one place a head along ``dim``; of a slice without a step a view."""
    if isinstance(selection, slice):
        first, end, step = selection.indices(per_head.shape[dim])
        if step == 1:
            return per_head.narrow(dim, first, max(0, end - first))
        selection = range(first, end, step)
    index = torch.as_tensor(list(selection), dtype=torch.long, device=per_head.device)
    return per_head.index_select(dim, index)


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """The cut of one attention call. ``H`` heads, ``O`` distinct orders, ``S`` tokens.

    ``N`` is the largest number of blocks that any of the orders has; an order with fewer has empty ones at its end.

    gather: int32 ``[O, S]``; the model's token at each position of an order (text maps to itself).
    scatter: int32 ``[O, S]``; its inverse: the position of each token.
    block_start: int32 ``[O, N + 1]``; block ``i`` of order ``o`` is positions
        ``block_start[o, i] : block_start[o, i + 1]``.
    head_order: int32 ``[H]``; the order of each head.
    block_size: tokens of a full block.
    text_before, num_visual: tokens; the visual ones are positions ``text_before : text_before + num_visual``.
    needs_gather: whether any head has an order other than the model's. Kept beside the tensors, so that they need not
        be read back from a device; a plan may set it to what holds for all its layers, so that compiled code sees one
        value.
    shape: frames, rows and columns of the video; None where a kernel has the cut as tensors alone.
    """

    gather: torch.Tensor
    scatter: torch.Tensor
    block_start: torch.Tensor
    head_order: torch.Tensor
    block_size: int
    text_before: int
    num_visual: int
    needs_gather: bool
    shape: tuple[int, int, int] | None = None

    @property
    def num_heads(self) -> int:
        """``H``."""
        return self.head_order.shape[0]

    @property
    def num_blocks(self) -> int:
        """``N``, blocks of the order that has most."""
        return self.block_start.shape[1] - 1

    @property
    def seq_len(self) -> int:
        """``S``, all tokens of the call, text included."""
        return self.gather.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.gather.device

    @property
    def text_after(self) -> int:
        """Text tokens behind the video."""
        return self.seq_len - self.text_before - self.num_visual

    @property
    def text_blocks(self) -> tuple[int, int]:
        """How many blocks of text stand before and after the video."""
        return -(-self.text_before // self.block_size), -(-self.text_after // self.block_size)

    def to(self, device: torch.device | str) -> TokenLayout:
        """The same cut with its tensors on ``device``."""
        moved = {name: getattr(self, name).to(device) for name in ("gather", "scatter", "block_start", "head_order")}
        return replace(self, **moved)

    def heads(self, selection: HeadSelection) -> TokenLayout:
        """The same cut for some of its heads. All orders stay, so that their numbers hold."""
        return replace(self, head_order=take_heads(self.head_order, selection))

    def kinds(self) -> torch.Tensor:
        """The kind of every block, int64 ``[O, N]``, which is the order of lists.

        0 text before the video, 1 a full block of the video, 2 a short one, 3 text after it or an empty one at the end.
        """
        start, end = self.block_start[:, :-1], self.block_start[:, 1:]
        kinds = torch.where(end - start < self.block_size, SHORT, FULL)
        kinds = torch.where(start < self.text_before, TEXT_BEFORE, kinds)
        return torch.where(start >= self.text_before + self.num_visual, TEXT_AFTER, kinds)

    def ranks(self) -> torch.Tensor:
        """The blocks of each order as lists hold them: int64 ``[O, N]``, by kind, then ascending."""
        return self.kinds().argsort(dim=1, stable=True)

    def lengths(self) -> torch.Tensor:
        """Tokens of every block: int32 ``[O, N]``, 0 of an empty one."""
        return self.block_start.diff(dim=1)

    def visual_blocks(self, order: int) -> torch.Tensor:
        """Which blocks of an order hold visual tokens: bool ``[N]``."""
        start = self.block_start[order]
        inside = (start[:-1] >= self.text_before) & (start[:-1] < self.text_before + self.num_visual)
        return inside & (start.diff() > 0)

    def always_kept(self) -> torch.Tensor:
        """Pairs of blocks that every head keeps, because one of the two is text: bool ``[O, N, N]``."""
        kinds, real = self.kinds(), self.lengths() > 0
        text = real & ((kinds == TEXT_BEFORE) | (kinds == TEXT_AFTER))
        either = text[:, :, None] | text[:, None, :]
        return either & real[:, :, None] & real[:, None, :]


def block_starts(grid: TokenGrid, order: TokenOrder, block_size: int) -> np.ndarray:
    """Block borders of a whole sequence in one order, text included: int64 ``[num_blocks + 1]``."""
    before = np.arange(0, grid.text_before, block_size)
    visual = grid.text_before + order.starts(grid.visual_only(), block_size)
    end = grid.text_before + grid.num_visual
    after = (
        np.append(np.arange(end, grid.seq_len, block_size), grid.seq_len)
        if grid.text_after
        else np.array([grid.seq_len])
    )
    return np.concatenate([before, visual[:-1], after]).astype(np.int64)


def cut_tokens(
    grid: TokenGrid, head_orders: Sequence[TokenOrder], block_size: int = 64
) -> tuple[TokenLayout, tuple[TokenOrder, ...]]:
    """Cut a grid for heads of these orders. Returns the cut, and the distinct orders that its ``head_order`` counts.

    Raises ValueError where there is no head, or blocks of that size are not supported.
    """
    if not head_orders:
        raise ValueError("a layout needs at least one head entry")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {block_size}")
    orders = list(dict.fromkeys(head_orders))
    starts = [block_starts(grid, order, block_size) for order in orders]
    n = max(len(s) - 1 for s in starts)
    seq = grid.seq_len
    gather = np.empty((len(orders), seq), np.int64)
    scatter = np.empty_like(gather)
    for o, order in enumerate(orders):
        gather[o] = np.arange(seq)
        visual = order.permutation(grid.visual_only()) + grid.text_before
        gather[o, grid.text_before : grid.text_before + grid.num_visual] = visual
        scatter[o, gather[o]] = np.arange(seq)
    padded = np.stack([np.concatenate([s, np.full(n + 1 - len(s), seq)]) for s in starts])

    def int32(values: np.ndarray | list[int]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32))

    cut = TokenLayout(
        gather=int32(gather),
        scatter=int32(scatter),
        block_start=int32(padded),
        head_order=int32([orders.index(order) for order in head_orders]),
        block_size=block_size,
        text_before=grid.text_before,
        num_visual=grid.num_visual,
        needs_gather=any(not order.is_raster for order in orders),
        shape=grid.shape,
    )
    return cut, tuple(orders)
