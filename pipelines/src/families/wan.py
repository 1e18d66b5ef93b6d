"""Wan 2.1 and 2.2 (both transformers), and VACE: video only, text by cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.grid import TokenGrid
from diffsparse.pipelines.families.common import cubic_patch, video_of
from diffsparse.pipelines.family import Family


def _grid(config: Any, arguments: Mapping[str, Any]) -> TokenGrid:
    return TokenGrid(*video_of(arguments["hidden_states"], cubic_patch(config)))


FAMILIES = (
    Family(
        name="wan",
        classes=("WanTransformer3DModel", "WanVACETransformer3DModel"),
        layers=("blocks.*.attn1", "vace_blocks.*.attn1"),
        grid=_grid,
        patch_size=cubic_patch,
    ),
)
