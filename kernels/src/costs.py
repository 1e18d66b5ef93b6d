"""What a sparse call costs as a share of a dense one, by tokens, density and tail: the one model of it.

Times are measured in two places. ``diffsparse bench break-even`` times several lengths and keeps the table for the
device (:mod:`diffsparse.kernels.break_even`); a search times its own call (:mod:`diffsparse.search.cost`) and keeps the
figures with the plan. Both become a :class:`CostTable`, which alone reads between the measured points.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from diffsparse.entry import TAILS
from diffsparse.tails import measured_as
from diffsparse.work import HeadWork

__all__ = ["CostTable", "mean_of"]


@dataclass(frozen=True)
class CostTable:
    """Sparse attention's time over dense attention's on one device.

    ratio: for each tail ``[len(tokens)][len(densities)]``. heads: of the calls that were timed. gather: for each number
    of tokens, what an order other than the model's adds.

    A table of lengths counts ``densities`` in kept blocks over all blocks, heads in the model's order. It also says
    what was compared: backend, and in which of its ways it ran (empty: not told); dtype, head_dim, block_size; dense,
    the fastest of torch's kernels at each length; about, the versions, date and command of the measurement.

    A table of one call (:meth:`of_call`) was timed on that call's own grid and order. It has one row, which serves
    whatever number of tokens is asked for, and counts ``densities`` in kept pairs of visual tokens, text being computed
    all the same. dense_seconds: the dense call. fill: how full the blocks were that were timed, or None where a plan
    does not say.
    """

    device: str
    heads: int
    tokens: tuple[int, ...]
    densities: tuple[float, ...]
    ratio: dict[str, tuple[tuple[float, ...], ...]]
    gather: tuple[float, ...]
    backend: str = ""
    dtype: str = ""
    head_dim: int = 0
    block_size: int = 0
    dense: tuple[str, ...] = ()
    about: dict[str, str] = field(default_factory=dict)
    dense_seconds: float | None = None
    fill: float | None = None
    way: str = ""

    def __post_init__(self) -> None:
        shape = (len(self.tokens), len(self.densities))
        ascending = all(a < b for axis in (self.tokens, self.densities) for a, b in zip(axis, axis[1:]))
        tables = [np.array(self.ratio.get(tail, ()), np.float64) for tail in TAILS]
        numbers = np.concatenate([*(t.ravel() for t in tables), np.array([*self.gather, *self.densities], np.float64)])
        least = (1, 2 if self.of_one_call else 1)  # of one call a line goes on below the lowest density
        fitting = len(self.gather) == shape[0] and all(table.shape == shape for table in tables)
        if not ascending or not fitting or shape[0] < least[0] or shape[1] < least[1]:
            raise ValueError("its axes and tables do not fit together")
        if not np.isfinite(numbers).all() or min(t.min() for t in tables) <= 0 or self.densities[0] < 0:
            raise ValueError("it holds numbers that are not ratios of times")
        if self.fill is not None and not 0 < self.fill <= 1:
            raise ValueError(f"blocks are filled by a share above 0 and of 1 at most, not {self.fill}")

    @classmethod
    def of_call(
        cls,
        device: str,
        dense_seconds: float,
        densities: Sequence[float],
        share: dict[str, tuple[float, ...]],
        fill: float | None = None,
    ) -> CostTable:
        """Of one call that was timed: ``share`` has, for each tail, the time over dense at each of ``densities``."""
        rows: dict[str, tuple[tuple[float, ...], ...]] = {tail: (tuple(times),) for tail, times in share.items()}
        return cls(device, 1, (1,), tuple(densities), rows, (0.0,), dense_seconds=dense_seconds, fill=fill)

    @property
    def of_one_call(self) -> bool:
        return self.dense_seconds is not None

    # -- what it predicts ----------------------------------------------------------------------------------------------

    def head_ratio(self, tokens: float, density: float, tail: str = "none", gathered: bool = False) -> float:
        """Predicted time of one head over its dense time, at a density as the table counts it.

        Between measured sizes it is interpolated over the logarithm of the number of tokens; below and above them the
        nearest one counts. So does the nearest density in a table of lengths: below the lowest one nothing is promised.
        In a table of one call the line through the first two densities goes on below them, a head that keeps every pair
        takes as long as a dense one at least, and no time above a dense head's is told: the head may be dense instead.
        """
        position = np.interp(np.log(tokens), np.log(self.tokens), np.arange(len(self.tokens)))
        low = int(position)
        high, part = min(low + 1, len(self.tokens) - 1), float(position - low)
        rows = self.ratio[measured_as(tail, self.ratio)]
        row = (1 - part) * np.array(rows[low]) + part * np.array(rows[high])
        extra = (1 - part) * self.gather[low] + part * self.gather[high] if gathered else 0.0
        if not self.of_one_call:
            return float(np.interp(density, self.densities, row)) + extra
        first, second = self.densities[:2]
        if density < first:
            slope = float(row[1] - row[0]) / (second - first)
            return min(1.0, max(0.0, float(row[0]) - slope * (first - density)) + extra)
        ends = ([], []) if self.densities[-1] >= 1 else ([1.0], [max(1.0, float(row[-1]))])
        return min(1.0, float(np.interp(density, [*self.densities, *ends[0]], [*row, *ends[1]])) + extra)

    def density_of(self, head: HeadWork) -> float:
        """A head's density as this table counts it. Kernels multiply whole blocks, however few tokens are in them.

        Pairs of tokens in blocks that are less full than those that were timed are more pairs of blocks.
        """
        if not self.of_one_call:
            return head.blocks
        if head.visual is None:
            raise ValueError(
                "the costs of one call need the kept pairs of visual tokens, which block lists do not tell"
            )
        if head.visual >= 1 or self.fill is None or head.fill is None:
            return head.visual
        return float(head.visual * (self.fill / head.fill) ** 2)

    def tokens_of(self, tokens: int, heads: int) -> float:
        """How many tokens a call with the table's number of heads has if it is as much work as this one.

        What sparse attention costs beside its blocks is nearly the same for every call, so that the work of a call
        decides whether it pays: few heads need longer sequences.
        """
        return float(tokens * (heads / self.heads) ** 0.5)

    def over_dense(self, heads: Sequence[HeadWork], tokens: int) -> float:
        """Predicted time of a call over its dense time: the mean over its heads.

        Skipped ones take none, but for what an online repair takes of every head.
        """
        size = self.tokens_of(tokens, len(heads))
        known: dict[HeadWork, float] = {}
        for head in heads:
            if head not in known:
                at = None if head.skipped else self.density_of(head)
                blocks = 0.0 if at is None else self.head_ratio(size, at, head.tail, head.gathered)
                known[head] = blocks + head.extra
        return mean_of(known[head] for head in heads)

    def break_even(self, tokens: int, tail: str = "none", gathered: bool = False) -> float:
        """The density, in steps of 0.01, up to which sparse is predicted to be faster; 0 where it is not even there."""
        found = 0.0
        for step in range(1, 101):
            if self.head_ratio(tokens, 0.01 * step, tail, gathered) >= 1:
                break
            found = 0.01 * step
        return round(found, 2)

    # -- files ---------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """As files of break-even tables have it or, of one call, as a search's store and a plan's record have it."""
        if self.of_one_call:
            share = {tail: rows[0] for tail, rows in self.ratio.items()}
            told = {"device": self.device, "dense_seconds": self.dense_seconds, "densities": self.densities}
            return {**told, "share": share, "fill": self.fill}
        left_out = {"dense_seconds", "fill"} | ({"way"} if not self.way else set())
        return {name: value for name, value in asdict(self).items() if name not in left_out}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> CostTable:
        """Reads both. Raises KeyError, TypeError, ValueError or AttributeError where ``data`` is neither."""
        if "share" in data:
            share = {tail: tuple(map(float, data["share"][tail])) for tail in TAILS}
            full = None if data.get("fill") is None else float(data["fill"])
            seconds = float(data["dense_seconds"])
            return cls.of_call(data["device"], seconds, tuple(map(float, data["densities"])), share, full)
        ratio = {tail: tuple(tuple(map(float, row)) for row in data["ratio"][tail]) for tail in TAILS}
        lists = {name: tuple(data[name]) for name in ("tokens", "densities", "gather", "dense")}
        about = {name: data[name] for name in ("backend", "dtype", "head_dim", "block_size", "about")}
        return cls(**{**data, **about, **lists, "ratio": ratio})


def mean_of(values: Iterable[float]) -> float:
    """The mean; of equal values that value, to the last bit: a head is priced as a layer of its like."""
    counts = Counter(values)
    total = sum(counts.values())
    return float(sum(value * (count / total) for value, count in counts.items()))
