"""EasyAnimate: one sequence of text (one or two encoders, padded, not masked), then video."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.grid import TokenGrid
from diffsparse.pipelines.families.common import flat_patch, text_length, video_of
from diffsparse.pipelines.family import Family


def _grid(config: Any, arguments: Mapping[str, Any]) -> TokenGrid:
    text = text_length(arguments)
    if arguments.get("encoder_hidden_states_t5") is not None:
        text += text_length(arguments, "encoder_hidden_states_t5")
    return TokenGrid(*video_of(arguments["hidden_states"], flat_patch(config)), text_before=text)


FAMILIES = (
    Family(
        name="easyanimate",
        classes=("EasyAnimateTransformer3DModel",),
        layers=("transformer_blocks.*.attn1",),
        grid=_grid,
        patch_size=flat_patch,
        text_position="before",
    ),
)
