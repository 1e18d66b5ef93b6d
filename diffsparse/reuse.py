"""Outputs that are used again: how long an attention output serves, by noise level and never by step index.

What a head puts out changes slowly from step to step. A head with a ``reuse`` of ``r`` is computed at the first step
of a phase, and again once the noise level has fallen by ``r``; the steps between take what was computed last. So a run
with more steps computes as often, and one whose steps are longer than ``r`` computes at every step. (Using attention
outputs again over steps is Pyramid Attention Broadcast's idea, arXiv 2408.12588; there by step index, for layers.)
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["computed_steps", "serves"]


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
