"""Draws the patterns of the documentation with ``Pattern.preview``, into ``docs/pictures/``.

    python docs/scripts/pictures.py

Two colours and few pixels, so each file is less than a kilobyte. A test holds them fresh.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from diffsparse import (
    Band,
    Columns,
    Diagonals,
    GridStripes,
    Pattern,
    Radial,
    RasterOrder,
    Sink,
    TileOrder,
    TokenGrid,
    TokenOrder,
    Window,
)

FOLDER = Path(__file__).resolve().parents[1] / "pictures"

#: 4 frames of 32 x 64 latent tokens: 128 blocks of 64.
GRID = TokenGrid(4, 32, 64)
RASTER, TILE = RasterOrder(), TileOrder(1, 8, 8)
NEAR = Window((3, 0.3, 0.3))

PICTURES: dict[str, tuple[Pattern, TokenOrder]] = {
    "window_raster": (NEAR, RASTER),
    "window_tile": (NEAR, TILE),
    "radial": (Radial(decay=0.4), RASTER),
    "diagonals": (Diagonals(((0, 0, 0), (1, 0, 8), (2, 0, 16)), (0, 0, 0)), TILE),
    "band": (Band(0.08), RASTER),
    "columns": (Columns(((0, 1, 0.25, 0.5, 0.25, 0.5),)), TILE),
    "grid": (GridStripes("frame", key_phases=(0.2,), query_phases=(0.7,)), RASTER),
    "sink": (Sink(frames=1) | Window((1, None, None)), RASTER),
}


def draw(name: str) -> Image.Image:
    """One picture, two colours."""
    pattern, order = PICTURES[name]
    return pattern.preview(GRID, order).quantize(2)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in PICTURES:
        draw(name).save(FOLDER / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
