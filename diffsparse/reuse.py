"""Outputs that are used again: how long an attention output serves, by noise level and never by step index.

What a head puts out changes slowly from step to step. A head with a ``reuse`` of ``r`` is computed at the first step
of a phase, and again once the noise level has fallen by ``r``; the steps between take what was computed last. So a run
with more steps computes as often, and one whose steps are longer than ``r`` computes at every step. (Using attention
outputs again over steps is Pyramid Attention Broadcast's idea, arXiv 2408.12588; there by step index, for layers.)

A dense step ends what serves, in the middle of a phase too: its own outputs are not kept, and the next step computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

__all__ = ["computed_steps", "serves", "stretches"]


def serves(computed_at: float, level: float, reuse: float) -> bool:
    """Whether an output that was computed at one noise level still serves at another one.

    >>> serves(0.9, 0.85, reuse=0.1), serves(0.9, 0.8, reuse=0.05), serves(0.8, 0.9, reuse=0.5)
    (True, False, False)
    """
    return 0 <= computed_at - level < reuse


def computed_steps(levels: Sequence[float], reuse: float) -> list[bool]:
    """Which steps of a phase compute a head's output, by their descending noise levels.

    >>> computed_steps([0.9, 0.8, 0.7, 0.6], reuse=0.15)
    [True, False, True, False]
    """
    found: list[bool] = []
    last: float | None = None
    for level in levels:
        again = last is not None and serves(last, level, reuse)
        found.append(not again)
        last = last if again else level
    return found


def stretches(phases: Sequence[int | None]) -> list[tuple[int, list[int]]]:
    """Runs of sparse steps within which outputs may serve: each one's phase, and the numbers of its steps.

    ``phases``: of a generation's steps in their order, None for dense ones.

    >>> stretches([None, 0, 0, None, 0, 1])
    [(0, [1, 2]), (0, [4]), (1, [5])]
    """
    runs = groupby(enumerate(phases), key=lambda step: step[1])
    return [(phase, [number for number, _ in steps]) for phase, steps in runs if phase is not None]
