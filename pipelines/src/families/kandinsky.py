"""Kandinsky 5 and 6: video (or an image) only, text by cross-attention; the sound of Kandinsky 6 has its own layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.grid import TokenGrid
from diffsparse.pipelines.families.common import cubic_patch
from diffsparse.pipelines.family import Family, UnknownGridError


def _head_dim(config: Any) -> int:
    return int(sum(config.axes_dims))


def _heads(config: Any) -> int:
    return int(config.model_dim) // _head_dim(config)


def _grid(config: Any, arguments: Mapping[str, Any]) -> TokenGrid:
    if arguments.get("sparse_params") is not None:
        # Tokens come in tiles of 8 x 8 then, and a block mask made from queries and keys goes with them.
        raise UnknownGridError("the model runs its own sparse attention (NABLA), which orders tokens in another way")
    _, frames, height, width, _ = arguments["hidden_states"].shape  # [B, T, H, W, C]
    t, h, w = cubic_patch(config)
    return TokenGrid(frames // t, height // h, width // w)


def _grid6(config: Any, arguments: Mapping[str, Any]) -> TokenGrid:
    grid = _grid(config, arguments)
    if arguments.get("visual_token_type_ids") is None:
        return grid
    # The last frame is the picture to begin with, at the position of the first one: it counts as text, always exact.
    return TokenGrid(grid.frames - 1, grid.height, grid.width, text_after=grid.tokens_per_frame)


FAMILIES = (
    Family(
        name="kandinsky5",
        classes=("Kandinsky5Transformer3DModel",),
        layers=("visual_transformer_blocks.*.self_attention",),
        grid=_grid,
        patch_size=cubic_patch,
        heads=_heads,
        head_dim=_head_dim,
        stays_dense="models with NABLA, a sparse attention of their own",
    ),
    Family(
        name="kandinsky6",
        classes=("Kandinsky6Transformer3DModel",),
        layers=("visual_transformer_blocks.*.video_dec_block.self_attention",),
        grid=_grid6,
        patch_size=cubic_patch,
        heads=_heads,
        head_dim=_head_dim,
        stays_dense="the audio stream",
    ),
)

UNSUITABLE = {
    "Kandinsky6SRTransformer3DModel": (
        "it always runs its own sparse attention (NABLA), whose pattern is computed from queries and keys at every call"
    ),
}
