"""What heads may choose where outputs of earlier steps can be used again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from diffsparse.search.drift import Hold
from diffsparse.search.options import Option, prune

__all__ = ["reusing", "with_reuse"]


def reusing(options: list[Option], late: Mapping[float, float]) -> list[Option]:
    """Each option with every way to use its outputs again. ``late``: the error of each ``reuse`` by itself.

    What a sparse call gets wrong and what changes until a later step are taken to have nothing to do with each other,
    so that their squares add up.
    """
    return [
        replace(option, error=option.error + error, reuse=reuse)
        for option in options
        if option.kind != "skip"
        for reuse, error in late.items()
    ]


def with_reuse(
    options: list[Option],
    cost: Callable[[Option], float],
    holds: list[Hold],
    calls: np.ndarray,
    late: np.ndarray,
    roomy: bool,
) -> tuple[list[Option], np.ndarray, np.ndarray]:
    """Those options, and the same with outputs that are used again, with errors and prices over a phase's calls.

    ``calls``: of the model in each of the phase's steps. ``late``: squared error of an output at each step, per squared
    fall of the noise level since it was computed. ``roomy``: there is room for the outputs of all heads.
    """
    share = {hold.reuse: float(calls[list(hold.computed)].sum() / calls.sum()) for hold in holds}
    late = np.where(np.isfinite(late), late, 1e300)
    errors = {hold.reuse: float(np.sum(late[hold.since > 0] * hold.since[hold.since > 0] ** 2)) for hold in holds}

    def price(option: Option) -> float:
        return cost(option) * share.get(option.reuse, 1.0)

    more = reusing(options, errors)
    if roomy:
        return prune(options + more, price)
    # There may be no room for all that would be best, so that no other option is left aside for it.
    more = prune(more, price)[0]
    both = sorted(options + more, key=lambda o: (price(o), o.error))
    return both, np.array([o.error for o in both]), np.array([price(o) for o in both])
