"""Allegro: video only, text by cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.grid import TokenGrid
from diffsparse.pipelines.families.common import timed_patch, video_of
from diffsparse.pipelines.family import Family


def _grid(config: Any, arguments: Mapping[str, Any]) -> TokenGrid:
    return TokenGrid(*video_of(arguments["hidden_states"], timed_patch(config)))


FAMILIES = (
    Family(
        name="allegro",
        classes=("AllegroTransformer3DModel",),
        layers=("transformer_blocks.*.attn1",),
        grid=_grid,
        patch_size=timed_patch,
        stays_dense="calls with a mask over the video",
    ),
)
