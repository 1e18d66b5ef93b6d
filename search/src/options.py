"""What each head may choose in each phase: entries with a predicted error and a cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from diffsparse.density import tail_density
from diffsparse.entry import TAILS, Execution, HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.order import TokenOrder
from diffsparse.patterns import Bitmap, Empty, Full, Pattern
from diffsparse.search.candidates import BITMAP_DENSITIES, families
from diffsparse.search.masks import mask_at

__all__ = [
    "NOTHING",
    "FamilyTable",
    "HeadScores",
    "Option",
    "by_place",
    "head_entry",
    "head_options",
    "is_stable",
]

#: Pairs of blocks that are summed up together: as many as a cache holds.
PIECE = 2**14
#: Of the mask that tells whether a head's masks carry over.
STABLE_DENSITY = 0.08


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
    """Weighted scores of one head in one phase, in units of the final latent's squared error.

    ``left``: float ``[tails, options]``, sums of the scores of what each option of a :class:`FamilyTable` drops.
    ``energy``: the error of leaving the head out. ``summed``, ``true``: float ``[tails, L]``, sums of dropped blocks'
    scores and the errors measured for them, without or with a repair (:class:`~diffsparse.search.score.CallScores`).
    """

    left: np.ndarray
    energy: float
    summed: np.ndarray
    true: np.ndarray

    def corrected(self, tail: int, errors: np.ndarray) -> np.ndarray:
        """The errors to expect where the dropped blocks' scores add up to ``errors``."""
        return _corrected(errors[None], self.summed[tail][None], self.true[tail][None])[0]


def _corrected(errors: np.ndarray, summed: np.ndarray, true: np.ndarray) -> np.ndarray:
    """``errors [heads, N]`` by each head's ``summed`` and ``true [heads, L]``, which fall with ``L``.

    What is true of a sum is interpolated between the sums that it was measured for, all of them by their logarithms.
    """
    errors = np.maximum(errors, 0.0)
    known = (summed > 0) & (true > 0)
    found = errors.copy()
    # Heads of which some sums are nothing are few, and have knots of their own.
    for head in np.flatnonzero(~known.all(1) & known.any(1)):
        x, y = summed[head, known[head]], true[head, known[head]]
        found[head] = _corrected(errors[head][None], x[None], y[None])[0] if len(x) < summed.shape[1] else errors[head]
    whole = np.flatnonzero(known.all(1))
    if not len(whole):
        return found
    e, x, y = errors[whole], np.log(summed[whole])[:, ::-1], np.log(true[whole] / summed[whole])[:, ::-1]
    logs = np.log(np.where(e > 0, e, 1.0))
    if x.shape[1] == 1:
        found[whole] = e * np.exp(y)
        return found
    right = np.clip((logs[:, :, None] >= x[:, None]).sum(2), 1, x.shape[1] - 1)
    (x0, x1), (y0, y1) = ((np.take_along_axis(k, right - 1, 1), np.take_along_axis(k, right, 1)) for k in (x, y))
    at = np.clip((logs - x0) / np.where(x1 > x0, x1 - x0, 1.0), 0, 1)
    found[whole] = e * np.exp(y0 + at * (y1 - y0))
    return found


