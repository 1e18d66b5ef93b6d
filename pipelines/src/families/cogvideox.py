"""CogVideoX (1.0 and 1.5, image-to-video, Fun) and ConsisID: one sequence of text (padded, not masked), then video."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.grid import TokenGrid
from diffsparse.pipelines.family import Family


def _patch_size(config: Any) -> tuple[int, int, int]:
    # Only 1.5 has patches of several frames; ConsisID does not know the name.
    return (int(getattr(config, "patch_size_t", None) or 1), int(config.patch_size), int(config.patch_size))


def _grid(config: Any, arguments: Mapping[str, Any]) -> TokenGrid:
    _, frames, _, height, width = arguments["hidden_states"].shape  # [B, T, C, H, W]
    t, h, w = _patch_size(config)
    text = arguments["encoder_hidden_states"].shape[1]
    return TokenGrid(-(-frames // t), height // h, width // w, text_before=text)


FAMILIES = (
    Family(
        name="cogvideox",
        classes=("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"),
        # ConsisID's attention to the face has modules of its own, which stay as they are.
        layers=("transformer_blocks.*.attn1",),
        grid=_grid,
        patch_size=_patch_size,
        text_position="before",
    ),
)
