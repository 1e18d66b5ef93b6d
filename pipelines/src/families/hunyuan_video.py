"""HunyuanVideo and Framepack: one sequence of video, then text; padded text is masked by a key mask, or cut off.

Image-to-video adds channels or modulates the first frame's tokens in another way, and leaves the sequence as it is.
Framepack puts frames that are already there before the video, some in coarser patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from diffsparse.grid import TokenGrid
from diffsparse.pipelines.families.common import text_length, timed_patch, video_of
from diffsparse.pipelines.family import Family


def _grid(config: Any, arguments: Mapping[str, Any]) -> TokenGrid:
    return TokenGrid(*video_of(arguments["hidden_states"], timed_patch(config)), text_after=text_length(arguments))


def _history(arguments: Mapping[str, Any]) -> int:
    """Tokens of Framepack's history: whole frames, patches twice and four times as long on every axis."""
    tokens = 0
    for name, factor in (("latents_clean", 1), ("latents_history_2x", 2), ("latents_history_4x", 4)):
        latents = arguments.get(name)
        if latents is None or arguments.get(f"indices_{name}") is None:
            continue
        # The patch of these layers is fixed. Only the coarser ones are padded.
        sides = zip(latents.shape[2:], (1, 2, 2))
        tokens += prod(n // p if factor == 1 else -(-n // (p * factor)) for n, p in sides)
    return tokens


def _framepack_grid(config: Any, arguments: Mapping[str, Any]) -> TokenGrid:
    text = text_length(arguments, "image_embeds")
    mask = arguments["encoder_attention_mask"]
    if mask.shape[0] == 1:
        # The model cuts padding off, for which it waits for the same number right after this.
        text += int(mask.sum())
    else:
        text += mask.shape[1]
    video = video_of(arguments["hidden_states"], timed_patch(config))
    return TokenGrid(*video, text_before=_history(arguments), text_after=text)


FAMILIES = (
    Family(
        name="hunyuan_video",
        classes=("HunyuanVideoTransformer3DModel",),
        # The token refiner of the text has attention of its own, which stays as it is.
        layers=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        grid=_grid,
        patch_size=timed_patch,
        text_position="after",
    ),
    Family(
        name="framepack",
        classes=("HunyuanVideoFramepackTransformer3DModel",),
        layers=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        # The history is text to the plan: every query sees it, and it sees everything.
        grid=_framepack_grid,
        patch_size=timed_patch,
        text_position="after",
        stays_dense="rows and columns of the history before the video",
    ),
)
