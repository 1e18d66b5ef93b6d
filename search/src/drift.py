"""How fast a head's output changes from step to step: what using it again would get wrong.

An output that is used again at a noise level lower by ``d`` is off by about ``d`` times the rate of change, so that the
squared error grows with ``d ** 2``. Rates are measured between the steps of a traced generation, on a few tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from diffsparse.reuse import computed_steps

__all__ = ["DriftMeter", "Hold", "holds_for"]

TOKENS = 256
# Outputs serve for about one, two or three more steps, or for the whole phase.
_SHARES = (1 / 2, 1 / 3, 1 / 4, 0.0)


@dataclass
class DriftMeter:
    """Keeps a few tokens of each layer's last outputs, and finds how fast they change.

    ``guidance``: the scale of classifier-free guidance, where a step has two items, in one batch or in two calls. A
    prompt's output and the negative one's change alike from step to step, so that most of it cancels in the difference
    that guidance makes larger; what sparse attention gets wrong in them has less in common. So rates are told as the
    error of each item by itself that would change the guided output as much: with ``m`` the mean of both changes and
    ``d`` their difference, ``(|m|^2 + (s - 1/2)^2 |d|^2) / (2 (s - 1/2)^2 + 1/2)``.
    """

    guidance: float = 1.0
    _last: dict[tuple[str, str, int], tuple[float, torch.Tensor]] = field(default_factory=dict)
    _changes: dict[tuple[int, str], list[torch.Tensor]] = field(default_factory=dict)

    def add(
        self, step: int, key: tuple[str, str, int], level: float, out: torch.Tensor, roots: torch.Tensor
    ) -> np.ndarray:
        """Squared change of a layer's outputs per squared change of the noise level, fp32 ``[H]``.

        Of all of a step's calls so far; summed over all tokens, in the units of ``CallScores.energy``; NaN where there
        is no earlier step to compare with. ``key``: the transformer, the layer, and which of its calls in the step.
        ``out``: of visual tokens, ``[B, S, H, D]``. ``roots``: ``[H, D, D]``, see ``score.projection_roots``.
        """
        heads = out.shape[2]
        tokens = torch.linspace(0, out.shape[1] - 1, min(out.shape[1], TOKENS), device=out.device).round().long()
        now = torch.einsum("bshd,hde->bshe", out.index_select(1, tokens).float(), roots)
        before = self._last.get(key)
        self._last[key] = (level, now)
        if before is None or before[1].shape != now.shape or before[0] - level < 1e-6:
            return np.full(heads, np.nan, np.float32)
        if key[2] == 0:  # the last step's are known
            self._changes = {k: v for k, v in self._changes.items() if k[1] != key[1]}
        changes = self._changes.setdefault((step, key[1]), [])
        changes.extend((now - before[1]) / (before[0] - level))
        found: np.ndarray = (self._rate(changes) * (out.shape[1] / len(tokens))).cpu().numpy()
        return found

    def _rate(self, changes: list[torch.Tensor]) -> torch.Tensor:
        if len(changes) != 2 or self.guidance <= 1:
            return torch.stack([change.square().sum((0, 2)) for change in changes]).mean(0)
        mean, apart = (changes[0] + changes[1]) / 2, changes[0] - changes[1]
        gain = (self.guidance - 0.5) ** 2
        return (mean.square() + gain * apart.square()).sum((0, 2)) / (2 * gain + 0.5)


@dataclass(frozen=True)
class Hold:
    """One way to use outputs again in a phase.

    ``reuse``: as an entry has it. ``computed``: which of the phase's steps compute. ``since``: how far the noise level
    has fallen at each step since the output that serves it was computed, float ``[steps]``.
    """

    reuse: float
    computed: tuple[bool, ...]
    since: np.ndarray


def holds_for(levels: Sequence[float]) -> list[Hold]:
    """The ways that are worth trying in a phase, by its steps' descending noise levels; none for a single step."""
    spans = sorted({round(a - b, 9) for i, a in enumerate(levels) for b in levels[i + 1 :]})
    # Halfway between two spans, so that a level's rounding does not decide. The last holds for all of the phase.
    values = [(a + b) / 2 for a, b in zip(spans, spans[1:])] + [min(1.0, 1.25 * span) for span in spans[-1:]]
    found: dict[tuple[bool, ...], Hold] = {}
    for reuse in values:
        computed = tuple(computed_steps(levels, reuse))
        if computed in found or all(computed):
            continue
        served = np.maximum.accumulate(np.where(computed, np.arange(len(levels)), 0))
        since = np.asarray(levels, np.float64)[served] - np.asarray(levels, np.float64)
        found[computed] = Hold(float(reuse), computed, since)
    chosen: list[Hold] = []
    for share in _SHARES:
        if found:
            best = min(found.values(), key=lambda hold: abs(float(np.mean(hold.computed)) - share))
            if best not in chosen:
                chosen.append(best)
    return chosen
