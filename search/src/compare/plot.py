"""The picture of a comparison, by Pillow: quality against density, and against time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from diffsparse.search.compare.result import Comparison, RowResult

__all__ = ["colours", "pareto"]

PAPER, INK, FAINT, GRID = (255, 255, 255), (28, 32, 38), (110, 116, 124), (226, 229, 233)
#: Told apart by people with any colour vision (Okabe and Ito, 2008); markers tell methods of one colour apart.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7b5ea7", "#8c8c00")
MARKERS = ("circle", "square", "triangle", "diamond")
#: Searched plans stand out.
SEARCHED = "#111111"
#: Everything is drawn so many times as large and made smaller, which smooths its edges.
SCALE = 2
PANEL, LEGEND = (560, 440), 210


def colours(names: Sequence[str], searched: set[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each name."""
    plain = [name for name in names if name not in searched]
    found = {
        name: (COLOURS[i % len(COLOURS)], MARKERS[i // len(COLOURS) % len(MARKERS)]) for i, name in enumerate(plain)
    }
    return found | {name: (SEARCHED, MARKERS[i % len(MARKERS)]) for i, name in enumerate(sorted(searched))}


def pareto(comparison: Comparison) -> Image.Image:
    """PSNR against density and against the loop's time: a line for each method, the searched plans in black.

    A panel of times is left out where none was measured.
    """
    rows = [row for row in comparison.rows if row.psnr is not None]
    panels: list[tuple[str, Callable[[RowResult], float | None], float | None]] = [
        ("density, whole generation", lambda row: row.density, None)
    ]
    if any(row.loop_seconds for row in rows):
        panels.append(("seconds of the denoising loop", lambda row: row.loop_seconds, comparison.dense["loop_seconds"]))
    best = {row.name: max(r.psnr.mean for r in rows if r.name == row.name and r.psnr) for row in rows}
    names = sorted(best, key=lambda name: -best[name])
    styles = colours(names, {row.name for row in rows if row.searched})
    width, height = len(panels) * PANEL[0] + LEGEND, PANEL[1] + 40
    image = Image.new("RGB", (width * SCALE, height * SCALE), PAPER)
    pen = _Pen(ImageDraw.Draw(image))
    pen.text((20, 12), "PSNR to dense with the same seed, in dB: higher is better", INK, 15)
    for i, (title, value, dense) in enumerate(panels):
        _panel(pen, i * PANEL[0], title, rows, names, styles, value, comparison.other_seed_psnr, dense)
    _legend(pen, len(panels) * PANEL[0], names, styles)
    return image.resize((width, height), Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class _Pen:
    """Draws in pixels of the finished picture."""

    draw: ImageDraw.ImageDraw

    def text(self, at: tuple[float, float], text: str, colour: object, size: int, anchor: str = "la") -> None:
        font = ImageFont.load_default(size * SCALE)
        self.draw.text((at[0] * SCALE, at[1] * SCALE), text, fill=colour, font=font, anchor=anchor)  # type: ignore[arg-type]

    def line(self, points: Sequence[tuple[float, float]], colour: object, width: float = 1) -> None:
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        self.draw.line(scaled, fill=colour, width=round(width * SCALE), joint="curve")  # type: ignore[arg-type]

    def dashed(self, begin: tuple[float, float], end: tuple[float, float], colour: object) -> None:
        length = math.dist(begin, end)
        for i in range(0, int(length), 9):
            a, b = i / length, min(i + 5, length) / length
            points = [(begin[0] + s * (end[0] - begin[0]), begin[1] + s * (end[1] - begin[1])) for s in (a, b)]
            self.line(points, colour)

    def marker(self, at: tuple[float, float], kind: str, colour: str, size: float) -> None:
        (x, y), r = (at[0] * SCALE, at[1] * SCALE), size * SCALE
        if kind == "circle":
            self.draw.ellipse((x - r, y - r, x + r, y + r), fill=colour, outline=PAPER, width=SCALE)
            return
        shapes = {
            "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
            "triangle": [(0, -1.1), (1.1, 0.9), (-1.1, 0.9)],
            "diamond": [(0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)],
        }
        self.draw.polygon([(x + r * a, y + r * b) for a, b in shapes[kind]], fill=colour, outline=PAPER, width=SCALE)


def _panel(
    pen: _Pen,
    left: float,
    title: str,
    rows: Sequence[RowResult],
    names: Sequence[str],
    styles: dict[str, tuple[str, str]],
    value: Callable[[RowResult], float | None],
    floor: float | None,
    dense: float | None,
) -> None:
    """``floor``: the PSNR of another seed. ``dense``: where dense attention is on the horizontal axis."""
    points = {
        name: sorted((x, row.psnr.mean) for row in rows if row.name == name and row.psnr and (x := value(row)))
        for name in names
    }
    across = [x for line in points.values() for x, _ in line] + ([dense] if dense else [])
    upwards = [y for line in points.values() for _, y in line] + ([floor] if floor is not None else [])
    if not across:
        pen.text((left + 60, 200), "nothing was measured yet", FAINT, 14)
        return
    x_ticks, y_ticks = _ticks(min(across), max(across)), _ticks(min(upwards), max(upwards))
    x0, x1, y0, y1 = left + 62, left + PANEL[0] - 18, PANEL[1] - 20, 52

    def place(x: float, y: float) -> tuple[float, float]:
        u, v = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]), (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return x0 + u * (x1 - x0), y0 + v * (y1 - y0)

    for tick in x_ticks:
        x, _ = place(tick, y_ticks[0])
        pen.line([(x, y0), (x, y1)], GRID)
        pen.text((x, y0 + 7), f"{tick:.4g}", FAINT, 12, "ma")
    for tick in y_ticks:
        _, y = place(x_ticks[0], tick)
        pen.line([(x0, y), (x1, y)], GRID)
        pen.text((x0 - 8, y), f"{tick:.4g}", FAINT, 12, "rm")
    pen.text(((x0 + x1) / 2, y0 + 28), title, INK, 13, "ma")
    if floor is not None:
        begin, end = place(x_ticks[0], floor), place(x_ticks[-1], floor)
        pen.dashed(begin, end, FAINT)
        pen.text((end[0] - 4, end[1] - 3), "another seed (F)", FAINT, 11, "rd")
    if dense:
        begin, end = place(dense, y_ticks[0]), place(dense, y_ticks[-1])
        pen.dashed(begin, end, FAINT)
        pen.text((end[0] - 4, end[1] + 4), "dense", FAINT, 11, "ra")
    # The best is drawn last, over the others.
    for name in reversed(names):
        colour, marker = styles[name]
        line = [place(x, y) for x, y in points[name]]
        heavy = colour == SEARCHED
        if len(line) > 1:
            pen.line(line, colour, 2.5 if heavy else 1.4)
        for at in line:
            pen.marker(at, marker, colour, 6 if heavy else 4.5)


def _legend(pen: _Pen, left: float, names: Sequence[str], styles: dict[str, tuple[str, str]]) -> None:
    step = min(21.0, (PANEL[1] - 60) / max(1, len(names)))
    pen.text((left + 4, 50), "best first", FAINT, 12)
    for i, name in enumerate(names):
        y = 78 + i * step
        colour, marker = styles[name]
        pen.line([(left + 2, y), (left + 26, y)], colour, 2.5 if colour == SEARCHED else 1.4)
        pen.marker((left + 14, y), marker, colour, 5)
        pen.text((left + 34, y), name if len(name) < 24 else name[:23] + "…", INK, 13, "lm")


def _ticks(low: float, high: float) -> list[float]:
    """About six round numbers around what is shown."""
    span = max(high - low, 1e-3 * max(abs(high), 1e-6))
    rough = span / 5
    unit = 10 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    return [round(i * step, 10) for i in range(first, last + 1)]
