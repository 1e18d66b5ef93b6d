"""Krea 2: one sequence of text (padding masked by a key mask), then an image."""

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
    text = text_length(arguments)
    return images_by_ids(arguments["position_ids"], arguments["hidden_states"].shape[1], text, skip=text)


FAMILIES = (
    Family(
        name="krea2",
        classes=("Krea2Transformer2DModel",),
        # The fusion of text layers has attention of its own, which stays as it is.
        layers=("transformer_blocks.*.attn",),
        grid=_grid,
        patch_size=_patch_size,
        text_position="before",
        timestep_scale="unit",
        stays_dense="several images in one sequence",
    ),
)
