"""What each head may choose in a phase: the options that no other one beats, also where outputs are used again.

For all heads of a layer at once, as arrays; an :class:`~diffsparse.search.options.Option` is made where one is asked
for, because a large model has hundreds of thousands of them for every schedule that is tried.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import overload

import numpy as np

from diffsparse.search.drift import Hold
from diffsparse.search.options import FamilyTable, HeadScores, Option, is_stable

__all__ = ["Choices", "choices_of", "layer_choices", "pruned_rows"]


@dataclass(frozen=True, eq=False)
class Choices(Sequence[Option]):
    """Some options of a table, ``[options]`` each.

    ``places``: in ``table.options``. ``reuses``: as an entry has it. ``errors``: predicted.
    """

    table: FamilyTable
    places: np.ndarray
    reuses: np.ndarray
    errors: np.ndarray

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, at: int) -> Option: ...
    @overload
    def __getitem__(self, at: slice) -> Choices: ...
    def __getitem__(self, at: int | slice) -> Option | Choices:
        if isinstance(at, slice):
            return Choices(self.table, self.places[at], self.reuses[at], self.errors[at])
        option = self.table.options[self.places[at]]
        return replace(option, error=float(self.errors[at]), reuse=float(self.reuses[at]))

    def kept(self, which: np.ndarray) -> Choices:
        """Those in ``which``, bool ``[options]``."""
        return Choices(self.table, self.places[which], self.reuses[which], self.errors[which])


def pruned_rows(errors: np.ndarray, prices: np.ndarray) -> list[np.ndarray]:
    """Which options of each row no other one beats in both error and price, cheapest first.

    errors: float ``[rows, options]``, infinite for what may not be chosen. prices: of the same shape, or ``[options]``.
    """
    prices = np.broadcast_to(prices, errors.shape)
    order = np.lexsort((errors, prices), axis=1)
    told = np.take_along_axis(errors, order, 1)
    best = np.minimum.accumulate(told, 1)
    better = np.concatenate([np.isfinite(told[:, :1]), told[:, 1:] < best[:, :-1]], 1)
    return [row[keep] for row, keep in zip(order, better, strict=True)]


def choices_of(
    table: FamilyTable,
    errors: np.ndarray,
    prices: np.ndarray,
    holds: Sequence[Hold] = (),
    calls: np.ndarray | None = None,
    late: np.ndarray | None = None,
    roomy: bool = True,
) -> list[tuple[Choices, np.ndarray]]:
    """Of heads with the same table, what each may choose in a phase, and the prices over the phase's calls.

    errors: float ``[heads, options]``, infinite for what a head may not choose. prices: of a call, ``[options]``.
    Where outputs may be used again (``holds``), ``calls``: of the model in each of the phase's steps; ``late``: squared
    error of each head's output at each step, per squared fall of the noise level since it was computed, ``[heads,
    steps]``; ``roomy``: there is room for the outputs of all heads. Where there is not, no option is left out because
    of one that keeps its outputs.

    What a sparse call gets wrong and what changes until a later step are taken to have nothing to do with each other,
    so that their squares add up.
    """
    kept = pruned_rows(errors, prices)
    found = []
    for head, places in enumerate(kept):
        own = Choices(table, places, np.zeros(len(places)), errors[head, places])
        found.append((own, prices[places]))
    if not holds or calls is None or late is None:
        return found
    shares = np.array([float(calls[list(hold.computed)].sum() / calls.sum()) for hold in holds])
    late = np.where(np.isfinite(late), late, 1e300)
    stale = np.stack(
        [(late[:, hold.since > 0] * hold.since[hold.since > 0] ** 2).sum(1) for hold in holds], 1
    )  # [heads, holds]
    reuse = np.array([hold.reuse for hold in holds])
    skips = table.skips
    for head, (own, own_prices) in enumerate(found):
        may = np.flatnonzero(~skips[own.places])
        more = Choices(
            table,
            np.repeat(own.places[may], len(holds)),
            np.tile(reuse, len(may)),
            (own.errors[may, None] + stale[head]).reshape(-1),
        )
        more_prices = (own_prices[may, None] * shares).reshape(-1)
        if not roomy and len(more):
            first = pruned_rows(more.errors[None], more_prices[None])[0]
            more, more_prices = more.kept(first), more_prices[first]
        every = Choices(
            table, *(np.concatenate([getattr(c, n) for c in (own, more)]) for n in ("places", "reuses", "errors"))
        )
        both = np.concatenate([own_prices, more_prices])
        order = pruned_rows(every.errors[None], both[None])[0] if roomy else np.lexsort((every.errors, both))
        found[head] = every.kept(order), both[order]
    return found


def layer_choices(
    tables: Sequence[FamilyTable],
    scores: Sequence[Sequence[HeadScores]],
    prices_of: Callable[[FamilyTable], np.ndarray],
    holds: Sequence[Sequence[Hold]],
    calls: Sequence[np.ndarray],
    late: Sequence[np.ndarray | None],
    roomy: bool,
) -> tuple[dict[tuple[int, int], tuple[Choices, np.ndarray]], set[int]]:
    """:func:`choices_of` by head and phase of a layer, and the heads whose measured masks do not carry over.

    ``tables``: by head. ``scores``: by phase and head; ``holds``, ``calls`` and ``late``, of all heads, by phase.
    """
    found: dict[tuple[int, int], tuple[Choices, np.ndarray]] = {}
    unstable: set[int] = set()
    for table in dict.fromkeys(tables):
        heads = [head for head, own in enumerate(tables) if own is table]
        prices = prices_of(table)
        for phase, own in enumerate(scores):
            errors = table.errors([own[head] for head in heads])
            for row, head in zip(errors, heads, strict=True):
                if not is_stable(own[head], table):
                    unstable.add(head)
                    row[table.is_measured] = np.inf
            rates = late[phase]
            made = choices_of(
                table, errors, prices, holds[phase], calls[phase], None if rates is None else rates[heads], roomy
            )
            found |= {(head, phase): each for head, each in zip(heads, made, strict=True)}
    return found, unstable
