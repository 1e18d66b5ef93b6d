"""Stable Diffusion 3 and 3.5: one sequence of the image, then text (padded, not masked).

Some blocks of 3.5-medium have a second attention besides, over the image alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.grid import TokenGrid
from diffsparse.pipelines.families.common import flat_patch, image_of, text_length
from diffsparse.pipelines.family import Family


def _grid(config: Any, arguments: Mapping[str, Any]) -> TokenGrid:
    return TokenGrid(*image_of(arguments["hidden_states"], flat_patch(config)), text_after=text_length(arguments))


FAMILIES = (
    Family(
        name="sd3",
        classes=("SD3Transformer2DModel",),
        layers=("transformer_blocks.*.attn", "transformer_blocks.*.attn2"),
        grid=_grid,
        patch_size=flat_patch,
        text_position="after",
        visual_only=("transformer_blocks.*.attn2",),
        stays_dense="the perturbed half of perturbed-attention guidance",
    ),
)
