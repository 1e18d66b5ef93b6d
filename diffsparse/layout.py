"""What a kernel eats: for every head the kept key blocks of every query block.

Positions: each head reads the sequence in its own order, ``[text before | visual tokens in the head's order | text
after]``. Blocks never cross the borders between text and video, so blocks at borders may be short.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from diffsparse.entry import NUMERICS, TAILS, HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.order import TokenOrder

__all__ = ["BLOCK_SIZES", "BlockLayout", "block_kinds", "build_layout", "head_block_mask", "unpack", "unpack_bits"]

BLOCK_SIZES = (64, 128)
# Cost of a tail in units of one dense row, times the block size: one summary per key block (mean), plus the second
# product over squared queries and variances (moments), or two summaries (centroids).
TAIL_COST = {"none": 0.0, "mean": 1.0, "moments": 1.5, "centroids": 2.0}


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """Block lists of all heads of one attention call. ``H`` heads, ``O`` distinct orders, ``S`` tokens.

    ``N`` is the largest number of blocks that any of the orders has; an order with fewer has empty ones at its end.

    gather: int32 ``[O, S]``; the model's token at each position of an order (text maps to itself).
    scatter: int32 ``[O, S]``; its inverse: the position of each token.
    block_start: int32 ``[O, N + 1]``; block ``i`` of order ``o`` is positions
        ``block_start[o, i] : block_start[o, i + 1]``.
    head_order: int32 ``[H]``; the order of each head.
    row_ptr: int32 ``[H * N + 1]``; key blocks of query block ``i`` of head ``h`` are
        ``col_idx[row_ptr[h * N + i] : row_ptr[h * N + i + 1]]``: text before the video, full blocks of the video,
        short ones, text after it; each of these ascending.
    col_idx: int32 ``[nnz]``. Of a packed layout uint8 ``[H * N, ceil(N / 8)]`` instead: block ``j`` of a row is kept
        where bit ``j % 8`` of byte ``j // 8`` is set. That takes 1 / (32 * density) of the memory, and kernels make the
        lists from it call by call.
    head_mode: int32 ``[H, 4]``: skip (0 or 1), tail (index in ``entry.TAILS``), numerics (index in ``entry.NUMERICS``),
        gathered (0 where the head's order is the model's own, 2 where it has short blocks inside the video, else 1).
    has_tail, needs_gather, numerics: whether any head has a tail or an order other than the model's, and the numerics
        in use. Kept beside the tensors so that nobody has to read them back from a device; a plan may set them to what
        holds for all its layers, so that compiled code sees one value.
    """

    grid: TokenGrid
    block_size: int
    orders: tuple[TokenOrder, ...]
    gather: torch.Tensor
    scatter: torch.Tensor
    block_start: torch.Tensor
    head_order: torch.Tensor
    row_ptr: torch.Tensor
    col_idx: torch.Tensor
    head_mode: torch.Tensor
    densities: tuple[float, ...]
    has_tail: bool
    needs_gather: bool
    numerics: tuple[str, ...]

    @property
    def num_heads(self) -> int:
        """``H``."""
        return self.head_order.shape[0]

    @property
    def max_blocks(self) -> int:
        """``N``, the row stride of the block lists."""
        return self.block_start.shape[1] - 1

    @property
    def seq_len(self) -> int:
        """``S``, all tokens of the call, text included."""
        return self.gather.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the layout's tensors are; q, k and v must be there too."""
        return self.col_idx.device

    @property
    def density(self) -> float:
        """Executed query-key work over all query-key pairs of this call, mean over heads, tails counted."""
        return float(np.mean(self.densities))

    def to(self, device: torch.device | str) -> BlockLayout:
        """The same layout with its tensors on ``device``."""
        moved = {
            f.name: getattr(self, f.name).to(device)
            for f in fields(self)
            if isinstance(getattr(self, f.name), torch.Tensor)
        }
        return replace(self, **moved)

    @property
    def is_packed(self) -> bool:
        """Whether ``col_idx`` holds bits instead of lists."""
        return self.col_idx.dtype == torch.uint8

    def unpacked(self) -> BlockLayout:
        """The same layout with lists."""
        if not self.is_packed:
            return self
        text_before, num_visual = self.grid.text_before, self.grid.num_visual
        lists = unpack(self.col_idx, self.block_start, self.head_order, self.block_size, text_before, num_visual)
        return replace(self, col_idx=lists)

    def mask(self, head: int) -> torch.Tensor:
        """The kept blocks of one head as bool ``[N, N]`` on the CPU (empty blocks at the end are never kept)."""
        if self.is_packed:
            return unpack_bits(self.col_idx, self.max_blocks, head).cpu()
        n = self.max_blocks
        ptr = self.row_ptr[head * n : (head + 1) * n + 1].cpu().long()
        kept = torch.zeros(n, n, dtype=torch.bool)
        rows = torch.repeat_interleave(torch.arange(n), ptr.diff())
        kept[rows, self.col_idx[int(ptr[0]) : int(ptr[-1])].cpu().long()] = True
        return kept

    def token_mask(self, head: int) -> torch.Tensor:
        """The kept pairs of one head as bool ``[S, S]`` in the model's token order. For tests and pictures."""
        order = int(self.head_order[head])
        start = self.block_start[order].cpu().long()
        block_of = torch.repeat_interleave(torch.arange(self.max_blocks), start.diff())
        block_of = block_of[self.scatter[order].cpu().long()]
        return self.mask(head)[block_of][:, block_of]


