"""Token orders: bijections on the visual tokens, and how each is cut into blocks.

A block is the unit a kernel keeps or drops. In a tile order whose tile holds exactly ``block_size`` tokens each tile is
one block; every other order is cut into runs of ``block_size``, the last one short.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np

from diffsparse.grid import TokenGrid
from diffsparse.limits import MAX_INTEGER
from diffsparse.messages import shown

__all__ = [
    "AxisOrder",
    "BlockPartition",
    "CurveOrder",
    "PhaseOrder",
    "RasterOrder",
    "TileOrder",
    "TokenOrder",
    "parse_order",
]

AXES = "FHW"
# A block that does not fall into a few boxes is treated as its bounding box: patterns then keep a little more, never
# less.
MAX_BOXES_PER_BLOCK = 8


@dataclass(frozen=True)
class BlockPartition:
    """The visual tokens of a grid, in some order, cut into blocks.

    ``permutation``: int64 ``[num_visual]``; the token (row-major index) at each position of the order.
    ``start``: int64 ``[num_blocks + 1]``; positions where blocks begin.
    ``boxes``: int32 ``[num_boxes, 6]`` as ``(f0, f1, h0, h1, w0, w1)``, ends inclusive; together they cover each block.
    ``owner``: int64 ``[num_boxes]``, ascending; the block each box belongs to.
    """

    grid: TokenGrid
    permutation: np.ndarray
    start: np.ndarray
    boxes: np.ndarray
    owner: np.ndarray

    @property
    def num_blocks(self) -> int:
        return len(self.start) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens in each block, int64 ``[num_blocks]``."""
        return np.diff(self.start)

    def reduce_pairs(self, pairs: np.ndarray, keys: BlockPartition) -> np.ndarray:
        """Fold a bool matrix over (query box, key box) into one over (query block, key block) by "any"."""
        if len(self.owner) != self.num_blocks:
            pairs = np.logical_or.reduceat(pairs, np.flatnonzero(np.diff(self.owner, prepend=-1)), axis=0)
        if len(keys.owner) != keys.num_blocks:
            pairs = np.logical_or.reduceat(pairs, np.flatnonzero(np.diff(keys.owner, prepend=-1)), axis=1)
        return pairs


def _merge_runs(coords: np.ndarray) -> list[tuple[int, int, int, int, int, int]]:
    """Cover a set of tokens (int ``[n, 3]``, raster-sorted) with boxes: runs along W, merged along H, then along F."""
    runs: list[list[int]] = []
    for f, h, w in coords.tolist():
        if runs and runs[-1][0] == f and runs[-1][2] == h and runs[-1][5] == w - 1:
            runs[-1][5] = w
        else:
            runs.append([f, f, h, h, w, w])
    for low, high, same in ((2, 3, (0, 1, 4, 5)), (0, 1, (2, 3, 4, 5))):
        merged: list[list[int]] = []
        open_boxes: dict[tuple[int, ...], list[int]] = {}
        for box in runs:
            key = tuple(box[i] for i in same)
            previous = open_boxes.get(key)
            if previous is not None and previous[high] == box[low] - 1:
                previous[high] = box[high]
            else:
                merged.append(box)
                open_boxes[key] = box
        runs = merged
    return [tuple(box) for box in runs]  # type: ignore[misc]


def _partition(grid: TokenGrid, permutation: np.ndarray, start: np.ndarray) -> BlockPartition:
    coords = grid.coordinates()
    boxes: list[tuple[int, ...]] = []
    owner: list[int] = []
    for block in range(len(start) - 1):
        tokens = np.sort(permutation[start[block] : start[block + 1]])
        inside = coords[tokens]
        low, high = inside.min(0), inside.max(0)
        if int(np.prod(high - low + 1)) == len(tokens):
            covering: list[tuple[int, ...]] = [(low[0], high[0], low[1], high[1], low[2], high[2])]
        else:
            covering = list(_merge_runs(inside))
            if len(covering) > MAX_BOXES_PER_BLOCK:
                covering = [(low[0], high[0], low[1], high[1], low[2], high[2])]
        boxes.extend(covering)
        owner.extend([block] * len(covering))
    return BlockPartition(grid, permutation, start, np.asarray(boxes, np.int32), np.asarray(owner, np.int64))


def _runs(n: int, block_size: int) -> np.ndarray:
    return np.append(np.arange(0, n, block_size, dtype=np.int64), n)


