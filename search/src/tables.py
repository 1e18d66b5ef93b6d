"""What the commands print for readers: an evaluation, the environment, the models."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from diffsparse.search.columns import fold, shorten, terminal_width, text_table

if TYPE_CHECKING:
    from diffsparse.search.evaluate import EvalReport
    from diffsparse.search.statistics import Mean

__all__ = ["environment_table", "eval_table", "models_data", "models_table"]


def _number(value: float | None, form: str = ".2f", unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _mean(value: Mean | None, values: Sequence[float | None], form: str, unit: str = "", plus: str = "") -> str:
    """The mean with its interval; of too few clips for one, with each clip's value."""
    if value is None:
        return "-"
    text = f"{value.mean:{plus}{form}}{unit}"
    if value.low is not None and value.high is not None:
        return f"{text}  (95%: {value.low:{plus}{form}} to {value.high:{plus}{form}})"
    if len(values) == 1:
        return text
    return f"{text}  ({len(values)} clips: {', '.join(_number(v, plus + form) for v in values)})"


def eval_table(report: EvalReport, clips: bool = True, width: int | None = None) -> str:
    """The figures of a comparison, and its ``clips`` one a line, in ``width`` columns (None: the terminal's)."""
    n = len(report.clips)
    worst = report.worst
    above = _number(worst.above_other_seed, "+.1f", " dB above another seed")
    floor = report.noise_floor
    dense, sparse = (sum(getattr(c, f"{side}_loop_seconds") for c in report.clips) / n for side in ("dense", "sparse"))
    dense_all, sparse_all = (
        sum(getattr(c, f"{side}_seconds") for c in report.clips) / n for side in ("dense", "sparse")
    )

    def mean(name: str, form: str, unit: str = "", plus: str = "") -> str:
        return _mean(getattr(report, name), [getattr(c, name) for c in report.clips], form, unit, plus)

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
        ["PSNR to dense", mean("psnr", ".2f", " dB")],
        ["  of another seed", _number(report.other_seed_psnr, ".2f", " dB")],
        ["  above another seed", mean("above_other_seed", ".2f", " dB", "+")],
        [
            "  of another dense kernel",
            f"{_number(floor.psnr, '.2f', ' dB')} ({floor.kernel})" if floor else "-",
        ],
        ["SSIM to dense", mean("ssim", ".4f")],
    ]
    if report.lpips is not None:
        rows.append(["LPIPS to dense", mean("lpips", ".4f")])
    rows.append(
        ["worst clip", f"{_number(worst.psnr)} dB ({above}): seed {worst.seed}, {shorten(worst.prompt, 110)!r}"]
    )
    uneven = [
        f"{value:.2f} times {where}"
        for value, where in (
            (report.border_error, "the middle's along the edges"),
            (report.last_frame_error, "the others' in the last frame"),
        )
        if value is not None
    ]
    if uneven:
        rows.append(["squared error", ", ".join(uneven)])
    if by_frame := _by_frame(report.frame_errors):
        rows.append(["  by frame", by_frame])
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
                shorten(c.prompt, 110),
            ]
            for c in report.clips
        ],
        header=["PSNR", "over seed", "SSIM", "LPIPS", "dense s", "sparse s", "seed", "prompt"],
        right=range(7),
        width=width,
    )
    figures = text_table(rows, width=width)
    parts = [figures, listing] if clips else [figures]
    if report.broken:
        parts.append("\n".join(fold(f"BROKEN: {line}", width, "  ") for line in report.broken))
    if report.notes:
        parts.append("\n".join(fold(f"note: {line}", width, "  ") for line in report.notes))
    parts.append(fold(report.verdict, width))
    return "\n\n".join(parts)


def _by_frame(errors: list[float] | None) -> str | None:
    """How errors are spread over frames, in words; None for an image and for equal clips."""
    if errors is None or len(errors) < 2 or not sum(errors):
        return None
    shares = [error * len(errors) / sum(errors) for error in errors]
    most, least = (shares.index(pick(shares)) for pick in (max, min))
    lowest, highest = f"{shares[least]:.2f} (frame {least + 1})", f"{shares[most]:.2f} (frame {most + 1})"
    return f"{lowest} to {highest} times the mean of all {len(shares)}"


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
    ways = found["backend_ways"]
    backends = [
        [name, f"no: {why}" if why is not None else f"available: {ways[name]}" if name in ways else "available"]
        for name, why in found["backends"].items()
    ]
    return "\n\n".join([text_table(rows), "packages\n" + _indent(packages), "attention backends\n" + _indent(backends)])


def _indent(rows: Sequence[Sequence[str]]) -> str:
    return textwrap.indent(text_table(rows, width=terminal_width() - 2), "  ")


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
        (row.model_class, row.order.split(" (")[0], row.size, f"{row.grid.num_visual:,}", row.stays_dense)
        for row in model_rows()
    ]
    header = ("transformer", "sequence", "a usual size", "tokens", "stays dense")
    names = sorted(UNSUITABLE, key=str.lower)
    cannot = text_table([(name, UNSUITABLE[name]) for name in names], ("cannot run sparse", "reason"))
    return f"{text_table(rows, header, right=(3,))}\n\n{cannot}\n"
