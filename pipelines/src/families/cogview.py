"""CogView 3 Plus and 4, GLM-Image: one sequence of text (padded, not masked), then an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.grid import TokenGrid
from diffsparse.pipelines.families.common import flat_patch, image_of, text_length
from diffsparse.pipelines.family import Family, UnknownGridError


def _grid(config: Any, arguments: Mapping[str, Any]) -> TokenGrid:
    caches = arguments.get("kv_caches")  # GLM-Image with reference images
    mode = None if caches is None else caches[0].mode
    if mode == "write":
        raise UnknownGridError("keys of a reference image are being kept for all steps")
    if mode == "read":
        raise UnknownGridError("kept keys of reference images stand before the image's own")
    image = image_of(arguments["hidden_states"], flat_patch(config))
    return TokenGrid(*image, text_before=text_length(arguments))


FAMILIES = (
    Family(
        name="cogview",
        classes=("CogView4Transformer2DModel", "CogView3PlusTransformer2DModel", "GlmImageTransformer2DModel"),
        layers=("transformer_blocks.*.attn1",),
        grid=_grid,
        patch_size=flat_patch,
        text_position="before",
        stays_dense="calls with a text mask; GLM-Image with reference images",
    ),
)