class FamilyTable:
    """What every head may choose on one grid and order: resolution-free patterns and measured masks.

    ``patterns``, ``masks``, ``density``: of the families whose masks differ here. ``places``: of each of them among all
    families; measured masks of the densities in ``BITMAP_DENSITIES`` follow after ``num_families``.
    ``weight``: each block pair's share of the work, float ``[NB, NB]``.
    """

    def __init__(self, grid: TokenGrid, order: TokenOrder, block_size: int) -> None:
        self.grid, self.order, self.block_size = grid, order, block_size
        lengths = order.partition(grid, block_size).lengths.astype(np.float64)
        self.weight = np.outer(lengths, lengths) / grid.num_visual**2
        self.patterns: list[Pattern] = []
        self.masks: list[np.ndarray] = []
        self.places: list[int] = []
        known: dict[bytes, int] = {}
        #: For each family the first one that has the same mask here, whose place stands for both.
        self.same_as: list[int] = []
        for place, pattern in enumerate(found := families(grid)):
            mask = pattern.block_mask(grid, order, block_size)
            self.same_as.append(known.setdefault(packed := np.packbits(mask).tobytes(), place))
            if known[packed] == place:
                self.patterns.append(pattern)
                self.masks.append(mask)
                self.places.append(place)
        self.num_families = len(found)
        self.density = [float((self.weight * mask).sum()) for mask in self.masks]
        self._flat: dict[torch.device, torch.Tensor] = {}
        self._weight: dict[torch.device, torch.Tensor] = {}

    def dropped_pairs(self, device: torch.device) -> torch.Tensor:
        """What the families' masks drop, as columns: ``[NB * NB, patterns]``, 1 where a pair is dropped.

        fp32 on a CPU. Elsewhere there is little memory to keep it in, and it is uint8.
        """
        if device not in self._flat:
            bits = torch.from_numpy(np.stack([~mask.reshape(-1) for mask in self.masks], 1))
            self._flat[device] = bits.float() if device.type == "cpu" else bits.to(device, torch.uint8)
        return self._flat[device]

    def kept_by_families(self, values: np.ndarray) -> np.ndarray:
        """What the families' masks keep of some ``values [N, NB, NB]``, about: ``[N, patterns]``."""
        flat = torch.from_numpy(np.ascontiguousarray(values, np.float32)).flatten(1)
        dropped = self.dropped_pairs(flat.device)
        pieces = (slice(i, i + PIECE) for i in range(0, flat.shape[1], PIECE))
        return np.asarray(flat.sum(1, keepdim=True) - sum(flat[:, piece] @ dropped[piece] for piece in pieces))

    def device_weight(self, device: torch.device) -> torch.Tensor:
        """``weight`` on a device, float64."""
        if device not in self._weight:
            self._weight[device] = torch.from_numpy(self.weight).to(device)
        return self._weight[device]

    @cached_property
    def options(self) -> tuple[Option, ...]:
        """Dense, skip, the families and measured masks with each tail; their errors are still to be told."""
        found = [Option(0.0, 1.0, "none", "dense"), Option(0.0, 0.0, "none", "skip")]
        for tail in TAILS:
            for pattern, mask, density in zip(self.patterns, self.masks, self.density, strict=True):
                if not (isinstance(pattern, Empty) and tail == "none"):  # the same as skip
                    found.append(Option(0.0, density, tail, "family", pattern, float(mask.mean())))
            for density in BITMAP_DENSITIES:
                if count := int(density * self.weight.size):
                    found.append(Option(0.0, density, tail, "bitmap", blocks=count / self.weight.size))
        return tuple(found)

    @cached_property
    def columns(self) -> tuple[np.ndarray, np.ndarray]:
        """Where ``HeadScores.left`` has each of the options after the first two: its tail and its place."""
        at = {id(pattern): place for pattern, place in zip(self.patterns, self.places, strict=True)}
        tails, places = [], []
        for option in self.options[2:]:
            tails.append(TAILS.index(option.tail))
            measured = option.kind == "bitmap"
            place = self.num_families + BITMAP_DENSITIES.index(option.density) if measured else at[id(option.pattern)]
            places.append(place)
        return np.array(tails), np.array(places)

    @cached_property
    def is_measured(self) -> np.ndarray:
        """Which of the options are measured masks: bool ``[options]``."""
        return np.array([option.kind == "bitmap" for option in self.options])

    @cached_property
    def skips(self) -> np.ndarray:
        """Which of them leave the head out: bool ``[options]``."""
        return np.array([option.kind == "skip" for option in self.options])

    def errors(self, scores: Sequence[HeadScores]) -> np.ndarray:
        """Of some heads' options, float ``[heads, options]``."""
        tails, places = self.columns
        found = np.zeros((len(scores), len(self.options)))
        found[:, 1] = [head.energy for head in scores]
        for tail in range(len(TAILS)):
            which = np.flatnonzero(tails == tail)
            left, summed, true = (
                np.stack([getattr(head, name)[tail] for head in scores]) for name in ("left", "summed", "true")
            )
            found[:, 2 + which] = _corrected(left[:, places[which]], summed, true)
        return found

    def place(self, option: Option) -> int:
        """Of a family's or a measured mask's option in the arrays of scores."""
        if option.kind == "bitmap":
            return self.num_families + BITMAP_DENSITIES.index(option.density)
        return next(at for at, pattern in zip(self.places, self.patterns, strict=True) if pattern == option.pattern)


