"""Plain text tables: they read the same in a terminal, a log and an issue."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffsparse.search.evaluate import EvalReport
    from diffsparse.search.statistics import Mean

__all__ = [
    "environment_table",
    "eval_table",
    "models_data",
    "models_table",
    "printable",
    "shorten",
    "styled_table",
    "text_table",
]


def text_table(rows: Sequence[Sequence[str]], header: Sequence[str] | None = None, right: Sequence[int] = ()) -> str:
    """Columns as wide as their widest cell, two spaces apart; columns in ``right`` are aligned to the right."""
    lines = [list(header)] if header else []
    lines += [list(row) for row in rows]
    if not lines:
        return ""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]

    def render(line: Sequence[str]) -> str:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        return "  ".join(cells).rstrip()

    rendered = [render(line) for line in lines]
    if header:
        rendered.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(rendered)


def printable(text: str) -> str:
    """The text without what a terminal would obey: names in a plan come from a file of somebody else."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def styled_table(
    rows: Sequence[Sequence[str]],
    header: Sequence[str],
    right: Sequence[int] = (),
    styles: Sequence[str] = (),
    width: int | None = None,
) -> str:
    """The table for a terminal of ``width`` columns (None: this one's): long cells are folded, columns coloured.

    ``styles``: of the columns, as rich names them. Without colours where ``NO_COLOR`` is set.
    """
    import io

    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold", expand=False)
    for i, name in enumerate(header):
        table.add_column(
            name,
            justify="right" if i in right else "left",
            style=styles[i] if i < len(styles) else "",
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))  # Text: brackets in a name are no markup
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width)
    console.print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n")


def shorten(text: str, width: int) -> str:
    """One line of at most ``width`` characters."""
    text = " ".join(text.split())
    short = textwrap.shorten(text, width, placeholder="…")
    return short if len(short) > 1 or len(text) <= 1 else text[: width - 1] + "…"


def _number(value: float | None, form: str = ".2f", unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _mean(value: Mean | None, form: str, unit: str = "", plus: str = "") -> str:
    if value is None:
        return "-"
    text = f"{value.mean:{plus}{form}}{unit}"
    if value.low is not None and value.high is not None:
        text += f"  (95%: {value.low:{plus}{form}} to {value.high:{plus}{form}})"
    return text


def eval_table(report: EvalReport, clips: bool = True) -> str:
    """The figures of a comparison, and its ``clips`` one a line."""
    n = len(report.clips)
    worst = report.worst
    above = _number(worst.above_other_seed, "+.1f", " dB above another seed")
    floor = report.noise_floor
    dense, sparse = (sum(getattr(c, f"{side}_loop_seconds") for c in report.clips) / n for side in ("dense", "sparse"))
    dense_all, sparse_all = (
        sum(getattr(c, f"{side}_seconds") for c in report.clips) / n for side in ("dense", "sparse")
    )
    rows = [
        ["plan", report.plan],
        [
            "clips",
            f"{n} ({len({c.prompt for c in report.clips})} prompts), {report.settings.num_inference_steps} steps",
        ],
        ["denoising loop", f"{dense:.2f} s dense, {sparse:.2f} s sparse: {_number(report.loop_speedup)}x"],
        ["whole call", f"{dense_all:.2f} s dense, {sparse_all:.2f} s sparse: {_number(report.speedup)}x"],
        ["density of a sparse call", _number(report.call_density, ".3f")],
        ["density of the whole trajectory", _number(report.trajectory_density, ".3f")],
        ["PSNR to dense", _mean(report.psnr, ".2f", " dB")],
        ["  of another seed", _number(report.other_seed_psnr, ".2f", " dB")],
        ["  above another seed", _mean(report.above_other_seed, ".2f", " dB", "+")],
        [
            "  of another dense kernel",
            f"{_number(floor.psnr, '.2f', ' dB')} ({floor.kernel})" if floor else "-",
        ],
        ["SSIM to dense", _mean(report.ssim, ".4f")],
    ]
    if report.lpips is not None:
        rows.append(["LPIPS to dense", _mean(report.lpips, ".4f")])
    rows.append(["worst clip", f"{_number(worst.psnr)} dB ({above}): seed {worst.seed}, {shorten(worst.prompt, 60)!r}"])
    device = report.environment.get("device", "")
    rows.append(["machine", f"{device}, {report.environment.get('threads')} threads"])
    listing = text_table(
        [
            [
                _number(c.psnr),
                _number(c.above_other_seed, "+.2f"),
                _number(c.ssim, ".4f"),
                _number(c.lpips, ".4f"),
                f"{c.dense_loop_seconds:.2f}",
                f"{c.sparse_loop_seconds:.2f}",
                str(c.seed),
                shorten(c.prompt, 56),
            ]
            for c in report.clips
        ],
        header=["PSNR", "over seed", "SSIM", "LPIPS", "dense s", "sparse s", "seed", "prompt"],
        right=range(7),
    )
    parts = [text_table(rows), listing] if clips else [text_table(rows)]
    if report.broken:
        parts.append("\n".join(f"BROKEN: {line}" for line in report.broken))
    if report.notes:
        parts.append("\n".join(f"note: {line}" for line in report.notes))
    return "\n\n".join(parts)


def environment_table(found: dict[str, Any]) -> str:
    """`diffsparse env`, to paste into an issue."""
    rows = [[k, str(v)] for k, v in found.items() if not isinstance(v, (dict, list)) and v is not None]
    for gpu in found["gpus"] or []:
        rows.append(
            ["gpu", f"{gpu['name']}, sm {gpu['capability']}, {gpu['memory_gib']} GiB, {gpu['multiprocessors']} SMs"]
        )
    if not found["gpus"]:
        rows.append(["gpu", "none"])
    packages = [[name, value or "not installed"] for name, value in found["packages"].items()]
    backends = [[name, "available" if why is None else f"no: {why}"] for name, why in found["backends"].items()]
    return "\n\n".join([text_table(rows), "packages\n" + _indent(packages), "attention backends\n" + _indent(backends)])


def _indent(rows: Sequence[Sequence[str]]) -> str:
    return textwrap.indent(text_table(rows), "  ")


def models_data() -> dict[str, Any]:
    """Supported transformer classes, and those that cannot be, as plain data."""
    from dataclasses import asdict

    from diffsparse.pipelines.families import UNSUITABLE
    from diffsparse.pipelines.matrix import model_rows

    return {"models": [{**asdict(row), "grid": row.grid.shape} for row in model_rows()], "unsuitable": UNSUITABLE}


def models_table() -> str:
    """The same for reading in a terminal."""
    from diffsparse.pipelines.families import UNSUITABLE
    from diffsparse.pipelines.matrix import model_rows

    rows = [
        (row.model_class, row.order.split(" (")[0], row.size, f"{row.grid.num_visual:,}", shorten(row.stays_dense, 60))
        for row in model_rows()
    ]
    header = ("transformer", "sequence", "a usual size", "tokens", "stays dense")
    names = sorted(UNSUITABLE, key=str.lower)
    cannot = text_table([(name, shorten(UNSUITABLE[name], 100)) for name in names], ("cannot run sparse", "reason"))
    return f"{text_table(rows, header, right=(3,))}\n\n{cannot}\n"