def head_block_mask(grid: TokenGrid, entry: HeadEntry, block_size: int) -> np.ndarray:
    """Kept blocks of one head, text rows and columns included: bool ``[num_blocks, num_blocks]``."""
    visual = entry.pattern.block_mask(grid, entry.order, block_size)
    before, after = (-(-n // block_size) for n in (grid.text_before, grid.text_after))
    if before == after == 0:
        return visual
    n = before + visual.shape[0] + after
    mask = np.ones((n, n), bool)
    mask[before : n - after, before : n - after] = visual
    return mask


def _block_starts(grid: TokenGrid, order: TokenOrder, block_size: int) -> np.ndarray:
    """Block borders of a whole sequence, text included: int64 ``[num_blocks + 1]``."""
    before = np.arange(0, grid.text_before, block_size)
    visual = grid.text_before + order.starts(grid.visual_only(), block_size)
    end = grid.text_before + grid.num_visual
    after = (
        np.append(np.arange(end, grid.seq_len, block_size), grid.seq_len)
        if grid.text_after
        else np.array([grid.seq_len])
    )
    return np.concatenate([before, visual[:-1], after]).astype(np.int64)


def block_kinds(block_start: torch.Tensor, block_size: int, text_before: int, num_visual: int) -> torch.Tensor:
    """The order of lists: of blocks ``[..., N + 1]`` their kinds ``[..., N]``.

    0 text before the video, 1 a full block of the video, 2 a short one, 3 text after it or an empty one at the end.
    """
    start, end = block_start[..., :-1], block_start[..., 1:]
    kinds = torch.where(end - start < block_size, 2, 1)
    kinds = torch.where(start < text_before, 0, kinds)
    return torch.where(start >= text_before + num_visual, 3, kinds)


def unpack_bits(bits: torch.Tensor, num_blocks: int, head: int) -> torch.Tensor:
    """One head's part of a packed layout's ``col_idx`` as bool ``[N, N]``."""
    rows = bits[head * num_blocks : (head + 1) * num_blocks]
    single = rows[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=rows.device)
    return (single & 1).flatten(1)[:, :num_blocks].bool()


def unpack(
    bits: torch.Tensor,
    block_start: torch.Tensor,
    head_order: torch.Tensor,
    block_size: int,
    text_before: int,
    num_visual: int,
) -> torch.Tensor:
    """The lists, int32 ``[nnz]``, of a packed layout's ``col_idx``; all arguments are as in ``BlockLayout``."""
    rank = block_kinds(block_start, block_size, text_before, num_visual).argsort(dim=1, stable=True)
    lists = []
    for head, order in enumerate(head_order.tolist()):
        kept = unpack_bits(bits, rank.shape[1], head)[:, rank[order]]
        lists.append(rank[order].expand_as(kept)[kept])
    return torch.cat(lists).to(torch.int32)


def build_layout(
    grid: TokenGrid,
    entries: Sequence[HeadEntry],
    block_size: int = 64,
    *,
    masks: Sequence[np.ndarray] | None = None,
    packed: bool = False,
) -> BlockLayout:
    """Evaluate one layer's entries (one per head) on a grid.

    ``masks`` replaces the entries' patterns by given block masks (bool ``[num_blocks, num_blocks]`` with text, whose
    rows and columns are kept whatever the masks say). ``packed``: bits instead of lists.
    """
    if not entries:
        raise ValueError("a layout needs at least one head entry")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {block_size}")
    orders: list[TokenOrder] = []
    for entry in entries:
        if entry.order not in orders:
            orders.append(entry.order)
    starts = [_block_starts(grid, order, block_size) for order in orders]
    n = max(len(s) - 1 for s in starts)
    seq = grid.seq_len
    gather = np.empty((len(orders), seq), np.int64)
    scatter = np.empty_like(gather)
    for o, order in enumerate(orders):
        gather[o] = np.arange(seq)
        gather[o, grid.text_before : grid.text_before + grid.num_visual] = (
            order.permutation(grid.visual_only()) + grid.text_before
        )
        scatter[o, gather[o]] = np.arange(seq)

    ranks = []
    for border in starts:
        kinds = block_kinds(torch.from_numpy(border), block_size, grid.text_before, grid.num_visual)
        ranks.append(kinds.argsort(stable=True).numpy())
    bits = np.zeros((len(entries) if packed else 0, n, -(-n // 8)), np.uint8)
    cache: dict[tuple[object, object], np.ndarray] = {}
    counts = np.zeros((len(entries), n), np.int64)
    columns: list[np.ndarray] = []
    densities: list[float] = []
    head_order = [orders.index(entry.order) for entry in entries]
    for h, entry in enumerate(entries):
        border = starts[head_order[h]]
        rows = len(border) - 1
        if entry.execution.mode == "skip":
            densities.append(0.0)
            continue
        if masks is not None:
            mask = np.asarray(masks[h], bool)
            if mask.shape != (rows, rows):
                raise ValueError(f"head {h}: the mask has shape {mask.shape}, the order has {rows} blocks")
            # Text is always exact, and kernels rely on finding it in every list.
            before, after = (-(-t // block_size) for t in (grid.text_before, grid.text_after))
            if before or after:
                mask = mask.copy()
                for text in (slice(0, before), slice(rows - after, rows)):
                    mask[text] = True
                    mask[:, text] = True
        else:
            key = (entry.order, entry.pattern)
            if key not in cache:
                cache[key] = head_block_mask(grid, entry, block_size)
            mask = cache[key]
        counts[h, :rows] = np.count_nonzero(mask, axis=1)
        if packed:
            bits[h, :rows, : -(-rows // 8)] = np.packbits(mask, axis=1, bitorder="little")
        else:
            rank = ranks[head_order[h]]
            columns.append(rank[np.nonzero(mask[:, rank])[1]])
        length = np.diff(border).astype(np.float64)
        kept = float(length @ mask @ length) / seq**2
        tail = TAIL_COST[entry.execution.tail] * rows / seq if not mask.all() else 0.0
        densities.append(min(1.0, kept + tail))

    def int32(values: np.ndarray | list[int]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32))

    padded = np.stack([np.concatenate([s, np.full(n + 1 - len(s), seq)]) for s in starts])
    short_inside = [
        int((np.diff(order.starts(grid.visual_only(), block_size))[:-1] < block_size).any()) for order in orders
    ]
    mode = [
        [
            int(e.execution.mode == "skip"),
            TAILS.index(e.execution.tail),
            NUMERICS.index(e.execution.numerics),
            0 if e.order.is_raster else 1 + short_inside[o],
        ]
        for e, o in zip(entries, head_order)
    ]
    return BlockLayout(
        grid=grid,
        block_size=block_size,
        orders=tuple(orders),
        gather=int32(gather),
        scatter=int32(scatter),
        block_start=int32(padded),
        head_order=int32(head_order),
        row_ptr=int32(np.concatenate([[0], np.cumsum(counts.reshape(-1))])),
        col_idx=torch.from_numpy(bits.reshape(-1, bits.shape[2]))
        if packed
        else int32(np.concatenate(columns) if columns else np.zeros(0)),
        head_mode=int32(np.asarray(mode)),
        densities=tuple(densities),
        has_tail=any(e.execution.tail != "none" for e in entries),
        needs_gather=any(not e.order.is_raster for e in entries),
        numerics=tuple(n for n in NUMERICS if any(e.execution.numerics == n for e in entries)),
    )
