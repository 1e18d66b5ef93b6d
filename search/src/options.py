"""What each head may choose in each phase: entries with a predicted error and a cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from diffsparse.density import tail_density
from diffsparse.entry import TAILS, Execution, HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.order import TokenOrder
from diffsparse.patterns import Bitmap, Empty, Full, Pattern
from diffsparse.search.candidates import BITMAP_DENSITIES, families, top_columns

__all__ = [
    "NOTHING",
    "FamilyTable",
    "HeadScores",
    "Option",
    "by_place",
    "head_entry",
    "head_options",
    "is_stable",
    "prune",
    "ranking",
    "reference_mask",
    "reusing",
]

COLUMN_COUNTS = (1, 2, 4, 8)
# Masks made from other prompts may leave this many times the error of a prompt's own. What they leave is in the
# predicted error already; this only keeps out heads whose masks say nothing about another prompt.
STABILITY_BOUND = 3.0


@dataclass(frozen=True)
class Option:
    """One choice for one head in one phase.

    ``error``: predicted squared error of the final latent. ``density``: kept share of the visual block pairs' work.
    ``blocks``: kept share of the visual block pairs, short ones as a whole; None where it is as the density, as for
    dense and skipped heads. ``reuse``: as the entry has it; the other fields are those of a call that computes.
    """

    error: float
    density: float
    tail: str
    kind: str
    pattern: Pattern | None = None
    blocks: float | None = None
    reuse: float = 0.0


#: A call in which a head computes nothing.
NOTHING = Option(0.0, 0.0, "none", "skip")


@dataclass(frozen=True)
class HeadScores:
    """Weighted scores of one head in one phase.

    ``error``: float ``[prompts, tails, NB, NB]``, in units of the final latent's squared error. ``energy``: the same
    for leaving the head out. ``summed``, ``true``: float ``[tails, L]``, sums of dropped blocks' scores and the errors
    measured for them, mean over prompts (:class:`~diffsparse.search.score.CallScores`).
    """

    error: np.ndarray
    energy: float
    summed: np.ndarray
    true: np.ndarray

    def corrected(self, tail: int, error: float) -> float:
        """The error to expect where the dropped blocks' scores add up to ``error``."""
        known = (self.summed[tail] > 0) & (self.true[tail] > 0)
        if error <= 0 or not known.any():
            return max(error, 0.0)
        x, y = self.summed[tail][known][::-1], self.true[tail][known][::-1]
        return float(error * np.exp(np.interp(np.log(error), np.log(x), np.log(y / x))))

    @property
    def mean(self) -> np.ndarray:
        """Scores over all prompts, ``[tails, NB, NB]``."""
        return self.error.mean(0)


class FamilyTable:
    """Resolution-free patterns and their block masks on one grid and order."""

    def __init__(self, grid: TokenGrid, order: TokenOrder, block_size: int) -> None:
        self.grid, self.order, self.block_size = grid, order, block_size
        lengths = order.partition(grid, block_size).lengths.astype(np.float64)
        self.weight = np.outer(lengths, lengths) / grid.num_visual**2
        self.patterns: list[Pattern] = []
        self.masks: list[np.ndarray] = []
        for pattern in families(grid):
            self._add(pattern)
        self.density = [float((self.weight * mask).sum()) for mask in self.masks]

    def _add(self, pattern: Pattern) -> None:
        mask = pattern.block_mask(self.grid, self.order, self.block_size)
        if not any(np.array_equal(mask, known) for known in self.masks):
            self.patterns.append(pattern)
            self.masks.append(mask)


