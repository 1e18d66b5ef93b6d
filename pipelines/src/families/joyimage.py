"""JoyImage-Edit and Edit-Plus: one sequence of the image and its references, then text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffsparse.grid import TokenGrid
from diffsparse.pipelines.families.common import cubic_patch, images, text_length, video_of
from diffsparse.pipelines.family import Family, UnknownGridError


def _head_dim(config: Any) -> int:
    return int(config.hidden_size) // int(config.num_attention_heads)


def _edit_grid(config: Any, arguments: Mapping[str, Any]) -> TokenGrid:
    hidden_states = arguments["hidden_states"]  # [B, C, T, H, W], or [B, N, C, T, H, W] with references
    copies = 1
    if hidden_states.ndim == 6:
        # All have one size. The model puts the image before its references and joins them in time.
        copies, hidden_states = hidden_states.shape[1], hidden_states[:, 0]
    frames, height, width = video_of(hidden_states, cubic_patch(config))
    return TokenGrid(copies * frames, height, width, text_after=text_length(arguments))


def _plus_grid(config: Any, arguments: Mapping[str, Any]) -> TokenGrid:
    items = [[(int(t), int(h), int(w)) for t, h, w in item] for item in arguments["shape_list"]]
    if any(item[0] != items[0][0] for item in items):
        raise UnknownGridError("the images of the batch have different sizes")
    # Where references differ from item to item, they count as text; so does the padding behind them, which is masked.
    grid = images(items[0] if all(item == items[0] for item in items) else items[0][:1])
    rest = arguments["hidden_states"].shape[1] - grid.num_visual
    return replace(grid, text_after=rest + text_length(arguments))


FAMILIES = (
    Family(
        name="joyimage_edit",
        classes=("JoyImageEditTransformer3DModel",),
        layers=("double_blocks.*.attn",),
        grid=_edit_grid,
        patch_size=cubic_patch,
        text_position="after",
        head_dim=_head_dim,
    ),
    Family(
        name="joyimage_edit_plus",
        classes=("JoyImageEditPlusTransformer3DModel",),
        layers=("double_blocks.*.attn",),
        grid=_plus_grid,
        patch_size=cubic_patch,
        text_position="after",
        head_dim=_head_dim,
        stays_dense="batches whose images differ in size",
    ),
)
