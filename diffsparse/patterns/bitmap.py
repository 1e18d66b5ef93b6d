"""Measured block masks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from diffsparse.carry import carry_mask
from diffsparse.grid import TokenGrid
from diffsparse.limits import MAX_BITMAP_BITS
from diffsparse.messages import shown
from diffsparse.order import BlockPartition, TokenOrder
from diffsparse.patterns.base import Pattern
from diffsparse.patterns.boxes import is_whole
from diffsparse.patterns.plain import Full

__all__ = ["Bitmap"]


@dataclass(frozen=True)
class Bitmap(Pattern):
    """A measured block mask: exact on the grid it was measured on, carried over to any other.

    On another grid each block takes the share of token pairs that the mask keeps where the block lies in the clip, and
    the best pairs are kept, up to the mask's density (``diffsparse.carry``). ``fallback`` is what an entry with another
    order than the mask's runs.

    ``bits``: the bool ``[n, n]`` mask of visual blocks, row-major, eight to a byte, first pair in the highest bit.
    """

    grid: TokenGrid
    order: TokenOrder
    block_size: int
    bits: bytes = field(repr=False)
    fallback: Pattern = field(default_factory=Full)
    kind: ClassVar[str] = "bitmap"

    def __post_init__(self) -> None:
        if not is_whole(self.block_size, 1):
            raise ValueError(f"a bitmap's block_size is an integer of at least 1, got {shown(self.block_size)}")
        n = self.num_blocks
        if n * n > MAX_BITMAP_BITS:
            raise ValueError(f"a bitmap has at most {MAX_BITMAP_BITS:,} pairs of blocks, got {n:,} x {n:,}")
        if len(self.bits) != -(-n * n // 8):
            raise ValueError(f"a bitmap of {n}x{n} blocks has {-(-n * n // 8)} bytes, got {len(self.bits)}")

    @classmethod
    def from_mask(
        cls, mask: np.ndarray, grid: TokenGrid, order: TokenOrder, block_size: int, fallback: Pattern | None = None
    ) -> Bitmap:
        """Pack a bool ``[n, n]`` mask of visual blocks."""
        n = order.num_blocks(grid, block_size)
        if mask.shape != (n, n):
            raise ValueError(f"the mask has shape {mask.shape}, {order} cuts {grid} into {n} blocks")
        bits = np.packbits(np.asarray(mask, bool).reshape(-1)).tobytes()
        return cls(grid.visual_only(), order, block_size, bits, fallback or Full())

    @property
    def num_blocks(self) -> int:
        """``n``, the visual blocks of the grid that the mask was measured on."""
        return self.order.num_blocks(self.grid, self.block_size)

    @property
    def mask(self) -> np.ndarray:
        """The mask, bool ``[n, n]``."""
        n = self.num_blocks
        return np.unpackbits(np.frombuffer(self.bits, np.uint8), count=n * n).reshape(n, n).astype(bool)

    def fits(self, grid: TokenGrid, order: TokenOrder, block_size: int) -> bool:
        """True where the mask runs as it was measured."""
        return (grid.visual_only(), order, block_size) == (self.grid, self.order, self.block_size)

    def block_mask(self, grid: TokenGrid, order: TokenOrder, block_size: int) -> np.ndarray:
        if self.fits(grid, order, block_size):
            return self.mask
        if order != self.order:
            return self.fallback.block_mask(grid, order, block_size)
        return carry_mask(self.mask, self.grid, grid.visual_only(), order, self.block_size, block_size)

    def pairs(self, queries: BlockPartition, keys: BlockPartition) -> np.ndarray:
        return self.fallback.pairs(queries, keys)

    def check_order(self, order: TokenOrder) -> None:
        self.fallback.check_order(order)

    def is_carried(self, grid: TokenGrid, order: TokenOrder, block_size: int) -> bool:
        return not self.fits(grid, order, block_size)

    def parameters(self) -> list[tuple[str, Any]]:
        inner = [(f"fallback: {name}", value) for name, value in self.fallback.parameters()]
        measured = f"{self.grid}, blocks of {self.block_size}"
        return [("measured on", measured), ("fallback", str(self.fallback)), *inner]

    def __str__(self) -> str:
        return f"bitmap({self.mask.mean():.3f})"


PATTERNS = (Bitmap,)
