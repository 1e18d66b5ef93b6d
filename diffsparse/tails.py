"""The names of tails: what a head may do with dropped blocks, its number in tables of heads, and what it costs.

What a tail computes is the business of ``diffsparse.kernels.tails``; here is as much as plans and layouts have to know.
"""

from __future__ import annotations

from collections.abc import Collection

__all__ = ["TAILS", "TAIL_COST", "add_tail", "measured_as", "tail_code", "tail_name", "tail_names"]

#: Those of this library, in the order of their numbers.
TAILS = ("none", "mean", "moments", "centroids")
#: Of every known tail, in units of one dense row, times the block size: one summary per key block (mean), plus the
#: second product over squared queries and variances (moments), or two summaries (centroids).
TAIL_COST = {"none": 0.0, "mean": 1.0, "moments": 1.5, "centroids": 2.0}


def tail_names() -> tuple[str, ...]:
    """Every known tail, in the order of their numbers."""
    return tuple(TAIL_COST)


def tail_code(name: str) -> int:
    """The number of a tail in ``HeadSpec.table``. Those of added ones hold in this process; files have names."""
    return tail_names().index(name)


def tail_name(code: int) -> str:
    """The tail with that number."""
    return tail_names()[code]


def add_tail(name: str, cost: float) -> None:
    """Make a name known, behind the others; of a known one that is not the library's, set the cost."""
    TAIL_COST[name] = cost


def measured_as(tail: str, measured: Collection[str]) -> str:
    """The tail whose measured times stand for those of ``tail``: its own, or the next costlier one's, or the costliest
    one's."""
    if tail in measured:
        return tail
    ascending = sorted(measured, key=lambda name: TAIL_COST[name])
    return next((name for name in ascending if TAIL_COST[name] >= TAIL_COST[tail]), ascending[-1])
