"""Flux 2: one sequence of text, the image, and reference images behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.grid import TokenGrid
from diffsparse.pipelines.families.common import packed_images, packed_patch
from diffsparse.pipelines.family import Family, UnknownGridError


def _grid(config: Any, arguments: Mapping[str, Any]) -> TokenGrid:
    mode = arguments.get("kv_cache_mode")
    if (mode == "extract" and arguments.get("num_ref_tokens")) or (mode == "cached" and arguments.get("kv_cache")):
        raise UnknownGridError("reference images with a key-value cache, where queries and keys differ")
    return packed_images(config, arguments)


FAMILIES = (
    Family(
        name="flux2",
        classes=("Flux2Transformer2DModel",),
        layers=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        grid=_grid,
        patch_size=packed_patch,
        text_position="before",
        timestep_scale="unit",
        stays_dense="editing with a cache of the references' keys",
    ),
)
