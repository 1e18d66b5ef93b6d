"""HunyuanImage 2.1 and its refiner: one sequence of the image, then text of one or two encoders.

Padded text is masked by a key mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.grid import TokenGrid
from diffsparse.pipelines.families.common import text_length
from diffsparse.pipelines.family import Family


def _patch_size(config: Any) -> tuple[int, int, int]:
    t, h, w = (1, *config.patch_size)[-3:]  # the refiner's has three axes
    return (int(t), int(h), int(w))


def _grid(config: Any, arguments: Mapping[str, Any]) -> TokenGrid:
    t, h, w = _patch_size(config)
    frames, height, width = (1, *arguments["hidden_states"].shape[2:])[-3:]
    text = text_length(arguments)
    if config.text_embed_2_dim is not None and arguments.get("encoder_hidden_states_2") is not None:
        text += text_length(arguments, "encoder_hidden_states_2")
    return TokenGrid(frames // t, height // h, width // w, text_after=text)


FAMILIES = (
    Family(
        name="hunyuan_image",
        classes=("HunyuanImageTransformer2DModel",),
        # The token refiner of the text has attention of its own, which stays as it is.
        layers=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        grid=_grid,
        patch_size=_patch_size,
        text_position="after",
    ),
)
