"""Models built on Wan: SkyReels-V2, Wan-Animate, ChronoEdit, AnyFlow. Video only, text by cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.grid import TokenGrid
from diffsparse.pipelines.families.common import cubic_patch, video_of
from diffsparse.pipelines.family import Family


def _grid(config: Any, arguments: Mapping[str, Any]) -> TokenGrid:
    return TokenGrid(*video_of(arguments["hidden_states"], cubic_patch(config)))


def _frames_first(config: Any, arguments: Mapping[str, Any]) -> TokenGrid:
    latents = arguments["hidden_states"].transpose(1, 2)  # [B, T, C, H, W] from outside
    return TokenGrid(*video_of(latents, cubic_patch(config)))


FAMILIES = (
    # Diffusion forcing gives every frame a timestep of its own: the noisiest counts. Models whose configuration has
    # num_frame_per_block above 1 pass a mask that is causal in frames, so they run dense.
    Family(
        name="skyreels_v2",
        classes=("SkyReelsV2Transformer3DModel",),
        layers=("blocks.*.attn1",),
        grid=_grid,
        patch_size=cubic_patch,
        stays_dense="models with causal frame blocks (`num_frame_per_block` above 1)",
    ),
    # The first frame is the reference image. The face adapter attends from every frame to that frame's face.
    Family(
        name="wan_animate",
        classes=("WanAnimateTransformer3DModel",),
        layers=("blocks.*.attn1",),
        grid=_grid,
        patch_size=cubic_patch,
        stays_dense="the face adapter",
    ),
    # After its reasoning steps a run goes on with the first and the last frame alone: another grid.
    Family(
        name="chronoedit",
        classes=("ChronoEditTransformer3DModel",),
        layers=("blocks.*.attn1",),
        grid=_grid,
        patch_size=cubic_patch,
    ),
    # A timestep for every frame; given frames are held at 0.
    Family(
        name="anyflow",
        classes=("AnyFlowTransformer3DModel",),
        layers=("blocks.*.attn1",),
        grid=_frames_first,
        patch_size=cubic_patch,
    ),
)

UNSUITABLE = {
    "WanAnimate2Transformer3DModel": (
        "its attention mixes reference and video tokens under a block mask of its own, or reads cached keys, so its "
        "sequence is not a grid of video tokens"
    ),
    "AnyFlowFARTransformer3DModel": (
        "it generates frame by frame with causal attention and cached keys, so queries and keys are of different frames"
    ),
}
