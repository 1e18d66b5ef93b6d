"""Lumina 2: one sequence of a caption without its padding, then an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.grid import TokenGrid
from diffsparse.pipelines.families.common import flat_patch, image_of
from diffsparse.pipelines.family import Family, UnknownGridError


def _grid(config: Any, arguments: Mapping[str, Any]) -> TokenGrid:
    # Values of the mask: one wait for the device per forward, as the model itself reads them next.
    captions = set(arguments["encoder_attention_mask"].sum(dim=1).tolist())
    if len(captions) > 1:
        raise UnknownGridError("captions of different lengths in one batch shift the images against each other")
    return TokenGrid(*image_of(arguments["hidden_states"], flat_patch(config)), text_before=int(captions.pop()))


FAMILIES = (
    Family(
        name="lumina2",
        classes=("Lumina2Transformer2DModel",),
        # The refiner of the caption has attention of its own, which stays as it is.
        layers=("noise_refiner.*.attn", "layers.*.attn"),
        grid=_grid,
        patch_size=flat_patch,
        text_position="before",
        visual_only=("noise_refiner.*.attn",),
        timestep_scale="unit_rising",
        head_dim=lambda config: int(config.hidden_size) // int(config.num_attention_heads),
        stays_dense="batches whose captions differ in length",
    ),
)
