"""Which schedules are worth a plan: where phases begin and which steps run dense, by what each step tells by itself.

Composing a plan takes an option's error in a whole phase, which is dear to find for every phase that there may be. Here
it is the sum of the errors that the option has in each of the phase's steps with the best mask of that step. That is
too little for measured masks, which all steps of a phase share, and it is known at once for every run of steps. So
every cut of a generation into phases is weighed against every other one; what is taken is then composed in earnest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from diffsparse.search.curves import HeadCurve
from diffsparse.search.drift import Hold
from diffsparse.search.trial import Trial

__all__ = ["Outlook", "Weighed"]

#: Steps at which a phase may begin, at most: generations of more steps are cut at some of them only.
MAX_CUTS = 24
#: Prices of a dense head call at which the best options are found, over the error of leaving all heads out per call.
PRICES = np.geomspace(1e-7, 10.0, 48)


@dataclass(frozen=True)
class Weighed:
    """A schedule, and the error that is foreseen of the best plan with it."""

    trial: Trial
    error: float


class Outlook:
    """What is foreseen of every schedule of a generation.

    ``push``: what an error at each step does to the final latent; ``calls``: of the model in it; ``bins``: the traced
    step that stands for it, ``[steps]`` each. ``holds``: the ways to use outputs again in a phase of some steps.
    ``second``: the step at which another expert takes over, or 0. ``heads`` may be some of all.
    """

    def __init__(
        self,
        heads: list[HeadCurve],
        push: np.ndarray,
        calls: np.ndarray,
        bins: np.ndarray,
        holds: Callable[[list[int]], list[Hold]],
        second: int = 0,
    ) -> None:
        self.steps = steps = len(push)
        self.push = push
        self.full = calls * sum(head.whole for head in heads)
        cuts = {*np.linspace(0, steps, min(steps, MAX_CUTS) + 1).round().astype(int).tolist(), second}
        skipped = sum(float((push @ head.errors[bins]).max()) for head in heads)
        #: Of a dense head call.
        self.prices = PRICES * max(skipped / float(self.full.sum()), 1e-300)
        #: Of the best options in steps ``start`` to ``stop`` at each price: ``[prices, starts, stops]``. The errors are
        #: for a unit of the push of all sparse steps.
        self.error = np.full((len(PRICES), steps, steps + 1), np.inf)
        self.cost = np.zeros((len(PRICES), steps, steps + 1))
        for start in sorted(cuts - {steps}):
            for stop in sorted(cuts - {0}):
                if start < stop and not start < second < stop:
                    members = np.arange(start, stop)
                    found = self._best(heads, members, calls, bins, holds(members.tolist()))
                    self.error[:, start, stop], self.cost[:, start, stop] = found

    def _best(
        self, heads: list[HeadCurve], members: np.ndarray, calls: np.ndarray, bins: np.ndarray, holds: list[Hold]
    ) -> tuple[np.ndarray, np.ndarray]:
        total = float(calls[members].sum())
        shares = [float(calls[members] @ np.array(hold.computed)) / total for hold in holds]
        error, cost = np.zeros(len(PRICES)), np.zeros(len(PRICES))
        for head in heads:
            own = self.push[members] @ head.errors[bins[members]]
            errors, prices = [own], [head.prices * total]
            if head.late is not None:
                late = self.push[members] * head.late[bins[members]]
                errors += [own + float(late[hold.since > 0] @ hold.since[hold.since > 0] ** 2) for hold in holds]
                prices += [head.prices * total * share for share in shares]
            e, p = np.concatenate(errors), np.concatenate(prices)
            best = (e + self.prices[:, None] * p).argmin(1)
            error += e[best]
            cost += p[best]
        return error, cost

    def cut(self, dense: Collection[int], phases: int, budget: float) -> list[Weighed]:
        """The best schedules of 1, 2, ... up to so many phases in which these steps are dense.

        ``budget``: a share of the price of a dense generation. Schedules that cost more are left out.
        """
        room = budget * float(self.full.sum()) - float(self.full[sorted(dense)].sum())
        sparse = [step for step in range(self.steps) if step not in dense]
        if room <= 0 or not sparse:
            return []
        least, begin = self.least(dense, phases)
        weight = float(self.push[sparse].sum())
        found = [self._told(begin, least, k, room, weight) for k in range(1, phases + 1)]
        return [weighed for weighed in found if weighed is not None]

    def least(self, dense: Collection[int], phases: int) -> tuple[np.ndarray, np.ndarray]:
        """The least of error and priced cost of the steps before a stop in ``k`` phases, and where the last one begins.

        Both ``[k, prices, stops]``; infinity where there are no such cuts, a begin of -1 where a dense step is last.
        """
        least = np.full((phases + 1, len(PRICES), self.steps + 1), np.inf)
        begin = np.zeros(least.shape, int)
        least[0, :, 0] = 0.0
        value = self.error + self.prices[:, None, None] * self.cost
        for stop in range(1, self.steps + 1):
            if stop - 1 in dense:
                least[:, :, stop], begin[:, :, stop] = least[:, :, stop - 1], -1
                continue
            first = max((step + 1 for step in dense if step < stop), default=0)
            for k in range(1, phases + 1):
                tried = least[k - 1, :, first:stop] + value[:, first:stop, stop]
                begin[k, :, stop] = first + tried.argmin(1)
                least[k, :, stop] = tried.min(1)
        return least, begin

    def further(self, dense: Collection[int], foreseen: list[Weighed], budget: float) -> list[Trial]:
        """The best schedule with one more dense step, at the end or in the middle, where it is better than without.

        ``foreseen``: :meth:`cut` without it.
        """
        before = min((weighed.error for weighed in foreseen), default=math.inf)
        phases = max((weighed.trial.phases for weighed in foreseen), default=0)
        steps = [step for step in range(self.steps) if step not in dense and step - 1 not in dense and step]
        found = [w for step in steps for w in self.cut([*dense, step], phases, budget)]
        best = min(found, key=lambda weighed: weighed.error, default=None)
        return [best.trial] if best is not None and best.error < before else []

    def _told(self, begin: np.ndarray, least: np.ndarray, k: int, room: float, weight: float) -> Weighed | None:
        """The cheapest price at which the best cut into ``k`` phases fits, and what lies between it and the next."""
        before: tuple[float, float] | None = None
        for price in range(len(PRICES)):
            if not np.isfinite(least[k, price, -1]):
                return None
            phase_of, error, cost = self._trace(begin, k, price)
            if cost <= room:
                if before is not None and before[1] > cost:
                    share = (room - cost) / (before[1] - cost)
                    error = (1 - share) * error + share * before[0]
                return Weighed(Trial(phase_of), error * weight)
            before = error, cost
        return None

    def _trace(self, begin: np.ndarray, k: int, price: int) -> tuple[tuple[int | None, ...], float, float]:
        phase_of: list[int | None] = [None] * self.steps
        error = cost = 0.0
        stop = self.steps
        while stop:
            start = int(begin[k, price, stop])
            if start < 0:
                stop -= 1
                continue
            k -= 1
            phase_of[start:stop] = [k] * (stop - start)
            error, cost = error + self.error[price, start, stop], cost + self.cost[price, start, stop]
            stop = start
        return tuple(phase_of), float(error), float(cost)
