"""Which pairs of blocks are computed: for every head and query block its kept key blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from diffsparse.tokens import HeadSelection, TokenLayout, take_heads

__all__ = ["BlockIndex", "pack_bits", "unpack_bits", "with_text"]


@dataclass(frozen=True, eq=False)
class BlockIndex:
    """Block lists of one attention call. ``B`` is 1 or the batch, ``H`` heads, ``N`` blocks of each head's order.

    One set of lists (``B = 1``) serves all items of a batch; a rule that reads q and k may give each item its own.

    row_ptr: int32 ``[B, H * N + 1]``; key blocks of query block ``i`` of head ``h`` of item ``b`` are
        ``col_idx[row_ptr[b, h * N + i] : row_ptr[b, h * N + i + 1]]``: text before the video, full blocks of the video,
        short ones, text after it; each of these ascending (see ``TokenLayout.kinds``).
    col_idx: int32, at least as long as the lists; what lies outside them is not read. Of a packed index uint8
        ``[B, H * N, ceil(N / 8)]`` instead: block ``j`` of a row is kept where bit ``j % 8`` of byte ``j // 8`` is set.
        That takes 1 / (32 * density) of the memory, and kernels make the lists from it call by call, item by item:
        so pointers of a packed index begin at 0 for every item.
    num_blocks: ``N``.
    """

    row_ptr: torch.Tensor
    col_idx: torch.Tensor
    num_blocks: int

    @property
    def batch(self) -> int:
        """``B``: 1, or the items of the batch, each with lists of its own."""
        return self.row_ptr.shape[0]

    @property
    def num_heads(self) -> int:
        """``H``."""
        return (self.row_ptr.shape[1] - 1) // self.num_blocks

    @property
    def device(self) -> torch.device:
        """Where the lists are."""
        return self.col_idx.device

    @property
    def is_packed(self) -> bool:
        """Whether ``col_idx`` holds bits instead of lists."""
        return self.col_idx.dtype == torch.uint8

    @property
    def nbytes(self) -> int:
        """Memory of the lists."""
        return self.row_ptr.nbytes + self.col_idx.nbytes

    @classmethod
    def from_mask(cls, mask: torch.Tensor, tokens: TokenLayout) -> BlockIndex:
        """A packed index of kept blocks, bool ``[H, N, N]`` or ``[B, H, N, N]``, made where the mask is.

        Text is kept whatever the mask says, and blocks that an order does not have are left out. Nothing is read back
        from the device, so a rule may call this in the middle of a generation.
        """
        n = tokens.num_blocks
        if mask.ndim not in (3, 4) or mask.shape[-3:] != (tokens.num_heads, n, n) or mask.dtype != torch.bool:
            raise ValueError(
                f"a block mask is bool [heads, N, N] or [batch, heads, N, N], here with {tokens.num_heads} heads and "
                f"N = {n}; got {str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}"
            )
        if mask.device != tokens.device:
            raise ValueError(f"the block mask is on {mask.device}, the token layout on {tokens.device}")
        return cls._from_final_mask(with_text(mask[None] if mask.ndim == 3 else mask, tokens))

    @classmethod
    def _from_final_mask(cls, mask: torch.Tensor) -> BlockIndex:
        batch, heads, n, _ = mask.shape
        counts = mask.sum(3, dtype=torch.int32).view(batch, heads * n)
        row_ptr = torch.nn.functional.pad(counts.cumsum(1, dtype=torch.int32), (1, 0))
        return cls(row_ptr, pack_bits(mask).view(batch, heads * n, -1), n)

    def to(self, device: torch.device | str) -> BlockIndex:
        """The same lists on ``device``."""
        return replace(self, row_ptr=self.row_ptr.to(device), col_idx=self.col_idx.to(device))

    def item(self, b: int) -> BlockIndex:
        """The lists of one item of the batch; lists that serve all items are returned as they are."""
        if self.batch == 1:
            return self
        bits = self.col_idx[b : b + 1] if self.is_packed else self.col_idx
        return replace(self, row_ptr=self.row_ptr[b : b + 1], col_idx=bits)

    def heads(self, selection: HeadSelection) -> BlockIndex:
        """The lists of some heads: of a slice without a step a view, else packed anew. Reads nothing back."""
        n = self.num_blocks
        if isinstance(selection, slice):
            first, end, step = selection.indices(self.num_heads)
            if step == 1 and first < end:
                ptr = self.row_ptr[:, first * n : end * n + 1]
                if self.is_packed:
                    return replace(self, row_ptr=ptr - ptr[:, :1], col_idx=self.col_idx[:, first * n : end * n])
                return replace(self, row_ptr=ptr)
            selection = range(first, end, step)
        if not len(selection):
            raise ValueError("a layout needs at least one head")
        return self._from_final_mask(take_heads(self.mask(), selection, dim=1))

    def without(self, heads: torch.Tensor) -> BlockIndex:
        """The same index, packed, where these heads, bool ``[H]``, keep nothing."""
        return self._from_final_mask(self.mask() & ~heads[None, :, None, None])

    def transposed(self) -> BlockIndex:
        """The keys' view, packed: for every key block the query blocks that keep it."""
        return self._from_final_mask(self.mask().transpose(2, 3))

    def mask(self) -> torch.Tensor:
        """The kept blocks as bool ``[B, H, N, N]``, made where the lists are without reading them back.

        Blocks that an order does not have are never kept.
        """
        n, rows = self.num_blocks, self.row_ptr.shape[1] - 1
        if self.is_packed:
            return unpack_bits(self.col_idx, n).view(self.batch, -1, n, n)
        entry = torch.arange(self.col_idx.shape[0], dtype=torch.int32, device=self.device)
        kept = torch.zeros(self.batch, rows + 1, n, dtype=torch.bool, device=self.device)
        for b, ptr in enumerate(self.row_ptr.contiguous()):
            # Entries outside this item's lists fall on the row behind the last. What stands there may be anything.
            row = torch.searchsorted(ptr, entry, right=True, out_int32=True) - 1
            inside = (row >= 0) & (row < rows)
            row = torch.where(inside, row, rows)
            column = torch.where(inside, self.col_idx, 0)
            kept[b].view(-1).index_fill_(0, row.long() * n + column, True)
        return kept[:, :rows].reshape(self.batch, -1, n, n)

    def unpacked(self, tokens: TokenLayout) -> BlockIndex:
        """The same index with lists. Reads their lengths back: kernels make lists by themselves, without that."""
        if not self.is_packed:
            return self
        rank = tokens.ranks()[tokens.head_order.long()]  # [H, N]
        lists = []
        for bits in self.col_idx:
            for blocks, own in zip(bits.view(rank.shape[0], self.num_blocks, -1), rank):
                kept = unpack_bits(blocks, self.num_blocks)[:, own]
                lists.append(own.expand_as(kept)[kept])
        length = self.row_ptr[:, -1]
        begin = length.cumsum(0, dtype=torch.int32) - length  # one item's lists behind another's
        return replace(self, row_ptr=self.row_ptr + begin[:, None], col_idx=torch.cat(lists).to(torch.int32))


def with_text(mask: torch.Tensor, tokens: TokenLayout) -> torch.Tensor:
    """A block mask ``[..., H, N, N]`` with text kept, and without blocks that a head's order does not have."""
    order = tokens.head_order.long()
    real = (tokens.lengths() > 0)[order]  # [H, N]
    return (mask | tokens.always_kept()[order]) & (real[:, :, None] & real[:, None, :])


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """Bool ``[..., N]`` as uint8 ``[..., ceil(N / 8)]``: element ``j`` is bit ``j % 8`` of byte ``j // 8``."""
    spare = -mask.shape[-1] % 8
    eights = torch.nn.functional.pad(mask, (0, spare)).unflatten(-1, (-1, 8)).to(torch.uint8)
    return (eights << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(bits: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """The inverse of :func:`pack_bits`: bool ``[..., num_blocks]``."""
    single = bits[..., None] >> torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (single & 1).flatten(-2)[..., :num_blocks].bool()
