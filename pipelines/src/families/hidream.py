"""HiDream: one sequence of an image, then T5 text and Llama text twice (of the last layer and of the block's own)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.grid import TokenGrid
from diffsparse.pipelines.families.common import flat_patch, image_of
from diffsparse.pipelines.family import Family, UnknownGridError


def _grid(config: Any, arguments: Mapping[str, Any]) -> TokenGrid:
    hidden_states = arguments["hidden_states"]
    if hidden_states.ndim != 4:
        raise UnknownGridError("images of several sizes packed into one batch")
    grid = TokenGrid(*image_of(hidden_states, flat_patch(config)))
    text = arguments["encoder_hidden_states_t5"].shape[1] + 2 * arguments["encoder_hidden_states_llama3"][0].shape[1]
    if grid.height != grid.width:
        # An image that is not square is padded to the largest size. Padding is not masked: its keys are 0 and count.
        height, width = config.max_resolution
        text += height * width // config.patch_size**2 - grid.num_visual
    return TokenGrid(*grid.shape, text_after=text)


FAMILIES = (
    Family(
        name="hidream",
        classes=("HiDreamImageTransformer2DModel",),
        layers=("double_stream_blocks.*.block.attn1", "single_stream_blocks.*.block.attn1"),
        grid=_grid,
        patch_size=flat_patch,
        text_position="after",
        timestep="timesteps",
        stays_dense="packed input",
    ),
)
