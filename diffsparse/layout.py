"""What a kernel eats: how tokens are cut, which pairs of blocks are computed, and what each head does with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from diffsparse.blocks import BlockIndex
from diffsparse.density import call_density
from diffsparse.entry import HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.heads import HeadSpec, describe_heads
from diffsparse.online import OnlineRepair
from diffsparse.order import TokenOrder
from diffsparse.picks import picks_of
from diffsparse.repair import HeadRepair
from diffsparse.selection import Budget
from diffsparse.tokens import HeadSelection, TokenLayout, cut_tokens

__all__ = ["BlockLayout", "build_layout", "head_block_mask"]


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """One attention call's blocks, in three parts.

    tokens: how its tokens are cut; depends on the grid and the heads' orders.
    index: which pairs of blocks are computed.
    heads: what each head does with them.
    grid, orders: what ``tokens`` was made from; ``tokens.head_order`` counts these orders.
    densities: of each head, executed query-key work over all query-key pairs of the call, with its tail and the exact
        rows of an online repair; empty where the index was made on the device, and the host has not read it back. Of
        a head whose blocks are picked from q and k (``heads.picks``) the most that its budget allows.
    """

    grid: TokenGrid
    orders: tuple[TokenOrder, ...]
    tokens: TokenLayout
    index: BlockIndex
    heads: HeadSpec
    densities: tuple[float, ...]

    @property
    def block_size(self) -> int:
        """Tokens of a full block."""
        return self.tokens.block_size

    @property
    def num_heads(self) -> int:
        """``H``."""
        return self.tokens.num_heads

    @property
    def num_blocks(self) -> int:
        """``N``, blocks of the order that has most; the row stride of the block lists."""
        return self.tokens.num_blocks

    @property
    def seq_len(self) -> int:
        """``S``, all tokens of the call, text included."""
        return self.tokens.seq_len

    @property
    def device(self) -> torch.device:
        """Where the layout's tensors are; q, k and v must be there too."""
        return self.index.device

    @property
    def density(self) -> float:
        """Executed query-key work over all query-key pairs of this call, mean over heads, tails counted."""
        return float(np.mean(self.densities))

    def to(self, device: torch.device | str) -> BlockLayout:
        """The same layout with its tensors on ``device``."""
        return replace(self, tokens=self.tokens.to(device), index=self.index.to(device), heads=self.heads.to(device))

    def of_heads(self, selection: HeadSelection) -> BlockLayout:
        """The layout of some heads, as one of several GPUs runs them."""
        numbers = range(self.num_heads)[selection] if isinstance(selection, slice) else selection
        return replace(
            self,
            tokens=self.tokens.heads(selection),
            index=self.index.heads(selection),
            heads=self.heads.heads(selection),
            densities=tuple(self.densities[h] for h in numbers) if self.densities else (),
        )

    def repaired(self, repair: HeadRepair | OnlineRepair) -> BlockLayout:
        """The same layout, whose output is corrected."""
        more = repair.density(self.grid) if isinstance(repair, OnlineRepair) else 0.0
        densities = tuple(min(1.0, density + more) for density in self.densities)
        return replace(self, heads=replace(self.heads, repair=repair), densities=densities)

    @property
    def is_packed(self) -> bool:
        """Whether the lists are kept as bits."""
        return self.index.is_packed

    def unpacked(self) -> BlockLayout:
        """The same layout with lists."""
        return replace(self, index=self.index.unpacked(self.tokens)) if self.is_packed else self

    def mask(self, head: int) -> torch.Tensor:
        """The kept blocks of one head as bool ``[N, N]`` on the CPU (empty blocks at the end are never kept)."""
        return self.index.heads(slice(head, head + 1)).mask()[0, 0].cpu()

    def token_mask(self, head: int) -> torch.Tensor:
        """The kept pairs of one head as bool ``[S, S]`` in the model's token order. For tests and pictures."""
        order = int(self.tokens.head_order[head])
        start = self.tokens.block_start[order].cpu().long()
        block_of = torch.repeat_interleave(torch.arange(self.num_blocks), start.diff())
        block_of = block_of[self.tokens.scatter[order].cpu().long()]
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


