"""A comparison as text and as a CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from diffsparse.search.columns import GLUE, fold, shorten, text_table
from diffsparse.search.compare.calls import calls_text
from diffsparse.search.compare.equal_time import EqualTime, equal_time
from diffsparse.search.compare.result import difference

if TYPE_CHECKING:
    from diffsparse.search.compare.result import Comparison, RowResult
    from diffsparse.search.statistics import Mean

__all__ = ["best_lines", "comparison_csv", "comparison_table", "facts", "rows_table", "time_table"]

#: Columns of the tables, after the row's name.
HEADER = (
    *("method", "density", "PSNR", "worst", "F+", "SSIM", "LPIPS"),
    *("loop s", "attn s", "pick s", "to the first"),
)


def _number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else f"{value:{form}}"


def mean_text(value: Mean | None, form: str = "+.2f") -> str:
    """A mean with half its interval; of too few clips for one, with the least and the greatest."""
    if value is None:
        return "-"
    text = f"{value.mean:{form}}"
    if value.low is not None and value.high is not None:
        return f"{text}{GLUE}±{(value.high - value.low) / 2:{form.lstrip('+')}}"
    return text if value.n == 1 else f"{text} ({value.minimum:{form}} to {value.maximum:{form}})"


def cells(comparison: Comparison, row: RowResult, reference: RowResult | None) -> list[str]:
    """The cells of :data:`HEADER` for a row with clips."""
    mean = row.psnr.mean if row.psnr else None
    worst = None if row.worst is None else row.clips[row.worst].get("psnr")
    ssim, lpips = row.mean("ssim"), row.mean("lpips")
    against = None if reference is None or row is reference else difference(row, reference)
    name = row.name + ("" if row.state == "done" else f" ({len(row.clips)} of {len(comparison.cases)} clips)")
    return [
        name,
        _number(row.density, ".3f"),
        _number(mean),
        _number(worst),
        _number(comparison.above(mean), "+.1f"),
        _number(ssim.mean if ssim else None, ".3f"),
        _number(lpips.mean if lpips else None, ".3f"),
        _number(row.loop_seconds, ".3g"),
        _number(row.attention_seconds, ".3g"),
        _number(row.selection_seconds, ".3g"),
        mean_text(against),
    ]


def time_table(table: EqualTime) -> tuple[list[str], list[list[str]]]:
    """Header and cells of an equal-time table."""
    header = ["method", "PSNR", "worst", f"to {table.reference}", "between"]
    return header, [
        [
            each.name,
            _number(each.psnr.mean if each.psnr else None),
            _number(each.psnr.minimum if each.psnr else None),
            mean_text(each.difference),
            each.why or " and ".join(each.between),
        ]
        for each in table.methods
    ]


def facts(comparison: Comparison) -> list[tuple[str, str]]:
    """What the figures are of, by name."""
    floor, dense, settings = comparison.noise_floor, comparison.dense, comparison.settings
    prompts = len({prompt for prompt, _ in comparison.cases})
    sides = [settings[name] for name in ("num_frames", "height", "width") if settings[name] is not None]
    size = f", {'x'.join(map(str, sides))}" if sides else ""
    return [
        ("model", comparison.model),
        ("clips", f"{len(comparison.cases)} ({prompts} prompts), {settings['num_inference_steps']} steps{size}"),
        (
            "dense",
            f"{_number(dense['loop_seconds'], '.3g')} s a loop, of which "
            f"{_number(dense['attention_seconds'], '.3g')} s in attention",
        ),
        ("another seed (F)", f"{_number(comparison.other_seed_psnr)} dB"),
        ("another dense kernel", f"{_number(floor['psnr'] if floor else None)} dB"),
        ("machine", f"{comparison.environment['device']}, {comparison.environment['threads']} threads"),
    ]


def best_lines(comparison: Comparison) -> list[str]:
    """For each density: which row is best, and which method that needs no search; then plans at other densities."""
    lines = []
    for density in comparison.densities:
        known = [row for row in comparison.at(density) if row.psnr]
        if not known:
            lines.append(f"at {density:g}: no row has a clip")
            continue
        best, plain = known[0], next((row for row in known if not row.searched), None)
        assert best.psnr is not None
        text = f"at {density:g} the best is {best.name}, {best.psnr.mean:.2f} dB"
        if plain is not None and plain is not best and plain.psnr is not None:
            text += f"; without a search {plain.name}, {plain.psnr.mean:.2f} dB"
        lines.append(text)
    for row in comparison.others:
        if row.psnr and row.density is not None:
            lines.append(f"{row.name}, at {row.density:.3f}: {row.psnr.mean:.2f} dB")
    return lines


def comparison_table(comparison: Comparison) -> str:
    """All tables, one under the other."""
    parts = [text_table(facts(comparison))]
    for density in comparison.densities:
        parts.append(_rows_text(comparison, f"at a density of {density:g}", comparison.at(density)))
    if comparison.others:
        parts.append(_rows_text(comparison, "plans at other densities", comparison.others))
    for table in equal_time(comparison):
        header, found = time_table(table)
        title = f"at equal time, {table.seconds:.3g} s a loop ({table.reference})"
        parts.append(title + "\n" + text_table(found, header, right=(1, 2)))
    if comparison.calls is not None:
        parts.append(calls_text(comparison.calls))
    broken = [f"broken clips of {row.key}: {len(row.broken)}" for row in comparison.rows if row.broken]
    notes = [f"{row.key}: {row.note}" for row in comparison.rows if row.note]
    if broken or notes:
        parts.append("\n".join(fold(line, None, "  ") for line in (*broken, *notes)))
    parts.append("\n".join(fold(line) for line in best_lines(comparison)))
    return "\n\n".join(parts)


def rows_table(comparison: Comparison, rows: Sequence[RowResult]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the rows that have clips; without columns of which no row has anything."""
    reference = comparison.reference(rows)
    header = [*HEADER[:-1], f"to {reference.name}" if reference else ""]
    found = [cells(comparison, row, reference) for row in rows if row.clips]
    told = [i for i in range(len(header)) if i == 0 or any(line[i] != "-" for line in found)]
    return [header[i] for i in told], [[line[i] for i in told] for line in found]