def is_stable(scores: HeadScores, table: FamilyTable) -> bool:
    """Does the head's measured mask carry over between prompts?

    True where the mask of 8% of the work, with the mean tail, saves at least twice what as many pairs at random would,
    on prompts that it was not made from. What it leaves there is in the predicted error already; this only keeps out
    heads whose masks say nothing about another prompt.
    """
    tail = TAILS.index("mean")
    everything = float(scores.left[tail, table.places[0]])
    left = float(scores.left[tail, table.num_families + BITMAP_DENSITIES.index(STABLE_DENSITY)])
    # A head whose whole error is next to nothing cannot fail to carry over.
    return left <= (1 - 2 * STABLE_DENSITY) * everything or everything <= 1e-9 * scores.energy


def head_options(scores: HeadScores, table: FamilyTable, *, bitmaps: bool) -> list[Option]:
    """All options of one head: dense, skip, measured masks and the families, with each tail."""
    told = zip(table.options, table.errors([scores])[0].tolist(), strict=True)
    return [replace(option, error=error) for option, error in told if bitmaps or option.kind != "bitmap"]


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


def work_density(option: Option, grid: TokenGrid, blocks: int) -> float:
    """Executed work of a head's call over all query-key pairs, text and tail counted."""
    if option.kind == "skip":
        return 0.0
    visual = grid.num_visual**2 / grid.seq_len**2
    tail = tail_density(option.tail, blocks, grid.seq_len) if option.kind != "dense" else 0.0
    return min(1.0, 1.0 - visual + option.density * visual + tail)


def head_entry(
    option: Option, worth: np.ndarray | None, table: FamilyTable, kept: np.ndarray | None = None
) -> HeadEntry:
    """The plan entry of a chosen option; a measured mask gets the best family of about its density as its fallback.

    ``worth``: of each pair of blocks, ``[NB, NB]``, where a mask is made from it. ``kept``: about what each family's
    mask keeps of it, ``[families]``, where that is known.
    """
    if option.kind == "dense":
        return HeadEntry(execution=Execution(reuse=option.reuse))
    if option.kind == "skip":
        return HeadEntry(pattern=Empty(), execution=Execution(mode="skip"))
    execution = Execution(tail=option.tail, reuse=option.reuse)
    if option.kind == "family":
        assert option.pattern is not None
        return HeadEntry(table.order, option.pattern, execution=execution)
    assert worth is not None
    mask = mask_at(worth, table.weight, option.density)
    near = [i for i, d in enumerate(table.density) if d <= 1.25 * option.density + 1e-3]
    if kept is not None:  # sums in single precision: those that are near the best are told apart below
        near = [i for i in near if kept[i] >= kept[near].max() - 1e-4 * float(worth.sum())]
    best = near[0] if len(near) == 1 else max(near, key=lambda i: float(worth[table.masks[i]].sum()))
    fallback = table.patterns[best]
    if isinstance(fallback, Empty) and option.tail == "none":
        fallback = Full()  # nothing at all would be attended elsewhere
    pattern = Bitmap.from_mask(mask, table.grid, table.order, table.block_size, fallback)
    return HeadEntry(table.order, pattern, execution=execution)