def _with_text(mask: np.ndarray, text_blocks: tuple[int, int]) -> np.ndarray:
    """The mask with the rows and columns of text kept: text is always exact, and kernels rely on finding it."""
    before, after = text_blocks
    if before == after == 0:
        return mask
    mask, rows = mask.copy(), len(mask)
    for text in (slice(0, before), slice(rows - after, rows)):
        mask[text] = True
        mask[:, text] = True
    return mask


def _fullest(mask: np.ndarray, lengths: np.ndarray, text_blocks: tuple[int, int], budget: Budget) -> np.ndarray:
    """What an online selection among the blocks of ``mask`` keeps at most; text stays."""
    before, after = text_blocks
    video = slice(before, len(mask) - after)
    most = mask.copy()
    most[video, video] = budget.fullest(mask[video, video], lengths[video])
    return most


def build_layout(
    grid: TokenGrid,
    entries: Sequence[HeadEntry],
    block_size: int = 64,
    *,
    masks: Sequence[np.ndarray] | None = None,
    packed: bool = False,
) -> BlockLayout:
    """Evaluate one layer's entries (one per head) on a grid.

    Lists of a head with an online selection hold the blocks that may be picked. ``masks`` replaces the entries'
    patterns by given block masks (bool ``[num_blocks, num_blocks]`` with text, whose rows and columns are kept whatever
    the masks say). ``packed``: bits instead of lists.
    """
    tokens, orders = cut_tokens(grid, [entry.order for entry in entries], block_size)
    n, order_of = tokens.num_blocks, tokens.head_order.tolist()
    lengths, ranks = tokens.lengths().numpy().astype(np.float64), tokens.ranks().numpy()
    rows_of = (lengths > 0).sum(1).tolist()
    bits = np.zeros((len(entries) if packed else 0, n, -(-n // 8)), np.uint8)
    known: dict[tuple[object, object], np.ndarray] = {}
    counts = np.zeros((len(entries), n), np.int64)
    columns: list[np.ndarray] = []
    densities: list[float] = []
    shares: list[float | None] = []
    for h, (entry, o) in enumerate(zip(entries, order_of)):
        rows = rows_of[o]
        if entry.execution.mode == "skip":
            densities.append(0.0)
            shares.append(None)
            continue
        if masks is not None:
            mask = np.asarray(masks[h], bool)
            if mask.shape != (rows, rows):
                raise ValueError(f"head {h}: the mask has shape {mask.shape}, the order has {rows} blocks")
            mask = _with_text(mask, tokens.text_blocks)
        else:
            key = (entry.order, entry.pattern)
            if key not in known:
                known[key] = head_block_mask(grid, entry, block_size)
            mask = known[key]
        counts[h, :rows] = np.count_nonzero(mask, axis=1)
        if packed:
            bits[h, :rows, : -(-rows // 8)] = np.packbits(mask, axis=1, bitorder="little")
        else:
            rank = ranks[o][ranks[o] < rows]
            columns.append(rank[np.nonzero(mask[:, rank])[1]])
        if entry.online is not None:
            mask = _fullest(mask, lengths[o][:rows], tokens.text_blocks, entry.online.budget)
        shares.append(None if entry.online is None else float(mask.mean()))
        densities.append(call_density(mask, lengths[o][:rows], entry.execution.tail))

    row_ptr = np.concatenate([[0], np.cumsum(counts.reshape(-1))]).astype(np.int32)
    lists = np.concatenate(columns).astype(np.int32) if columns else np.zeros(0, np.int32)
    col_idx = bits.reshape(1, -1, bits.shape[2]) if packed else lists
    return BlockLayout(
        grid=grid,
        orders=orders,
        tokens=tokens,
        index=BlockIndex(torch.from_numpy(row_ptr)[None], torch.from_numpy(col_idx), n),
        heads=replace(describe_heads(entries, tokens), picks=picks_of(entries, shares)),
        densities=tuple(densities),
    )