def _rows_text(comparison: Comparison, title: str, rows: Sequence[RowResult]) -> str:
    header, found = rows_table(comparison, rows)
    at_right = [i for i, name in enumerate(header) if i and not name.startswith("to ")]
    told = ""
    if header[-1].startswith("to "):  # a long name would leave no room for the figures
        told, header[-1] = f", differences {header[-1]}", "differ"
    lines = [title + told]
    if found:
        lines.append(text_table(found, header, right=at_right))
    lines += [fold(f"{row.name}: {row.reason or row.state}", None, "  ") for row in rows if not row.clips]
    return "\n".join(lines)


def comparison_csv(comparison: Comparison) -> str:
    """A line for each row, with a header."""
    data: list[dict[str, Any]] = comparison.to_dict()["rows"]
    out = io.StringIO()
    names = ("row", "name", "kind", "state", "asked_density", "density")
    plain = ("above_other_seed", "loop_seconds", "attention_seconds", "selection_seconds", "speedup")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        [*names, "clips", "psnr", "psnr_low", "psnr_high", "worst_psnr", "ssim", "lpips", *plain, "reason", "note"]
    )
    for row in data:
        psnr = row["psnr"] or {}
        means = [(row[name] or {}).get("mean") for name in ("ssim", "lpips")]
        found = [psnr.get("mean"), psnr.get("low"), psnr.get("high"), (row["worst"] or {}).get("psnr"), *means]
        writer.writerow(
            [*(row[name] for name in names), len(row["clips"]), *found, *(row[name] for name in plain),
             *(shorten(row[name], 300) if row[name] else None for name in ("reason", "note"))]
        )  # fmt: skip
    return out.getvalue()
