"""Flux: one sequence of text, then an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.grid import TokenGrid
from diffsparse.pipelines.families.common import images_by_ids, text_length
from diffsparse.pipelines.family import Family


def _patch_size(config: Any) -> tuple[int, int, int]:
    # The pipeline packs 2 x 2 latent pixels into a token before the model sees them.
    return (1, 2, 2)


def _grid(config: Any, arguments: Mapping[str, Any]) -> TokenGrid:
    return images_by_ids(arguments.get("img_ids"), arguments["hidden_states"].shape[1], text_length(arguments))


FAMILIES = (
    Family(
        name="flux",
        classes=("FluxTransformer2DModel",),
        layers=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        grid=_grid,
        patch_size=_patch_size,
        text_position="before",
        timestep_scale="unit",
    ),
)
