"""Flux 3: blocks over the image, over reference images and over text, then blocks over all three in one sequence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffsparse.grid import TokenGrid
from diffsparse.pipelines.families.common import packed_images, packed_patch
from diffsparse.pipelines.family import Family


def _grid(config: Any, arguments: Mapping[str, Any]) -> TokenGrid:
    grid = packed_images(config, arguments)
    references = arguments.get("image_cond_hidden_states")
    # Reference images count as text even in the size of the image: the blocks before hold the image alone.
    return grid if references is None else replace(grid, text_after=grid.text_after + references.shape[1])


FAMILIES = (
    Family(
        name="flux3",
        classes=("Flux3Transformer2DModel",),
        # Left alone: mode_blocks.image_cond and txt_mode_blocks, which hold no image tokens.
        layers=("mode_blocks.image.*.attn", "single_transformer_blocks.*.attn"),
        grid=_grid,
        patch_size=packed_patch,
        text_position="before",
        visual_only=("mode_blocks.image.*.attn",),
        timestep_scale="unit",
    ),
)
