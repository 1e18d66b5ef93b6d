"""What every pattern has: its kept pairs on a grid, a picture, a name and its parameters for readers."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from diffsparse.grid import TokenGrid
from diffsparse.order import BlockPartition, RasterOrder, TokenOrder

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Pattern", "same"]


@dataclass(frozen=True)
class Pattern:
    """A set of kept (query block, key block) pairs on any grid.

    A pattern of your own is a frozen dataclass with a ``kind``, which is its name in plan files, and :meth:`pairs`;
    :func:`diffsparse.register_pattern` makes it known to the reader of plans. Its fields are the parameters.
    """

    kind: ClassVar[str] = ""

    def pairs(self, queries: BlockPartition, keys: BlockPartition) -> np.ndarray:
        """Kept pairs, bool ``[query blocks, key blocks]``; both partitions are of the same grid."""
        raise NotImplementedError

    def block_mask(self, grid: TokenGrid, order: TokenOrder, block_size: int) -> np.ndarray:
        """Kept pairs of visual blocks under one order, bool ``[num_blocks, num_blocks]``; text is left out."""
        blocks = order.partition(grid, block_size)
        return self.pairs(blocks, blocks)

    def check_order(self, order: TokenOrder) -> None:
        """Raise ValueError where the pattern has no meaning on this order."""

    def is_carried(self, grid: TokenGrid, order: TokenOrder, block_size: int) -> bool:
        """True where a bitmap in this pattern was measured on another grid, from which it is carried over."""
        return False

    # -- for readers -----------------------------------------------------------------------------------------------

    @property
    def family(self) -> str:
        """The kind, or the kinds of the parts."""
        return self.kind

    def parameters(self) -> list[tuple[str, Any]]:
        """Names and values of the parameters, those of parts included, as a reader wants them."""
        return [(f.name.replace("_", " "), getattr(self, f.name)) for f in fields(self)]

    def preview(self, grid: TokenGrid, order: TokenOrder | None = None, block_size: int = 64) -> Image.Image:
        """A picture of the block mask, at least 256 pixels wide: queries down, keys to the right, kept pairs dark."""
        from PIL import Image

        mask = self.block_mask(grid, order or RasterOrder(), block_size)
        scale = max(1, -(-256 // mask.shape[0]))
        kept, dropped = np.array([27, 58, 107], np.uint8), np.array([238, 240, 244], np.uint8)
        return Image.fromarray(np.where(np.kron(mask, np.ones((scale, scale), bool))[..., None], kept, dropped))

    def __or__(self, other: Pattern) -> Pattern:
        from diffsparse.patterns.combined import Union

        return Union.of(self, other)

    def __and__(self, other: Pattern) -> Pattern:
        from diffsparse.patterns.combined import Intersection

        return Intersection.of(self, other)

    def __str__(self) -> str:
        return self.kind


def same(value: bool, queries: BlockPartition, keys: BlockPartition) -> np.ndarray:
    """Every pair, or none: bool ``[query blocks, key blocks]``."""
    return np.full((queries.num_blocks, keys.num_blocks), value)
