"""PixArt, Hunyuan-DiT: an image only, text by cross-attention. DiT: an image only, no text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.grid import TokenGrid
from diffsparse.pipelines.families.common import flat_patch, image_of
from diffsparse.pipelines.family import Family


def _grid(config: Any, arguments: Mapping[str, Any]) -> TokenGrid:
    return TokenGrid(*image_of(arguments["hidden_states"], flat_patch(config)))


FAMILIES = (
    Family(
        name="pixart",
        classes=("PixArtTransformer2DModel",),
        layers=("transformer_blocks.*.attn1",),
        grid=_grid,
        patch_size=flat_patch,
        stays_dense="calls with a mask over the image",
    ),
    Family(
        name="dit",
        classes=("DiTTransformer2DModel",),
        layers=("transformer_blocks.*.attn1",),
        grid=_grid,
        patch_size=flat_patch,
    ),
    Family(
        name="hunyuan_dit",
        classes=("HunyuanDiT2DModel",),
        layers=("blocks.*.attn1",),
        grid=_grid,
        patch_size=flat_patch,
    ),
)
