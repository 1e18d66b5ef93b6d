"""Helios: one sequence of past video (far, middle, near), then the clip; text by cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.grid import TokenGrid
from diffsparse.pipelines.families.common import cubic_patch, video_of
from diffsparse.pipelines.family import Family

# How many times larger than the clip's tokens those of each part of the past are, along every axis.
_COARSENESS = {"short": 1, "mid": 2, "long": 4}


def _past(config: Any, arguments: Mapping[str, Any]) -> int:
    """Tokens of the past, all parts together."""
    total = 0
    for name, factor in _COARSENESS.items():
        latents = arguments.get(f"latents_history_{name}")
        if latents is None or arguments.get(f"indices_latents_history_{name}") is None:
            continue
        t, h, w = (factor * size for size in cubic_patch(config))
        # The model pads the coarser parts to whole tokens.
        frames, height, width = (-(-size // patch) for size, patch in zip(latents.shape[2:], (t, h, w)))
        total += frames * height * width
    return total


def _grid(config: Any, arguments: Mapping[str, Any]) -> TokenGrid:
    size = video_of(arguments["hidden_states"], cubic_patch(config))
    # The past has other token sizes than the clip, so it counts as text: always exact.
    return TokenGrid(*size, text_before=_past(config, arguments))


FAMILIES = (
    Family(
        name="helios",
        classes=("HeliosTransformer3DModel",),
        layers=("blocks.*.attn1",),
        grid=_grid,
        patch_size=cubic_patch,
        text_position="before",
        stays_dense="rows and columns of the past before the video",
    ),
)
