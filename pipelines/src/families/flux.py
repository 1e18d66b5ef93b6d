"""Flux: one sequence of text, then an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.grid import TokenGrid
from diffsparse.pipelines.family import Family, UnknownGridError


def _patch_size(config: Any) -> tuple[int, int, int]:
    # The pipeline packs 2 x 2 latent pixels into a token before the model sees them.
    return (1, 2, 2)


def _grid(config: Any, arguments: Mapping[str, Any]) -> TokenGrid:
    tokens = arguments["hidden_states"].shape[1]  # [B, S, C]
    text = arguments["encoder_hidden_states"].shape[1]
    ids = arguments.get("img_ids")
    if ids is None:
        raise UnknownGridError("img_ids is missing, which tells the image's height and width")
    ids = ids[0] if ids.ndim == 3 else ids  # [S, 3] as (reference, row, column)
    # Portrait and landscape have as many tokens, so the values must be read: one wait for the device per forward.
    reference, height, width = (int(n) for n in ids.amax(0).tolist())
    height, width = height + 1, width + 1
    if reference or height * width != tokens:
        raise UnknownGridError(f"{tokens} image tokens are not one image of {height} x {width}")
    return TokenGrid(1, height, width, text_before=text)


FLUX = Family(
    name="flux",
    classes=("FluxTransformer2DModel",),
    layers=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    grid=_grid,
    patch_size=_patch_size,
    text_position="before",
    timestep_scale="unit",
)
