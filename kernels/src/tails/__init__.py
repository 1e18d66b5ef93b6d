"""Tails: what stands for the blocks that a head drops. One file a tail, with its plain formula and its cost.

The plain formula is what the reference computes. What backends compute from whole tensors of blocks at a time is in
``kernels/src/summaries.py`` and in their own folders. :func:`register_tail` adds a tail from outside this package.
"""

from __future__ import annotations

import math

from diffsparse import tails as vocabulary
from diffsparse.kernels.tails.centroids import CENTROIDS
from diffsparse.kernels.tails.mean import MEAN
from diffsparse.kernels.tails.moments import MOMENTS
from diffsparse.kernels.tails.protocol import Tail

__all__ = ["Tail", "find_tail", "register_tail"]

_TAILS: dict[str, Tail] = {tail.name: tail for tail in (MEAN, MOMENTS, CENTROIDS)}


def find_tail(name: str) -> Tail | None:
    """The tail of that name; None of ``none`` and of what is not known."""
    return _TAILS.get(name)


def register_tail(tail: Tail, *, replace: bool = False) -> None:
    """Make a tail known by its name, so that entries and plan files can have it.

    The backend ``reference`` runs it by its plain formula, and so does a backend of your own that lists it. The others
    refuse it by its name, and ``backend="auto"`` passes them over.

    Raises:
        TypeError: something that :class:`Tail` asks for is missing.
        ValueError: the name is not an identifier or is taken (``replace=True`` replaces a registered one, never the
            library's own, whose kernels would not follow); the cost is not a positive number.
    """
    if not isinstance(tail, Tail):
        lacking = [name for name in ("cost", "name", "summaries") if not hasattr(tail, name)]
        raise TypeError(f"{type(tail).__name__} is not a tail: it lacks {', '.join(lacking)}")
    name, cost = tail.name, tail.cost
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"a tail's name is a word of letters, digits and _; got {name!r:.60}")
    if name in vocabulary.TAILS:
        raise ValueError(f"the tail {name!r} is the library's own; give yours another name")
    if name in _TAILS and not replace:
        raise ValueError(f"there is a tail {name!r} already; register_tail(..., replace=True) takes its place")
    if not isinstance(cost, (int, float)) or not 0 < cost < math.inf:
        raise ValueError(f"the cost of a tail is a positive number of rows; got {cost!r:.60}")
    _TAILS[name] = tail
    vocabulary.add_tail(name, float(cost))
