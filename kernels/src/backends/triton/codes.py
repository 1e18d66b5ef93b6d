"""The numbers by which device code knows what heads do, as constants for Triton and Gluon.

They follow from the vocabulary: the order of ``entry.TAILS`` and ``entry.NUMERICS``, the columns of ``HeadSpec.table``.
"""

from __future__ import annotations

import triton.language as tl

from diffsparse import entry, heads

__all__ = [
    "IN_AUTO",
    "TAIL_CENTROIDS",
    "COLUMNS",
    "IN_FP8",
    "GATHERED_COLUMN",
    "IN_INT8",
    "TAIL_MEAN",
    "TAIL_MOMENTS",
    "TAIL_NONE",
    "RAGGED",
    "SKIP_COLUMN",
    "TAIL_COLUMN",
]


def _tail(name: str) -> tl.constexpr:
    return tl.constexpr(entry.TAILS.index(name))


def _numerics(name: str) -> tl.constexpr:
    return tl.constexpr(entry.NUMERICS.index(name))


TAIL_NONE, TAIL_MEAN = _tail("none"), _tail("mean")
TAIL_MOMENTS, TAIL_CENTROIDS = _tail("moments"), _tail("centroids")
IN_AUTO, IN_INT8, IN_FP8 = _numerics("auto"), _numerics("int8"), _numerics("fp8")
SKIP_COLUMN, TAIL_COLUMN = tl.constexpr(heads.SKIP), tl.constexpr(heads.TAIL)
GATHERED_COLUMN = tl.constexpr(heads.GATHERED)
#: Of a row of the table.
COLUMNS = tl.constexpr(4)
#: In the column ``GATHERED_COLUMN``: an order of the head's own, with short blocks inside the video.
RAGGED = tl.constexpr(2)
