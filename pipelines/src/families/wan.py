"""Wan 2.1 and 2.2 (both transformers), and VACE: video only, text by cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.grid import TokenGrid
from diffsparse.pipelines.family import Family


def _patch_size(config: Any) -> tuple[int, int, int]:
    t, h, w = config.patch_size
    return (int(t), int(h), int(w))


def _grid(config: Any, arguments: Mapping[str, Any]) -> TokenGrid:
    frames, height, width = arguments["hidden_states"].shape[2:]  # [B, C, T, H, W]
    t, h, w = _patch_size(config)
    return TokenGrid(frames // t, height // h, width // w)


WAN = Family(
    name="wan",
    classes=("WanTransformer3DModel", "WanVACETransformer3DModel"),
    layers=("blocks.*.attn1", "vace_blocks.*.attn1"),
    grid=_grid,
    patch_size=_patch_size,
)
