"""Bria Fibo 2: one sequence of gist tokens (the text, resampled), the image, and images to edit behind it.

Blocks at the start hold the images alone; some later ones have cross-attention to the text besides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffsparse.grid import TokenGrid
from diffsparse.pipelines._diffusers import gist_counts
from diffsparse.pipelines.families.common import flat_patch, image_of, images
from diffsparse.pipelines.family import Family


def _gist_tokens(config: Any, arguments: Mapping[str, Any]) -> tuple[int, bool]:
    """How many gist tokens the sequence has, and whether some item's are padding."""
    mask, text = arguments.get("encoder_attention_mask"), arguments["encoder_hidden_states"]
    counts = gist_counts(
        # Waits for the device where prompts are padded, as the model itself does.
        [text.shape[2]] if mask is None else mask.sum(dim=1).tolist(),
        min_gist=config.min_num_gist_tokens,
        max_gist=config.max_num_gist_tokens,
        gist_step=config.gist_step,
        min_text_len=config.gist_min_text_len,
        max_text_len=config.gist_max_text_len,
    )
    return max(counts), min(counts) < max(counts)


def _grid(config: Any, arguments: Mapping[str, Any]) -> TokenGrid:
    patch = flat_patch(config)
    latents = [arguments["hidden_states"], *(arguments.get("context_latents") or ())]
    grid = images([image_of(x, patch) for x in latents])
    text, padded = _gist_tokens(config, arguments)
    # The model puts them behind the images where some are padding.
    return replace(grid, text_after=grid.text_after + text) if padded else replace(grid, text_before=text)


def _heads(config: Any) -> int:
    return int(config.n_heads)


def _head_dim(config: Any) -> int:
    return int(config.dim) // int(config.n_heads)


FAMILIES = (
    Family(
        name="bria_fibo2",
        classes=("BriaFibo2Transformer2DModel",),
        layers=("noise_refiner.*.attention", "layers.*.attention"),
        grid=_grid,
        patch_size=flat_patch,
        text_position="before",
        visual_only=("noise_refiner.*.attention",),
        timestep_scale="unit",
        heads=_heads,
        head_dim=_head_dim,
        stays_dense="the refiner where context images have another size",
    ),
)
