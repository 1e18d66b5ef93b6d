"""HunyuanVideo: one sequence of video, then text; padded text is masked by a key mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.grid import TokenGrid
from diffsparse.pipelines.families.common import text_length, video_of
from diffsparse.pipelines.family import Family


def _patch_size(config: Any) -> tuple[int, int, int]:
    return (int(config.patch_size_t), int(config.patch_size), int(config.patch_size))


def _grid(config: Any, arguments: Mapping[str, Any]) -> TokenGrid:
    return TokenGrid(*video_of(arguments["hidden_states"], _patch_size(config)), text_after=text_length(arguments))


FAMILIES = (
    Family(
        name="hunyuan_video",
        classes=("HunyuanVideoTransformer3DModel",),
        # The token refiner of the text has attention of its own, which stays as it is.
        layers=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        grid=_grid,
        patch_size=_patch_size,
        text_position="after",
    ),
)
