"""Cosmos 1 (Text2World, Video2World), 2 and 2.5 (Predict, Transfer): video only, text by cross-attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from diffsparse.grid import TokenGrid
from diffsparse.pipelines.families.common import cubic_patch, video_of
from diffsparse.pipelines.family import Family


def _grid(config: Any, arguments: Mapping[str, Any]) -> TokenGrid:
    return TokenGrid(*video_of(arguments["hidden_states"], cubic_patch(config)))


def _noise_level(value: float, scheduler: Any) -> float:
    """Noise level in [0, 1] from the timestep.

    Cosmos 2 passes sigma / (sigma + 1), Cosmos 2.5 a sigma that is in [0, 1] by itself: both are the level. Cosmos 1
    passes log(sigma) / 4, and only its scheduler tells that; a transformer without a pipeline is taken for a newer one.
    """
    if "EDM" not in type(scheduler).__name__:
        return value
    sigma = math.exp(4 * value)
    return sigma / (sigma + 1)


FAMILIES = (
    Family(
        name="cosmos",
        classes=("CosmosTransformer3DModel",),
        layers=("transformer_blocks.*.attn1",),
        grid=_grid,
        patch_size=cubic_patch,
        timestep_scale=_noise_level,
        stays_dense="a ControlNet's own blocks",
    ),
)

UNSUITABLE = {
    "Cosmos3OmniTransformer": (
        "video, sound and text are packed into one sequence with grouped heads, and video tokens attend to text keys "
        "that have no queries beside them"
    ),
}