@dataclass(frozen=True)
class TokenOrder:
    """A bijection on the visual tokens of any grid. Text keeps its place around them."""

    kind: ClassVar[str] = ""

    def permutation(self, grid: TokenGrid) -> np.ndarray:
        """The row-major token at each position of the order, int64 ``[num_visual]``."""
        raise NotImplementedError

    def starts(self, grid: TokenGrid, block_size: int) -> np.ndarray:
        """Positions (in visual tokens) where blocks begin, and the end: int64 ``[num_blocks + 1]``."""
        return _runs(grid.num_visual, block_size)

    def num_blocks(self, grid: TokenGrid, block_size: int) -> int:
        """How many blocks :meth:`partition` makes, without making them."""
        return -(-grid.num_visual // block_size)

    def partition(self, grid: TokenGrid, block_size: int) -> BlockPartition:
        """The blocks of this order; text is left out."""
        if type(block_size) is not int or block_size < 1:
            raise ValueError(f"block_size must be an integer of at least 1, got {shown(block_size)}")
        return _cached_partition(self, grid.visual_only(), block_size)

    @property
    def is_raster(self) -> bool:
        """True where the order is the model's own, so that nothing has to be gathered."""
        return False

    def __str__(self) -> str:
        return self.kind


# A pure function of frozen values; the cache is small because partitions of long videos hold some megabytes.
@lru_cache(maxsize=64)
def _cached_partition(order: TokenOrder, grid: TokenGrid, block_size: int) -> BlockPartition:
    return _partition(grid, order.permutation(grid), order.starts(grid, block_size))


@dataclass(frozen=True)
class RasterOrder(TokenOrder):
    """The model's own order: frames, rows, columns."""

    kind: ClassVar[str] = "raster"

    def permutation(self, grid: TokenGrid) -> np.ndarray:
        return np.arange(grid.num_visual, dtype=np.int64)

    @property
    def is_raster(self) -> bool:
        return True


@dataclass(frozen=True)
class AxisOrder(TokenOrder):
    """One of the six axis orders, slowest axis first: ``HWF`` makes each site's frames neighbours.

    PAROAttention (arXiv 2506.16054), section 3.
    """

    axes: str
    kind: ClassVar[str] = "axis"

    def __post_init__(self) -> None:
        if not isinstance(self.axes, str) or sorted(self.axes) != sorted(AXES):
            raise ValueError(
                f"an axis order is a permutation of FHW (FHW, FWH, HWF, HFW, WHF, WFH), got {shown(self.axes)}"
            )

    def permutation(self, grid: TokenGrid) -> np.ndarray:
        index = np.arange(grid.num_visual, dtype=np.int64).reshape(grid.shape)
        return index.transpose([AXES.index(a) for a in self.axes]).reshape(-1)

    @property
    def is_raster(self) -> bool:
        return self.axes == AXES

    def __str__(self) -> str:
        return self.axes


@dataclass(frozen=True)
class TileOrder(TokenOrder):
    """Tiles of ``(t, h, w)`` tokens one after another, row-major inside and outside; tiles at the far borders are cut.

    Sliding Tile Attention (arXiv 2502.04507) and GNA (arXiv 2504.16922) permute tokens so.
    """

    t: int
    h: int
    w: int
    kind: ClassVar[str] = "tile"

    def __post_init__(self) -> None:
        sides = (self.t, self.h, self.w)
        if any(type(side) is not int or not 1 <= side <= MAX_INTEGER for side in sides):
            raise ValueError(f"tile sizes must be integers of at least 1, got {shown(sides)}")

    def _tile_ids(self, grid: TokenGrid) -> np.ndarray:
        tiles = -(-np.array(grid.shape) // (self.t, self.h, self.w))
        f, h, w = (grid.coordinates() // np.array([self.t, self.h, self.w])).T.astype(np.int64)
        return (f * tiles[1] + h) * tiles[2] + w

    def permutation(self, grid: TokenGrid) -> np.ndarray:
        return np.argsort(self._tile_ids(grid), kind="stable")

    def starts(self, grid: TokenGrid, block_size: int) -> np.ndarray:
        if self.t * self.h * self.w != block_size:
            return _runs(grid.num_visual, block_size)
        counts = np.bincount(self._tile_ids(grid))
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def num_blocks(self, grid: TokenGrid, block_size: int) -> int:
        if self.t * self.h * self.w != block_size:
            return super().num_blocks(grid, block_size)
        return math.prod(-(-n // side) for n, side in zip(grid.shape, (self.t, self.h, self.w)))

    def __str__(self) -> str:
        return f"tile({self.t},{self.h},{self.w})"


@dataclass(frozen=True)
class PhaseOrder(TokenOrder):
    """Token n goes to ``(n mod stride, n div stride)``: tokens a stride apart become neighbours.

    ``stride`` is a number of tokens, or ``"frame"`` or ``"row"`` for the tokens of one frame or row of the grid at
    hand. MMInference (arXiv 2504.16083), Algorithm 1.
    """

    stride: int | str
    kind: ClassVar[str] = "phase"

    def __post_init__(self) -> None:
        if not (self.stride in ("frame", "row") or (type(self.stride) is int and 1 <= self.stride <= MAX_INTEGER)):
            raise ValueError(
                f"a phase order's stride is 'frame', 'row' or an integer of at least 1, got {shown(self.stride)}"
            )

    def permutation(self, grid: TokenGrid) -> np.ndarray:
        index = np.arange(grid.num_visual, dtype=np.int64)
        return np.argsort(index % stride_tokens(self.stride, grid), kind="stable")

    def __str__(self) -> str:
        return f"phase({self.stride})"


def stride_tokens(stride: int | str, grid: TokenGrid) -> int:
    """Tokens of a stride given as a number, ``"frame"`` or ``"row"``."""
    return {"frame": grid.tokens_per_frame, "row": grid.width}[stride] if isinstance(stride, str) else stride


@dataclass(frozen=True)
class CurveOrder(TokenOrder):
    """Along a Hilbert curve through the smallest power-of-two cube that holds the grid, cut down to the grid.

    Skilling, "Programming the Hilbert curve", AIP Conf. Proc. 707 (2004).
    """

    kind: ClassVar[str] = "curve"

    def permutation(self, grid: TokenGrid) -> np.ndarray:
        bits = max(1, int(max(grid.shape) - 1).bit_length())
        return np.argsort(_hilbert_index(grid.coordinates().astype(np.int64), bits), kind="stable")


def _hilbert_index(coords: np.ndarray, bits: int) -> np.ndarray:
    """Distance along the Hilbert curve of points int64 ``[n, dims]`` in a cube of side ``2 ** bits``."""
    x = coords.copy()
    dims = x.shape[1]
    q = 1 << (bits - 1)
    while q > 1:
        low = q - 1
        for i in range(dims):
            flip = (x[:, i] & q) != 0
            swap = np.where(flip, 0, (x[:, 0] ^ x[:, i]) & low)
            x[:, 0] = np.where(flip, x[:, 0] ^ low, x[:, 0] ^ swap)
            if i:
                x[:, i] ^= swap
        q >>= 1
    for i in range(1, dims):
        x[:, i] ^= x[:, i - 1]
    t = np.zeros(len(x), np.int64)
    q = 1 << (bits - 1)
    while q > 1:
        t = np.where((x[:, dims - 1] & q) != 0, t ^ (q - 1), t)
        q >>= 1
    x ^= t[:, None]
    index = np.zeros(len(x), np.int64)
    for bit in range(bits - 1, -1, -1):
        for i in range(dims):
            index = (index << 1) | ((x[:, i] >> bit) & 1)
    return index


@lru_cache(maxsize=256)
def parse_order(text: str) -> TokenOrder:
    """Read the form that ``str(order)`` writes: ``raster``, ``HWF``, ``tile(1,8,8)``, ``phase(frame)``, ``curve``."""
    text = text.strip()
    if text == "raster":
        return RasterOrder()
    if text == "curve":
        return CurveOrder()
    if sorted(text) == sorted(AXES):
        return AxisOrder(text)
    if match := re.fullmatch(r"tile\(([0-9]{1,10}), *([0-9]{1,10}), *([0-9]{1,10})\)", text):
        return TileOrder(*(int(g) for g in match.groups()))
    if match := re.fullmatch(r"phase\((frame|row|[0-9]{1,10})\)", text):
        stride = match.group(1)
        return PhaseOrder(int(stride) if stride.isdigit() else stride)
    raise ValueError(
        f"unknown token order {shown(text)}; allowed: raster, FHW..WFH, tile(t,h,w), phase(frame|row|n), curve"
    )