def ranking(scores: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Block pairs by error saved per unit of work, best first: indices into the flat ``[NB * NB]`` matrix."""
    return np.argsort(-(scores / weight).reshape(-1), kind="stable")


def reference_mask(scores: np.ndarray, weight: np.ndarray, density: float) -> np.ndarray:
    """The best mask of about ``density``: bool ``[NB, NB]``."""
    mask = np.zeros(scores.size, bool)
    mask[ranking(scores, weight)[: int(density * scores.size)]] = True
    return mask.reshape(scores.shape)


def _curve(rank: np.ndarray, scores: np.ndarray, kept: list[int]) -> np.ndarray:
    """Error left when the first ``kept`` pairs of a ranking are computed, for each number in ``kept``."""
    saved = np.concatenate([[0.0], np.cumsum(scores.reshape(-1)[rank])])
    return np.maximum(saved[-1] - saved[kept], 0.0)


def _counts(rank: np.ndarray, weight: np.ndarray) -> list[int]:
    work = np.cumsum(weight.reshape(-1)[rank])
    return [int(np.searchsorted(work, d, side="right")) for d in BITMAP_DENSITIES]


def _crossed(scores: HeadScores, tail: int, weight: np.ndarray, kept: list[int]) -> np.ndarray:
    """Error on each prompt of masks ranked on all the others, mean over prompts: ``[len(kept)]``."""
    prompts = scores.error.shape[0]
    if prompts == 1:
        return _curve(ranking(scores.error[0, tail], weight), scores.error[0, tail], kept)
    total = scores.error[:, tail].sum(0)
    curves = []
    for p in range(prompts):
        others = ranking(total - scores.error[p, tail], weight)
        curves.append(_curve(others, scores.error[p, tail], kept))
    return np.mean(curves, 0)


def is_stable(scores: HeadScores, weight: np.ndarray, bound: float = STABILITY_BOUND) -> bool:
    """Does the head's mask carry over between prompts?

    True where masks of equal work made from other prompts leave at most ``bound`` times the error that a prompt's own
    best mask leaves, at a share of 8% with the mean tail. With one prompt there is nothing to compare.
    """
    prompts = scores.error.shape[0]
    if prompts == 1:
        return True
    tail = TAILS.index("mean")
    kept = [int(0.08 * weight.size)]
    own = np.mean([_curve(ranking(e[tail], weight), e[tail], kept)[0] for e in scores.error])
    crossed = _crossed(scores, tail, weight, kept)[0]
    everything = float(scores.mean[tail].sum())
    # A head whose whole error is next to nothing cannot fail to carry over.
    return bool(crossed <= bound * own or everything <= 1e-9 * scores.energy)


def head_options(scores: HeadScores, table: FamilyTable, *, bitmaps: bool) -> list[Option]:
    """All options of one head: dense, skip, bitmaps by tail error at every budget, and the families, with each tail."""
    options = [Option(0.0, 1.0, "none", "dense"), Option(scores.energy, 0.0, "none", "skip")]
    mean = scores.mean
    for t, tail in enumerate(TAILS):
        flat_total = float(mean[t].sum())
        for pattern, mask, density in zip(table.patterns, table.masks, table.density, strict=True):
            if isinstance(pattern, Empty) and tail == "none":
                continue  # the same as skip
            error = scores.corrected(t, flat_total - float(mean[t][mask].sum()))
            options.append(Option(error, density, tail, "family", pattern, float(mask.mean())))
        columns = mean[t].sum(0)
        for count in COLUMN_COUNTS:
            if count < len(columns) // 4:
                pattern = top_columns(columns, table.grid, table.order, table.block_size, count)
                mask = pattern.block_mask(table.grid, table.order, table.block_size)
                error = scores.corrected(t, flat_total - float(mean[t][mask].sum()))
                density = float((table.weight * mask).sum())
                options.append(Option(error, density, tail, "family", pattern, float(mask.mean())))
        if bitmaps:
            rank = ranking(mean[t], table.weight)
            kept = _counts(rank, table.weight)
            for density, count, error in zip(
                BITMAP_DENSITIES, kept, _crossed(scores, t, table.weight, kept), strict=True
            ):
                if count:
                    blocks = count / table.weight.size
                    options.append(Option(scores.corrected(t, float(error)), density, tail, "bitmap", blocks=blocks))
    return options


def by_place(options: list[Option]) -> dict[tuple[str, str, float], Option]:
    """The options of :func:`head_options` by names that are the same at every step: a bitmap's is its density."""
    found: dict[tuple[str, str, float], Option] = {}
    places: Counter[tuple[str, str]] = Counter()
    for option in options:
        key = option.tail, option.kind
        place = option.density if option.kind == "bitmap" else places[key]
        places[key] += 1
        found[(*key, place)] = option
    return found


def prune(options: list[Option], cost: Callable[[Option], float]) -> tuple[list[Option], np.ndarray, np.ndarray]:
    """Options that no other one beats in both error and cost, with their errors and costs, cheapest first."""
    order = sorted(options, key=lambda o: (cost(o), o.error))
    kept: list[Option] = []
    for option in order:
        if not kept or option.error < kept[-1].error:
            kept.append(option)
    return kept, np.array([o.error for o in kept]), np.array([cost(o) for o in kept])


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


def work_density(option: Option, grid: TokenGrid, blocks: int) -> float:
    """Executed work of a head's call over all query-key pairs, text and tail counted."""
    if option.kind == "skip":
        return 0.0
    visual = grid.num_visual**2 / grid.seq_len**2
    tail = tail_density(option.tail, blocks, grid.seq_len) if option.kind != "dense" else 0.0
    return min(1.0, 1.0 - visual + option.density * visual + tail)


def head_entry(option: Option, scores: HeadScores, table: FamilyTable) -> HeadEntry:
    """The plan entry of a chosen option; a bitmap gets the best family of about its density as its fallback."""
    if option.kind == "dense":
        return HeadEntry(execution=Execution(reuse=option.reuse))
    if option.kind == "skip":
        return HeadEntry(pattern=Empty(), execution=Execution(mode="skip"))
    execution = Execution(tail=option.tail, reuse=option.reuse)
    if option.kind == "family":
        assert option.pattern is not None
        return HeadEntry(table.order, option.pattern, execution=execution)
    t = TAILS.index(option.tail)
    mean = scores.mean[t]
    rank = ranking(mean, table.weight)
    count = _counts(rank, table.weight)[BITMAP_DENSITIES.index(option.density)]
    mask = np.zeros(mean.size, bool)
    mask[rank[:count]] = True
    mask = mask.reshape(mean.shape)
    near = [i for i, d in enumerate(table.density) if d <= 1.25 * option.density + 1e-3]
    best = max(near, key=lambda i: float(mean[table.masks[i]].sum()))
    fallback = table.patterns[best]
    if isinstance(fallback, Empty) and option.tail == "none":
        fallback = Full()  # nothing at all would be attended elsewhere
    pattern = Bitmap.from_mask(mask, table.grid, table.order, table.block_size, fallback)
    return HeadEntry(table.order, pattern, execution=execution)
