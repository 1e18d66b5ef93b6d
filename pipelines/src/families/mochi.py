"""Mochi: one sequence of video, then text without its padding; one attention call for every item of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.grid import TokenGrid
from diffsparse.pipelines.families.common import flat_patch, video_of
from diffsparse.pipelines.family import Family


def _grid(config: Any, arguments: Mapping[str, Any]) -> TokenGrid:
    # Each item has as many text tokens as it has valid ones: the model waits for their places in every layer, so that
    # one wait more does not count. Of unequal captions the longest stands for all, and each call has its own grid.
    text = int(arguments["encoder_attention_mask"].bool().sum(dim=1).max())
    return TokenGrid(*video_of(arguments["hidden_states"], flat_patch(config)), text_after=text)


def _noise_level(value: float, scheduler: Any) -> float:
    """Timesteps rise from 0, pure noise: the scheduler counts backwards."""
    steps = 1000 if scheduler is None else scheduler.config.get("num_train_timesteps", 1000)
    return 1.0 - value / float(steps)


FAMILIES = (
    Family(
        name="mochi",
        classes=("MochiTransformer3DModel",),
        layers=("transformer_blocks.*.attn1",),
        grid=_grid,
        patch_size=flat_patch,
        text_position="after",
        text_from_call=True,
        timestep_scale=_noise_level,
        stays_dense="everything inside compiled code, which does not know the number of text tokens",
    ),
)
