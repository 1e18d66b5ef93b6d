"""Patterns: rules from a grid and an order to the block pairs that are kept.

A pattern's parameters are latent units or fractions, so one pattern serves every resolution and length. It is
evaluated on blocks' boxes and runs, never on a token-by-token matrix; where a block is not a box the result covers it
(a pair that holds one wanted token pair is always kept). Patterns combine with ``|`` and ``&``.

Text is not a pattern's business: a layout keeps text rows and columns whatever the pattern says.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from diffsparse.grid import TokenGrid
from diffsparse.order import BlockPartition, RasterOrder, TokenOrder, stride_tokens

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "Band",
    "Bitmap",
    "Columns",
    "Diagonals",
    "Empty",
    "Full",
    "GridStripes",
    "Intersection",
    "Pattern",
    "Radial",
    "Sink",
    "TextColumns",
    "TextRows",
    "Union",
    "Window",
]

Extent = int | float | None


@dataclass(frozen=True)
class Pattern:
    """A set of kept (query block, key block) pairs on any grid."""

    kind: ClassVar[str] = ""

    def pairs(self, queries: BlockPartition, keys: BlockPartition) -> np.ndarray:
        """Kept pairs, bool ``[query blocks, key blocks]``; both partitions are of the same grid."""
        raise NotImplementedError

    def block_mask(self, grid: TokenGrid, order: TokenOrder, block_size: int) -> np.ndarray:
        """Kept pairs of visual blocks under one order, bool ``[num_blocks, num_blocks]``; text is left out."""
        blocks = order.partition(grid, block_size)
        return self.pairs(blocks, blocks)

    def preview(self, grid: TokenGrid, order: TokenOrder | None = None, block_size: int = 64) -> Image.Image:
        """A picture of the block mask, at least 256 pixels wide: queries down, keys to the right, kept pairs dark."""
        from PIL import Image

        mask = self.block_mask(grid, order or RasterOrder(), block_size)
        scale = max(1, -(-256 // mask.shape[0]))
        kept, dropped = np.array([27, 58, 107], np.uint8), np.array([238, 240, 244], np.uint8)
        return Image.fromarray(np.where(np.kron(mask, np.ones((scale, scale), bool))[..., None], kept, dropped))

    def __or__(self, other: Pattern) -> Pattern:
        return Union(_flatten(Union, self, other))

    def __and__(self, other: Pattern) -> Pattern:
        return Intersection(_flatten(Intersection, self, other))

    def __str__(self) -> str:
        return self.kind


def _flatten(kind: type, *patterns: Pattern) -> tuple[Pattern, ...]:
    parts: list[Pattern] = []
    for pattern in patterns:
        parts.extend(pattern.parts if isinstance(pattern, kind) else (pattern,))  # type: ignore[attr-defined]
    return tuple(parts)


def _same(value: bool, queries: BlockPartition, keys: BlockPartition) -> np.ndarray:
    return np.full((queries.num_blocks, keys.num_blocks), value)


@dataclass(frozen=True)
class Full(Pattern):
    """Every pair."""

    kind: ClassVar[str] = "full"

    def pairs(self, queries: BlockPartition, keys: BlockPartition) -> np.ndarray:
        return _same(True, queries, keys)


@dataclass(frozen=True)
class Empty(Pattern):
    """No visual pair: with a tail, attention over block summaries alone."""

    kind: ClassVar[str] = "empty"

    def pairs(self, queries: BlockPartition, keys: BlockPartition) -> np.ndarray:
        return _same(False, queries, keys)


@dataclass(frozen=True)
class TextRows(Pattern):
    """Text queries attend everything. Layouts do so by themselves; this pattern adds no visual pair."""

    kind: ClassVar[str] = "text_rows"

    def pairs(self, queries: BlockPartition, keys: BlockPartition) -> np.ndarray:
        return _same(False, queries, keys)


@dataclass(frozen=True)
class TextColumns(TextRows):
    """Everything attends text keys. Layouts do so by themselves; this pattern adds no visual pair."""

    kind: ClassVar[str] = "text_columns"


@dataclass(frozen=True)
class Union(Pattern):
    """Pairs that any part keeps."""

    parts: tuple[Pattern, ...]
    kind: ClassVar[str] = "union"

    def block_mask(self, grid: TokenGrid, order: TokenOrder, block_size: int) -> np.ndarray:
        return np.logical_or.reduce([part.block_mask(grid, order, block_size) for part in self.parts])

    def pairs(self, queries: BlockPartition, keys: BlockPartition) -> np.ndarray:
        return np.logical_or.reduce([part.pairs(queries, keys) for part in self.parts])

    def __str__(self) -> str:
        return " | ".join(str(p) for p in self.parts)


@dataclass(frozen=True)
class Intersection(Pattern):
    """Pairs that all parts keep."""

    parts: tuple[Pattern, ...]
    kind: ClassVar[str] = "intersection"

    def block_mask(self, grid: TokenGrid, order: TokenOrder, block_size: int) -> np.ndarray:
        return np.logical_and.reduce([part.block_mask(grid, order, block_size) for part in self.parts])

    def pairs(self, queries: BlockPartition, keys: BlockPartition) -> np.ndarray:
        return np.logical_and.reduce([part.pairs(queries, keys) for part in self.parts])

    def __str__(self) -> str:
        return " & ".join(f"({p})" if isinstance(p, Union) else str(p) for p in self.parts)


# -- windows -----------------------------------------------------------------------------------------------------------


def resolve_extent(extent: Extent, n: int) -> int:
    """Latent units of an extent on an axis of ``n``: an integer counts units, a float is a fraction, None is all."""
    if extent is None:
        return n
    units = max(1, round(extent * n)) if isinstance(extent, float) else extent
    return min(units, n)


def axis_neighbourhood(n: int, window: int, stride: int = 1, dilation: int = 1) -> np.ndarray:
    """Generalised neighbourhood attention along one axis: bool ``[n, n]`` (query, key).

    Queries of one stride group share their leader's window, which is shifted inwards at borders, so that every query
    has the same number of keys. With a dilation the rule holds inside each residue class. GNA (arXiv 2504.16922), 3.1.
    """
    allowed = np.zeros((n, n), bool)
    for residue in range(min(dilation, n)):
        members = np.arange(residue, n, dilation)
        m = len(members)
        w = min(window, m)
        left, right = w // 2, w // 2 + w % 2 - 1
        q = np.arange(m)
        leader = np.minimum(q // stride * stride + stride // 2, m - 1)
        centre = np.clip(leader, left, m - 1 - right)
        inside = (q[None] >= (centre - left)[:, None]) & (q[None] <= (centre + right)[:, None])
        allowed[np.ix_(members, members)] = inside
    return allowed


def _any_in_boxes(
    allowed: np.ndarray, q_low: np.ndarray, q_high: np.ndarray, k_low: np.ndarray, k_high: np.ndarray
) -> np.ndarray:
    """For intervals of queries and keys on one axis: is any (q, k) of the two in ``allowed``? bool ``[nq, nk]``."""
    table = np.zeros((allowed.shape[0] + 1, allowed.shape[1] + 1), np.int32)
    table[1:, 1:] = allowed.cumsum(0).cumsum(1)
    # Few distinct intervals occur on an axis, so the table is read once per distinct pair and spread out.
    q_pairs, q_index = np.unique(np.stack([q_low, q_high + 1], 1), axis=0, return_inverse=True)
    k_pairs, k_index = np.unique(np.stack([k_low, k_high + 1], 1), axis=0, return_inverse=True)
    rows = table[q_pairs[:, 1]] - table[q_pairs[:, 0]]
    hits = (rows[:, k_pairs[:, 1]] - rows[:, k_pairs[:, 0]]) > 0
    return hits[q_index.reshape(-1)][:, k_index.reshape(-1)]


def _separable_pairs(per_axis: list[np.ndarray], queries: BlockPartition, keys: BlockPartition) -> np.ndarray:
    """Pairs of a mask that is a product of per-axis masks: exact, as boxes are products too."""
    result: np.ndarray | None = None
    for axis, allowed in enumerate(per_axis):
        if allowed.all():
            continue
        q, k = queries.boxes[:, 2 * axis : 2 * axis + 2], keys.boxes[:, 2 * axis : 2 * axis + 2]
        hits = _any_in_boxes(allowed, q[:, 0], q[:, 1], k[:, 0], k[:, 1])
        result = hits if result is None else np.logical_and(result, hits, out=result)
    return _same(True, queries, keys) if result is None else queries.reduce_pairs(result, keys)


@dataclass(frozen=True)
class Window(Pattern):
    """Generalised neighbourhood attention: a window per axis, clamped at borders (GNA, arXiv 2504.16922, 3.1).

    ``size`` per axis ``(t, h, w)``: an integer in latent units, a float as a fraction of the axis, or None for all of
    it; more than the axis means all of it. ``stride``: queries in groups of so many share one window. ``dilation``: a
    query sees keys that many apart.
    """

    size: tuple[Extent, Extent, Extent]
    stride: tuple[int, int, int] = (1, 1, 1)
    dilation: tuple[int, int, int] = (1, 1, 1)
    kind: ClassVar[str] = "window"

    def __post_init__(self) -> None:
        for extent in self.size:
            if extent is None:
                continue
            if isinstance(extent, bool) or (isinstance(extent, float) and not 0 < extent <= 1) or extent <= 0:
                raise ValueError(f"a window's size is units >= 1, a fraction in (0, 1] or None; got {self.size}")
        for name in ("stride", "dilation"):
            if any(not isinstance(v, int) or v < 1 for v in getattr(self, name)):
                raise ValueError(f"a window's {name} must be integers of at least 1; got {getattr(self, name)}")

    def axis_masks(self, grid: TokenGrid) -> list[np.ndarray]:
        """Per axis, which keys each query sees: three bool ``[n, n]``."""
        return [
            axis_neighbourhood(n, resolve_extent(size, n), stride, dilation)
            for n, size, stride, dilation in zip(grid.shape, self.size, self.stride, self.dilation, strict=True)
        ]

    def pairs(self, queries: BlockPartition, keys: BlockPartition) -> np.ndarray:
        return _separable_pairs(self.axis_masks(queries.grid), queries, keys)

    def __str__(self) -> str:
        text = "x".join("all" if v is None else f"{v:g}" for v in self.size)
        if self.stride != (1, 1, 1):
            text += "/" + "x".join(map(str, self.stride))
        if self.dilation != (1, 1, 1):
            text += "*" + "x".join(map(str, self.dilation))
        return f"window({text})"


@dataclass(frozen=True)
class Diagonals(Pattern):
    """Multi-diagonals in latent space: keys whose offset from the query lies near one of ``offsets``.

    ``offsets``: ``(f, h, w)`` vectors in latent units, taken with both signs. ``half_width``: latent units per axis, a
    float as a fraction of the axis, None for no bound.
    """

    offsets: tuple[tuple[int, int, int], ...] = ((0, 0, 0),)
    half_width: tuple[Extent, Extent, Extent] = (0, 0, 0)
    kind: ClassVar[str] = "diagonals"

    def pairs(self, queries: BlockPartition, keys: BlockPartition) -> np.ndarray:
        result = _same(False, queries, keys)
        shape = queries.grid.shape
        widths = [
            n if e is None else (round(e * n) if isinstance(e, float) else e)
            for n, e in zip(shape, self.half_width, strict=True)
        ]
        signed = {tuple(s * v for v in offset) for offset in self.offsets for s in (1, -1)}
        for offset in sorted(signed):
            axes = [
                np.abs(np.arange(n)[None] - np.arange(n)[:, None] - shift) <= width
                for n, shift, width in zip(shape, offset, widths, strict=True)
            ]
            result |= _separable_pairs(axes, queries, keys)
        return result

    def __str__(self) -> str:
        return f"diagonals({len(self.offsets)})"


@dataclass(frozen=True)
class Band(Pattern):
    """A band around the diagonal of the ordered sequence: positions at most ``half_width`` of all visual tokens apart.

    Together with an axis order this is the multi-diagonal mask of Sparse-VideoGen and Sparse-vDiT (arXiv 2506.03065).
    """

    half_width: float
    kind: ClassVar[str] = "band"

    def __post_init__(self) -> None:
        if not 0 <= self.half_width <= 1:
            raise ValueError(f"a band's half_width is a fraction in [0, 1], got {self.half_width}")

    def pairs(self, queries: BlockPartition, keys: BlockPartition) -> np.ndarray:
        reach = self.half_width * queries.grid.num_visual
        q0, q1 = queries.start[:-1, None], queries.start[1:, None] - 1
        k0, k1 = keys.start[None, :-1], keys.start[None, 1:] - 1
        return np.maximum(np.maximum(k0 - q1, q0 - k1), 0) <= reach

    def __str__(self) -> str:
        return f"band({self.half_width:g})"


@dataclass(frozen=True)
class Columns(Pattern):
    """Vertical stripes: keys inside any of ``boxes`` are seen by every query.

    A box is ``(f0, f1, h0, h1, w0, w1)`` in fractions of the axes, upper ends exclusive.
    """

    boxes: tuple[tuple[float, float, float, float, float, float], ...]
    kind: ClassVar[str] = "columns"

    def __post_init__(self) -> None:
        for box in self.boxes:
            if len(box) != 6 or any(not 0 <= box[2 * a] < box[2 * a + 1] <= 1 for a in range(3)):
                raise ValueError(f"a column box is six fractions f0<f1, h0<h1, w0<w1 in [0, 1]; got {box}")

    def pairs(self, queries: BlockPartition, keys: BlockPartition) -> np.ndarray:
        hit = np.zeros(len(keys.boxes), bool)
        for box in self.boxes:
            inside = np.ones(len(keys.boxes), bool)
            for axis, n in enumerate(keys.grid.shape):
                # Rounded to 1e-9 so that k/n, written as a decimal fraction, lands on k again.
                low, high = np.floor(round(box[2 * axis] * n, 9)), np.ceil(round(box[2 * axis + 1] * n, 9)) - 1
                inside &= (keys.boxes[:, 2 * axis + 1] >= low) & (keys.boxes[:, 2 * axis] <= high)
            hit |= inside
        blocks = np.zeros(keys.num_blocks, bool)
        np.logical_or.at(blocks, keys.owner, hit)
        return np.broadcast_to(blocks, (queries.num_blocks, keys.num_blocks)).copy()

    def __str__(self) -> str:
        return f"columns({len(self.boxes)})"


def _block_any(flags: np.ndarray, blocks: BlockPartition) -> np.ndarray:
    """For a bool per token (row-major): does any token of each block have it? bool ``[num_blocks]``."""
    return np.logical_or.reduceat(flags[blocks.permutation], blocks.start[:-1])


@dataclass(frozen=True)
class Sink(Pattern):
    """Attention sink: the first ``frames`` frames, or the first ``tokens`` visual tokens, are keys of every query."""

    frames: int = 0
    tokens: int = 0
    kind: ClassVar[str] = "sink"

    def __post_init__(self) -> None:
        if min(self.frames, self.tokens) < 0 or (self.frames > 0) == (self.tokens > 0):
            raise ValueError(f"a sink is frames > 0 or tokens > 0, one of the two; got {self.frames}, {self.tokens}")

    def pairs(self, queries: BlockPartition, keys: BlockPartition) -> np.ndarray:
        n = self.tokens or self.frames * keys.grid.tokens_per_frame
        hit = _block_any(np.arange(keys.grid.num_visual) < n, keys)
        return np.broadcast_to(hit, (queries.num_blocks, keys.num_blocks)).copy()

    def __str__(self) -> str:
        return f"sink({self.frames} frames)" if self.frames else f"sink({self.tokens} tokens)"


@dataclass(frozen=True)
class GridStripes(Pattern):
    """The grid head of MMInference (arXiv 2504.16083, Algorithm 1).

    Tokens of one phase of a stride see all tokens, or are seen by all.

    Keeps (q, k) where ``k mod stride`` is a key phase or ``q mod stride`` is a query phase, in row-major token indices.
    ``stride`` as in :class:`PhaseOrder`; phases are fractions of the stride in ``[0, 1)``.
    """

    stride: int | str = "frame"
    key_phases: tuple[float, ...] = ()
    query_phases: tuple[float, ...] = ()
    kind: ClassVar[str] = "grid"

    def __post_init__(self) -> None:
        if not (self.stride in ("frame", "row") or (isinstance(self.stride, int) and self.stride >= 1)):
            raise ValueError(f"a grid's stride is 'frame', 'row' or an integer of at least 1; got {self.stride!r}")
        for phase in self.key_phases + self.query_phases:
            if not 0 <= phase < 1:
                raise ValueError(f"a grid's phases are fractions in [0, 1); got {phase}")

    def phase_tokens(self, phases: tuple[float, ...], grid: TokenGrid) -> np.ndarray:
        """Which tokens (row-major) lie on the given phases: bool ``[num_visual]``."""
        stride = stride_tokens(self.stride, grid)
        sites = [int(round(phase * stride, 9)) for phase in phases]
        return np.isin(np.arange(grid.num_visual) % stride, sites)

    def pairs(self, queries: BlockPartition, keys: BlockPartition) -> np.ndarray:
        rows = _block_any(self.phase_tokens(self.query_phases, queries.grid), queries)
        columns = _block_any(self.phase_tokens(self.key_phases, keys.grid), keys)
        return rows[:, None] | columns[None]

    def __str__(self) -> str:
        return f"grid({self.stride}, {len(self.query_phases)}q, {len(self.key_phases)}k)"


# -- radial ------------------------------------------------------------------------------------------------------------


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
            raise ValueError(f"radial's rule is 'paper' or 'code', got {self.rule!r}")
        if not 0 < self.decay <= 1 or self.sink_frames < 0 or self.min_span < 1:
            raise ValueError(f"radial needs 0 < decay <= 1, sink_frames >= 0, min_span >= 1; got {self}")

    def block_mask(self, grid: TokenGrid, order: TokenOrder, block_size: int) -> np.ndarray:
        if self.rule == "paper":
            return super().block_mask(grid, order, block_size)
        if not order.is_raster:
            raise ValueError(f"radial(rule='code') is defined on the raster order only, got {order}")
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
    k_begin = np.flatnonzero(np.diff(k_owner, prepend=-1))
    mask = np.zeros((queries.num_blocks, keys.num_blocks), bool)
    rows = max(1, 8_000_000 // len(k_owner))
    for lo in range(0, len(q_owner), rows):
        part = slice(lo, lo + rows)
        gap = np.maximum(k_first[None] - q_last[part, None], q_first[part, None] - k_last[None])
        kept = np.maximum(gap, 0) <= reach[np.abs(q_frame[part, None] - k_frame[None])]
        kept = np.logical_or.reduceat(kept, k_begin, axis=1)
        np.logical_or.at(mask, q_owner[part], kept)
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


# -- measured masks ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bitmap(Pattern):
    """A measured block mask, exact on the grid, order and block size it was measured on; elsewhere ``fallback`` runs.

    ``bits``: the bool ``[n, n]`` mask of visual blocks, row-major, eight to a byte, first pair in the highest bit.
    """

    grid: TokenGrid
    order: TokenOrder
    block_size: int
    bits: bytes = field(repr=False)
    fallback: Pattern = field(default_factory=Full)
    kind: ClassVar[str] = "bitmap"

    def __post_init__(self) -> None:
        n = self.order.partition(self.grid, self.block_size).num_blocks
        if len(self.bits) != -(-n * n // 8):
            raise ValueError(f"a bitmap of {n}x{n} blocks has {-(-n * n // 8)} bytes, got {len(self.bits)}")

    @classmethod
    def from_mask(
        cls, mask: np.ndarray, grid: TokenGrid, order: TokenOrder, block_size: int, fallback: Pattern | None = None
    ) -> Bitmap:
        """Pack a bool ``[n, n]`` mask of visual blocks."""
        n = order.partition(grid, block_size).num_blocks
        if mask.shape != (n, n):
            raise ValueError(f"the mask has shape {mask.shape}, {order} cuts {grid} into {n} blocks")
        bits = np.packbits(np.asarray(mask, bool).reshape(-1)).tobytes()
        return cls(grid.visual_only(), order, block_size, bits, fallback or Full())

    @property
    def mask(self) -> np.ndarray:
        """The mask, bool ``[n, n]``."""
        n = self.order.partition(self.grid, self.block_size).num_blocks
        return np.unpackbits(np.frombuffer(self.bits, np.uint8), count=n * n).reshape(n, n).astype(bool)

    def fits(self, grid: TokenGrid, order: TokenOrder, block_size: int) -> bool:
        """True where the bitmap itself runs, not its fallback."""
        return (grid.visual_only(), order, block_size) == (self.grid, self.order, self.block_size)

    def block_mask(self, grid: TokenGrid, order: TokenOrder, block_size: int) -> np.ndarray:
        return self.mask if self.fits(grid, order, block_size) else self.fallback.block_mask(grid, order, block_size)

    def pairs(self, queries: BlockPartition, keys: BlockPartition) -> np.ndarray:
        return self.fallback.pairs(queries, keys)

    def __str__(self) -> str:
        return f"bitmap({self.mask.mean():.3f})"


def uses_fallback(pattern: Pattern, grid: TokenGrid, order: TokenOrder, block_size: int) -> bool:
    """True where some bitmap inside ``pattern`` was measured elsewhere, so that its fallback runs on this grid."""
    if isinstance(pattern, Bitmap):
        return not pattern.fits(grid, order, block_size)
    return isinstance(pattern, (Union, Intersection)) and any(
        uses_fallback(part, grid, order, block_size) for part in pattern.parts
    )
