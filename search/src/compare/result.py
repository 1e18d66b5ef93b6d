"""What a comparison found, put together from its record."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from diffsparse.search.compare.record import Record
from diffsparse.search.compare.rows import METHOD, Row
from diffsparse.search.evaluate import finite
from diffsparse.search.statistics import Mean, mean_of

__all__ = ["Comparison", "RowResult", "difference", "read_result"]

#: Rows whose density is so near to one that was asked for stand in its table.
SAME_DENSITY = 0.01
DONE, PARTIAL, MISSING = "done", "partial", "not made yet"


@dataclass(frozen=True)
class RowResult:
    """One row.

    state: ``done``; ``partial`` or ``not made yet`` where clips are still to be made; ``out of reach`` of the density;
    ``failed``. reason: of the last two. asked, density: whole-trajectory, as asked for and as executed (mean of the
    clips). clips: the figures of each, by its case. loop_seconds, attention_seconds, selection_seconds: medians of the
    clips that were made alone; of the denoising loop, of all self-attention calls in it, and of what picking blocks
    took in those (None where no rule picks any, or nothing was timed). options: of the preset.
    """

    key: str
    name: str
    kind: str
    asked: float | None
    state: str
    reason: str | None = None
    options: dict[str, Any] | None = None
    rules: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    note: str | None = None
    clips: dict[int, dict[str, Any]] = field(default_factory=dict, repr=False)
    loop_seconds: float | None = None
    attention_seconds: float | None = None
    selection_seconds: float | None = None

    @property
    def searched(self) -> bool:
        """Whether it is a plan, and no method that needs no search."""
        return self.kind != METHOD

    def values(self, name: str) -> dict[int, float]:
        """A figure of the clips that have it, by case."""
        found = {case: clip.get(name) for case, clip in self.clips.items()}
        return {case: float(value) for case, value in found.items() if value is not None and math.isfinite(value)}

    def mean(self, name: str) -> Mean | None:
        """Its mean; None where no clip has it."""
        return mean_of(list(self.values(name).values()))

    @property
    def psnr(self) -> Mean | None:
        """To the dense clips, in dB."""
        return self.mean("psnr")

    @property
    def density(self) -> float | None:
        """Whole-trajectory density as executed."""
        found = self.mean("density")
        return None if found is None else found.mean

    @property
    def worst(self) -> int | None:
        """The case of the clip with the lowest PSNR; one without any is worse still."""
        known = self.values("psnr")
        return min(self.clips, key=lambda case: known.get(case, -math.inf)) if self.clips else None

    @property
    def broken(self) -> list[int]:
        """Cases whose clip is black, flat, frozen or not a number."""
        return [case for case, clip in self.clips.items() if clip["sparse_defects"]]


def difference(a: RowResult, b: RowResult, name: str = "psnr") -> Mean | None:
    """Mean of ``a - b`` over the clips that both have; its interval is there from six on."""
    mine, theirs = a.values(name), b.values(name)
    return mean_of([mine[case] - theirs[case] for case in mine if case in theirs])


@dataclass(frozen=True)
class Comparison:
    """All rows of a comparison.

    cases: input and seed of each clip. dense: its loop's and its attention's time. other_seed_psnr: mean PSNR between
    dense clips of one input and two seeds, in dB: what counts is how far above it a row is (F+). noise_floor: the first
    dense clip on another dense kernel. model: the classes of the pipeline and of its transformer. calls: relative
    errors of single calls, where they were measured. files: what was written.
    """

    rows: tuple[RowResult, ...]
    cases: tuple[tuple[str, int], ...]
    densities: tuple[float, ...]
    settings: dict[str, Any]
    dense: dict[str, float | None]
    other_seed_psnr: float | None
    noise_floor: dict[str, Any] | None
    environment: dict[str, Any]
    model: str = ""
    calls: dict[str, Any] | None = None
    files: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether no clip is still to be made."""
        return all(row.state not in (PARTIAL, MISSING) for row in self.rows)

    def at(self, density: float) -> list[RowResult]:
        """The rows of one density, the best first: those that were asked for, and plans within 0.01 of it."""
        near = [
            row
            for row in self.rows
            if row.asked == density
            or (row.asked is None and row.density is not None and abs(row.density - density) <= SAME_DENSITY)
        ]
        return best_first(near)

    @property
    def others(self) -> list[RowResult]:
        """Plans that are at none of the densities."""
        shown = {row.key for density in self.densities for row in self.at(density)}
        return best_first([row for row in self.rows if row.key not in shown])

    def reference(self, rows: Sequence[RowResult]) -> RowResult | None:
        """What the others of a table are compared with: the best searched plan, else the best row."""
        known = [row for row in rows if row.psnr is not None]
        return next((row for row in known if row.searched), known[0] if known else None)

    def above(self, psnr: float | None) -> float | None:
        """F+: how far a PSNR is above that of another seed, in dB."""
        return None if psnr is None or self.other_seed_psnr is None else psnr - self.other_seed_psnr

    def to_dict(self) -> dict[str, Any]:
        """As JSON values: no NaN and no infinity (None instead)."""
        from diffsparse.search.compare.equal_time import equal_time

        tables = []
        for density in self.densities:
            rows = self.at(density)
            reference = self.reference(rows)
            tables.append(
                {
                    "density": density,
                    "against": reference.key if reference else None,
                    "rows": [{"row": row.key, **self._against(row, reference)} for row in rows],
                }
            )
        return finite(  # type: ignore[no-any-return]
            {
                "complete": self.complete,
                "model": self.model,
                "clips": [{"prompt": prompt, "seed": seed} for prompt, seed in self.cases],
                "settings": self.settings,
                "densities": list(self.densities),
                "other_seed_psnr": self.other_seed_psnr,
                "noise_floor": self.noise_floor,
                "dense": self.dense,
                "rows": [self._row(row) for row in self.rows],
                "equal_density": tables,
                "equal_time": [each.to_dict() for each in equal_time(self)],
                "calls": self.calls,
                "environment": self.environment,
                "files": list(self.files),
            }
        )

    def _against(self, row: RowResult, reference: RowResult | None) -> dict[str, Any]:
        found = None if reference is None or row is reference else difference(row, reference)
        return {"difference": found.to_dict() if found else None}

    def _row(self, row: RowResult) -> dict[str, Any]:
        worst = None if row.worst is None else row.clips[row.worst].get("psnr")
        means = {name: found.to_dict() if (found := row.mean(name)) else None for name in ("psnr", "ssim", "lpips")}
        return {
            "row": row.key,
            "name": row.name,
            "kind": row.kind,
            "state": row.state,
            "reason": row.reason,
            "asked_density": row.asked,
            "density": row.density,
            "options": row.options,
            "rules": list(row.rules),
            "backends": list(row.backends),
            "note": row.note,
            **means,
            "worst": None if row.worst is None else {"clip": row.worst, "psnr": worst, "above": self.above(worst)},
            "above_other_seed": self.above(row.psnr.mean if row.psnr else None),
            "loop_seconds": row.loop_seconds,
            "attention_seconds": row.attention_seconds,
            "selection_seconds": row.selection_seconds,
            "speedup": _ratio(self.dense["loop_seconds"], row.loop_seconds),
            "attention_speedup": _ratio(self.dense["attention_seconds"], row.attention_seconds),
            "broken": row.broken,
            "clips": [{"clip": case, **clip} for case, clip in row.clips.items()],
        }

    def table(self) -> str:
        """The same for readers, in plain text."""
        from diffsparse.search.compare.table import comparison_table

        return comparison_table(self)


