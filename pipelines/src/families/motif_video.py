"""Motif-Video: one sequence of video, then image and text tokens; padded text is masked by a key mask.

The last single-stream layers may be a decoder: their sequence is the video twice, as it was before the first layer and
as it came out of the others, and holds no text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffsparse.grid import TokenGrid
from diffsparse.pipelines.families.common import text_length, timed_patch, video_of
from diffsparse.pipelines.family import Family


def _grid(config: Any, arguments: Mapping[str, Any]) -> TokenGrid:
    text = text_length(arguments)
    if arguments.get("image_embeds") is not None:
        text += text_length(arguments, "image_embeds")
    return TokenGrid(*video_of(arguments["hidden_states"], timed_patch(config)), text_after=text)


def _layer_grid(config: Any, layer: str, grid: TokenGrid) -> TokenGrid:
    """In decoder layers the encoders' video is text: patterns are of places, and it has the same places once more."""
    blocks, number, _ = layer.split(".")
    if blocks == "single_transformer_blocks" and int(number) >= config.num_single_layers - config.num_decoder_layers:
        return replace(grid, text_after=grid.num_visual)
    return grid


FAMILIES = (
    Family(
        name="motif_video",
        classes=("MotifVideoTransformer3DModel",),
        # Attention to the text alone has modules of its own, which stay as they are.
        layers=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        grid=_grid,
        patch_size=timed_patch,
        text_position="after",
        layer_grid=_layer_grid,
        stays_dense="in decoder layers, rows and columns of the encoders' video",
    ),
)
