"""Methods ranked at equal time: their quality at the time of a plan, between two of their own points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffsparse.search.statistics import Mean, mean_of

if TYPE_CHECKING:
    from diffsparse.search.compare.result import Comparison, RowResult

__all__ = ["AtTime", "EqualTime", "equal_time"]


@dataclass(frozen=True)
class AtTime:
    """One method at a time. psnr: of its clips there, interpolated clip by clip between the rows ``between``, whose
    times lie around it; None where they do not, and ``why`` says so. difference: to the reference, clip by clip."""

    name: str
    psnr: Mean | None = None
    difference: Mean | None = None
    between: tuple[str, ...] = ()
    why: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "name": self.name,
            "psnr": self.psnr.to_dict() if self.psnr else None,
            "difference": self.difference.to_dict() if self.difference else None,
            "between": list(self.between),
            "why": self.why,
        }


@dataclass(frozen=True)
class EqualTime:
    """All methods at the time of ``reference``, the best first; those that are not known there come last."""

    reference: str
    seconds: float
    methods: tuple[AtTime, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "row": self.reference,
            "loop_seconds": self.seconds,
            "methods": [each.to_dict() for each in self.methods],
        }


def equal_time(comparison: Comparison) -> list[EqualTime]:
    """A table for the time of each plan; where there is none, for that of the best row of each density."""
    known = [row for row in comparison.rows if row.loop_seconds and row.psnr]
    references = [row for row in known if row.searched]
    if not references:
        best = [comparison.reference(comparison.at(density)) for density in comparison.densities]
        references = list({row.key: row for row in best if row is not None and row.loop_seconds}.values())
    names = list(dict.fromkeys(row.name for row in known))
    tables = []
    for reference in references:
        assert reference.loop_seconds is not None
        points = {name: [row for row in known if row.name == name] for name in names if name != reference.name}
        found = [_at_time(name, rows, reference) for name, rows in points.items()]
        own = AtTime(reference.name, reference.psnr, None, (reference.key,))
        ranked = sorted([own, *(each for each in found if each.psnr)], key=lambda each: -_mean(each))
        unknown = [each for each in found if each.psnr is None]
        tables.append(EqualTime(reference.key, reference.loop_seconds, (*ranked, *unknown)))
    return tables


def _mean(each: AtTime) -> float:
    assert each.psnr is not None
    return each.psnr.mean


def _at_time(name: str, rows: Sequence[RowResult], reference: RowResult) -> AtTime:
    seconds = reference.loop_seconds
    assert seconds is not None
    points = sorted(((row.loop_seconds, row) for row in rows if row.loop_seconds), key=lambda point: point[0])
    times = [time for time, _ in points]
    if seconds < times[0]:
        return AtTime(name, why=f"all that was measured takes longer, {times[0]:.3g} s at least")
    if seconds > times[-1]:
        return AtTime(name, why=f"all that was measured takes less, {times[-1]:.3g} s at most")
    after = next(i for i, time in enumerate(times) if time >= seconds)
    (t0, low), (t1, high) = points[max(0, after - 1)], points[after]
    share = 1.0 if t1 == t0 else (seconds - t0) / (t1 - t0)
    first, second, theirs = low.values("psnr"), high.values("psnr"), reference.values("psnr")
    values = {case: first[case] + share * (second[case] - first[case]) for case in first if case in second}
    difference = mean_of([value - theirs[case] for case, value in values.items() if case in theirs])
    return AtTime(name, mean_of(list(values.values())), difference, tuple(dict.fromkeys((low.key, high.key))))