def best_first(rows: Sequence[RowResult]) -> list[RowResult]:
    """By mean PSNR; rows without any come last, as they were."""
    return sorted(rows, key=lambda row: -row.psnr.mean if row.psnr else math.inf)


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def read_result(
    record: Record,
    rows: Sequence[Row],
    densities: Sequence[float],
    settings: dict[str, Any],
    environment: dict[str, Any],
    model: str,
) -> Comparison:
    """From all that was stored so far."""
    every = range(len(record.cases))
    dense = [record.dense_figures(case) for case in every if record.has_dense(case)]
    timed = [record.get("timed/dense")] if "timed/dense" in record else []
    floor = record.get("floor") or {}
    return Comparison(
        rows=tuple(_row_result(record, row) for row in rows),
        cases=tuple((source.name, seed) for source, seed in record.cases),
        densities=tuple(densities),
        settings=settings,
        dense={name: _median([*dense, *timed], name) for name in ("loop_seconds", "attention_seconds")},
        other_seed_psnr=floor.get("other_seed_psnr"),
        noise_floor=floor.get("kernel"),
        environment=environment,
        model=model,
        calls=_calls(record, rows),
    )


def _row_result(record: Record, row: Row) -> RowResult:
    about = record.get(f"row/{row.key}") or {}
    clips = {case: clip for case in range(len(record.cases)) if (clip := record.clip(row.key, case)) is not None}
    timed = [record.get(f"timed/{row.key}")] if f"timed/{row.key}" in record else []
    state = DONE if len(clips) == len(record.cases) else PARTIAL if clips else MISSING
    figures = [*clips.values(), *timed]
    return RowResult(
        key=row.key,
        name=row.name,
        kind=row.kind,
        asked=row.asked,
        state=about.get("state", state),
        reason=about.get("reason"),
        options=about.get("options"),
        rules=tuple(about.get("rules", ())),
        backends=tuple(about.get("backends", ())),
        note="; ".join(about[name] for name in ("schedule", "note") if name in about) or None,
        clips={} if "reason" in about else clips,
        **{name: _median(figures, name) for name in ("loop_seconds", "attention_seconds", "selection_seconds")},
    )


def _calls(record: Record, rows: Sequence[Row]) -> dict[str, Any] | None:
    """``chosen``: the calls. ``rows``: of each what it made of every call, or a reason."""
    chosen = record.get("calls")
    if chosen is None:
        return None
    found = [
        {"row": row.key, "asked_density": row.asked, **known}
        for row in rows
        if (known := record.get(f"calls/{row.key}"))
    ]
    return {"chosen": chosen, "rows": found}


def _median(figures: Sequence[dict[str, Any]], name: str) -> float | None:
    """Of the clips that were made while no other process of the comparison ran."""
    known = [f[name] for f in figures if f["alone"] and f.get(name) is not None]
    return statistics.median(known) if known else None
