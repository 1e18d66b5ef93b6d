"""Ernie-Image: one sequence of an image, then text; padded text is masked by a key mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.grid import TokenGrid
from diffsparse.pipelines.families.common import flat_patch, image_of, text_length
from diffsparse.pipelines.family import Family


def _grid(config: Any, arguments: Mapping[str, Any]) -> TokenGrid:
    image = image_of(arguments["hidden_states"], flat_patch(config))
    return TokenGrid(*image, text_after=text_length(arguments, "text_bth"))


FAMILIES = (
    Family(
        name="ernie_image",
        classes=("ErnieImageTransformer2DModel",),
        layers=("layers.*.self_attention",),
        grid=_grid,
        patch_size=flat_patch,
        text_position="after",
        head_dim=lambda config: int(config.hidden_size) // int(config.num_attention_heads),
        stays_dense="calls without text",
    ),
)
