"""What several patterns need: extents on an axis, and masks that are products of one mask an axis."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from diffsparse.limits import MAX_INTEGER
from diffsparse.messages import shown
from diffsparse.order import BlockPartition
from diffsparse.patterns.base import same

__all__ = [
    "Extent",
    "block_any",
    "check_axes",
    "check_extents",
    "chunks",
    "is_fraction",
    "is_whole",
    "resolve_extent",
    "separable_pairs",
]

Extent = int | float | None

#: Elements of a matrix of pairs that is worked on at once.
_CACHED = 2**19


def is_whole(value: object, least: int = 0) -> bool:
    """An integer from ``least`` up to the largest that sizes may have; neither a boolean nor 64.0."""
    return type(value) is int and least <= value <= MAX_INTEGER


def is_fraction(value: object) -> bool:
    """A number in [0, 1]."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def check_axes(what: str, value: object, least: int) -> None:
    """Raise ValueError unless ``value`` is three integers of at least ``least``, one for each axis."""
    if not isinstance(value, tuple) or len(value) != 3 or not all(is_whole(v, least) for v in value):
        raise ValueError(f"{what} must be integers of at least {least}, one for each of (t, h, w); got {shown(value)}")


def check_extents(what: str, value: object, least: int) -> None:
    """Raise ValueError unless ``value`` is three extents: units of at least ``least``, fractions or None."""
    if not isinstance(value, tuple) or len(value) != 3:
        raise ValueError(f"{what} has three parts (t, h, w); got {shown(value)}")
    for extent in value:
        fraction = isinstance(extent, float) and is_fraction(extent) and (extent > 0 or least == 0)
        if not (extent is None or fraction or is_whole(extent, least)):
            span = "(0, 1]" if least else "[0, 1]"
            raise ValueError(f"{what} is units >= {least}, a fraction in {span} or None; got {shown(value)}")


def resolve_extent(extent: Extent, n: int) -> int:
    """Latent units of an extent on an axis of ``n``: an integer counts units, a float is a fraction, None is all."""
    if extent is None:
        return n
    units = max(1, round(extent * n)) if isinstance(extent, float) else extent
    return min(units, n)


def chunks(begin: np.ndarray, rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Ranges of blocks whose rows fill a matrix that a cache holds. ``begin``: each block's first of all ``rows``."""
    most, lo = max(1, _CACHED // max(1, columns)), 0
    ends = np.append(begin[1:], rows)
    while lo < len(begin):
        hi = max(lo + 1, int(np.searchsorted(ends, begin[lo] + most, side="right")))
        yield lo, hi
        lo = hi


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


def separable_pairs(per_axis: list[np.ndarray], queries: BlockPartition, keys: BlockPartition) -> np.ndarray:
    """Pairs of a mask that is a product of per-axis masks: exact, as boxes are products too."""
    result: np.ndarray | None = None
    for axis, allowed in enumerate(per_axis):
        if allowed.all():
            continue
        q, k = queries.boxes[:, 2 * axis : 2 * axis + 2], keys.boxes[:, 2 * axis : 2 * axis + 2]
        hits = _any_in_boxes(allowed, q[:, 0], q[:, 1], k[:, 0], k[:, 1])
        result = hits if result is None else np.logical_and(result, hits, out=result)
    return same(True, queries, keys) if result is None else queries.reduce_pairs(result, keys)


def block_any(flags: np.ndarray, blocks: BlockPartition) -> np.ndarray:
    """For a bool per token (row-major): does any token of each block have it? bool ``[num_blocks]``."""
    return np.logical_or.reduceat(flags[blocks.permutation], blocks.start[:-1])
