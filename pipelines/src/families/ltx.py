"""LTX-Video and LTX-2: video tokens packed by the pipeline, text (and LTX-2's audio) by cross-attention.

Keyframes and reference videos add tokens before the clip (LTX-Video) or after it (LTX-2). They may have another size,
so they count as text, which is always exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from diffsparse.grid import TokenGrid
from diffsparse.pipelines.families.common import timed_patch
from diffsparse.pipelines.family import Family, UnknownGridError


def _size(config: Any, arguments: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """(frames, height, width) of the clip in tokens, if the arguments tell it in latent pixels."""
    frames, height, width = (arguments.get(name) for name in ("num_frames", "height", "width"))
    if frames is None or height is None or width is None:
        return None
    t, h, w = timed_patch(config)
    return (-(-int(frames) // t), -(-int(height) // h), -(-int(width) // w))


def _by_coordinates(coordinates: torch.Tensor | None, tokens: int) -> TokenGrid:
    """The longest box of tokens among positions ``[B, 3, S]`` or, with begin and end of each, ``[B, 3, S, 2]``.

    Positions are (seconds, row, column) in no fixed unit. Portrait and landscape have as many tokens, so values must be
    read: one wait for the device per forward.
    """
    if coordinates is None:
        raise UnknownGridError("num_frames, height and width are missing, and there is no video_coords either")
    if coordinates.shape[2] != tokens:
        raise UnknownGridError(f"{tokens} video tokens, but positions of {coordinates.shape[2]}")
    position = coordinates[0].cpu()
    begin = position[..., 0] if position.ndim == 3 else position  # [3, S]
    time, row, column = begin.unbind(0)
    # A clip goes on where a token lies later, or below, or to the right of the one before it.
    later = (time[1:] > time[:-1]) | (
        (time[1:] == time[:-1]) & ((row[1:] > row[:-1]) | ((row[1:] == row[:-1]) & (column[1:] > column[:-1])))
    )
    if position.ndim == 3:
        # A keyframe of the last moment lies later than the clip's last frame, but does not begin where that one ends.
        gap = (position[0, 1:, 0] - position[0, :-1, 1]).abs() > 1e-3
        later &= ~((time[1:] > time[:-1]) & gap)
    borders = [0, *((~later).nonzero()[:, 0] + 1).tolist(), tokens]
    first, last = max(zip(borders, borders[1:]), key=lambda piece: piece[1] - piece[0])
    frames, height, width = (len(axis[first:last].unique()) for axis in begin)
    if frames * height * width != last - first:
        raise UnknownGridError(f"{last - first} tokens are not one clip of {frames} x {height} x {width}")
    return TokenGrid(frames, height, width, text_before=first, text_after=tokens - last)


def _ltx_grid(config: Any, arguments: Mapping[str, Any]) -> TokenGrid:
    tokens = arguments["hidden_states"].shape[1]
    size = _size(config, arguments)
    # Where there are positions, the numbers are not used: the pipeline of long videos passes ones.
    if arguments.get("video_coords") is not None or size is None:
        return _by_coordinates(arguments.get("video_coords"), tokens)
    return TokenGrid(*size)


def _ltx2_grid(config: Any, arguments: Mapping[str, Any]) -> TokenGrid:
    tokens = arguments["hidden_states"].shape[1]
    size = _size(config, arguments)
    if size is None:  # LTX-2.5's tiles
        return _by_coordinates(arguments.get("video_coords"), tokens)
    grid = TokenGrid(*size)
    if tokens < grid.num_visual:
        raise UnknownGridError(f"{tokens} video tokens, fewer than {grid} has")
    return TokenGrid(*size, text_after=tokens - grid.num_visual)


FAMILIES = (
    Family(
        name="ltx",
        classes=("LTXVideoTransformer3DModel",),
        layers=("transformer_blocks.*.attn1",),
        grid=_ltx_grid,
        patch_size=timed_patch,
    ),
    # Sound has attention of its own, which stays as it is.
    Family(
        name="ltx2",
        classes=("LTX2VideoTransformer3DModel",),
        layers=("transformer_blocks.*.attn1",),
        grid=_ltx2_grid,
        patch_size=timed_patch,
        stays_dense="the audio stream and audio-video attention; calls with a self-attention mask",
    ),
)
