"""Plans of windows and bands with the density that a setting asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffsparse.entry import Execution, HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.layout import build_layout
from diffsparse.order import AxisOrder, RasterOrder, TokenOrder
from diffsparse.patterns import Band, Pattern, Window
from diffsparse.pipelines import architecture_of
from diffsparse.plan import SparsityPlan
from diffsparse.schedule import Schedule

__all__ = ["nearest", "plan_of"]


def nearest(
    make: Callable[[float], Pattern], order: TokenOrder, grid: TokenGrid, density: float, block_size: int
) -> tuple[Pattern, float]:
    """The pattern of a family, ``make(x)`` with x in (0, 1] and denser as x grows, whose kept density is nearest."""

    def kept(pattern: Pattern) -> float:
        return build_layout(grid, [HeadEntry(order, pattern)], block_size).density

    low, high = 0.0, 1.0
    found: list[tuple[float, Pattern, float]] = []
    for _ in range(12):
        x = (low + high) / 2
        pattern = make(x)
        got = kept(pattern)
        found.append((abs(got - density), pattern, got))
        low, high = (x, high) if got < density else (low, x)
    _, pattern, got = min(found, key=lambda item: item[0])
    return pattern, got


def plan_of(
    transformer: Any, grid: TokenGrid, density: float, tail: str, block_size: int, kind: str, numerics: str = "auto"
) -> SparsityPlan:
    """All layers alike: windows over all frames (``window``), bands along the sequence (``band``), or in turn
    (``mixed``).

    A window's tokens are ordered by height, then width, then frame. So a block is a few sites through all frames, which
    fills it on every grid, and a window of the same density reaches farther than on tiles of one frame.
    """
    architecture = architecture_of(transformer)
    families: dict[str, tuple[Callable[[float], Pattern], TokenOrder]] = {
        "window": (lambda x: Window((None, x, x)), AxisOrder("HWF")),
        "band": (Band, RasterOrder()),
    }
    execution = Execution(tail=tail, numerics=numerics)
    entries = []
    for name in ("window", "band") if kind == "mixed" else (kind,):
        make, order = families[name]
        entries.append(HeadEntry(order, nearest(make, order, grid, density, block_size)[0], execution=execution))
    heads = [entries[h % len(entries)] for h in range(architecture.heads)]
    return SparsityPlan.from_table(
        {layer: [heads] for layer in architecture.layers}, schedule=Schedule(), block_size=block_size
    )
