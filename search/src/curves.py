"""What a head's options get wrong at every traced step by itself, to weigh schedules by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from diffsparse.grid import TokenGrid
from diffsparse.order import TokenOrder
from diffsparse.search.items import Measurements
from diffsparse.search.options import by_place, head_options, is_stable
from diffsparse.search.pricing import Pricing

__all__ = ["HeadCurve", "head_curves"]

#: Heads that are looked at: they lie all over the model, and schedules are the same for all.
MOST_HEADS = 64


@dataclass(frozen=True, eq=False)
class HeadCurve:
    """A head's options. ``errors``: squared error of the guided output in each traced step, float ``[steps, options]``.

    ``prices``: of a call, float ``[options]``. ``whole``: the price of a dense call. ``late``: squared error of outputs
    that are used again, per squared fall of the noise level, float ``[steps]``; None where they are not.
    """

    errors: np.ndarray
    prices: np.ndarray
    whole: float
    late: np.ndarray | None = None

    def pruned(self) -> HeadCurve:
        """Without options that another one beats in every step and in price."""
        kept: list[int] = []
        for i in np.lexsort((self.errors.sum(0), self.prices)):
            if not kept or not (self.errors[:, kept] <= self.errors[:, [i]]).all(0).any():
                kept.append(int(i))
        return replace(self, errors=self.errors[:, kept], prices=self.prices[kept])


def head_curves(
    search: Measurements,
    grids: Mapping[str, TokenGrid],
    orders: Mapping[tuple[str, int], TokenOrder],
    effects: np.ndarray,
    pricing: Pricing,
    weight: Mapping[str, float],
    reuse_factor: float | None,
) -> list[HeadCurve]:
    """Curves of heads all over the model.

    ``effects``: squared change of the guided output per squared error, ``[steps, layers]``. ``weight``: the price of a
    dense head call of each layer. ``reuse_factor``: what an error of outputs that are used again does, over the sum
    that is predicted; None where none are.
    """
    pairs = [(j, head) for j in range(len(search.layers)) for head in range(search.architecture.heads)]
    chosen = np.unique(np.linspace(0, len(pairs) - 1, MOST_HEADS).round().astype(int))
    found = []
    for j, head in (pairs[i] for i in chosen):
        layer, effect = search.layers[j], effects[:, j]
        order = orders[layer, head]
        table = search.table(grids[layer], order)
        stable = is_stable(search.scores(layer, head, dict(enumerate(effect.tolist()))), table)
        steps = [search.scores(layer, head, {step: 1.0}) for step in range(len(effect))]
        options = [by_place(head_options(scores, table, bitmaps=stable)) for scores in steps]
        places = [place for place in options[0] if all(place in known for known in options)]
        middle = options[len(effect) // 2]
        late = None
        if reuse_factor is not None:
            late = reuse_factor * effect * search.drift(layer, head)
            late = np.where(np.isfinite(late), late, 1e300)
        curve = HeadCurve(
            errors=np.array([[known[place].error for place in places] for known in options]) * effect[:, None],
            prices=np.array([pricing.cost(middle[place], layer, order) for place in places]) * weight[layer],
            whole=weight[layer],
            late=late,
        )
        found.append(curve.pruned())
    return found
