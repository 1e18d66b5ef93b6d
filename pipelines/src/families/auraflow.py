"""AuraFlow: one sequence of register tokens, text (padded, not masked), then the image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.grid import TokenGrid
from diffsparse.pipelines.families.common import flat_patch, image_of, text_length
from diffsparse.pipelines.family import Family

REGISTERS = 8


def _grid(config: Any, arguments: Mapping[str, Any]) -> TokenGrid:
    image = image_of(arguments["hidden_states"], flat_patch(config))
    return TokenGrid(*image, text_before=REGISTERS + text_length(arguments))


FAMILIES = (
    Family(
        name="auraflow",
        classes=("AuraFlowTransformer2DModel",),
        layers=("joint_transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        grid=_grid,
        patch_size=flat_patch,
        text_position="before",
        timestep_scale="unit",
    ),
)
