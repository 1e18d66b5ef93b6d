"""Shapes that many families share. All sizes are in tokens unless said otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from diffsparse.grid import TokenGrid
from diffsparse.pipelines.family import UnknownGridError

__all__ = ["cubic_patch", "flat_patch", "image_of", "images_by_ids", "text_length", "video_of"]


def cubic_patch(config: Any) -> tuple[int, int, int]:
    """``config.patch_size`` given as (t, h, w)."""
    t, h, w = config.patch_size
    return (int(t), int(h), int(w))


def flat_patch(config: Any) -> tuple[int, int, int]:
    """``config.patch_size`` given as one number, for height and width."""
    return (1, int(config.patch_size), int(config.patch_size))


def video_of(hidden_states: torch.Tensor, patch: tuple[int, int, int]) -> tuple[int, int, int]:
    """(frames, height, width) of latents ``[B, C, T, H, W]``."""
    frames, height, width = hidden_states.shape[2:]
    return (frames // patch[0], height // patch[1], width // patch[2])


def image_of(hidden_states: torch.Tensor, patch: tuple[int, int, int]) -> tuple[int, int, int]:
    """(1, height, width) of latents ``[B, C, H, W]``."""
    height, width = hidden_states.shape[-2:]
    return (1, height // patch[1], width // patch[2])


def text_length(arguments: Mapping[str, Any], name: str = "encoder_hidden_states") -> int:
    """Text tokens of an argument ``[B, S, C]``."""
    return int(arguments[name].shape[1])


def images_by_ids(ids: torch.Tensor | None, tokens: int, text_before: int) -> TokenGrid:
    """The grid of packed images (Flux and its kin) from position ids ``[S, A]`` or ``[B, S, A]``, ``A`` 3 or 4.

    The first axis tells images apart, the second and third are row and column. Images of one size, as in editing, make
    the frames of a video. Where later images have another size, they count as text, which is always exact. Portrait and
    landscape have as many tokens, so values must be read: one wait for the device per forward.
    """
    if ids is None:
        raise UnknownGridError("img_ids is missing, which tells the image's height and width")
    ids = ids[0] if ids.ndim == 3 else ids
    if len(ids) != tokens:
        raise UnknownGridError(f"{tokens} image tokens, but positions of {len(ids)}")
    positions = ids[:, :3].round().long().cpu()
    changes = (positions[1:, 0] != positions[:-1, 0]).nonzero()[:, 0] + 1
    borders = [0, *changes.tolist(), tokens]
    sizes = []
    for begin, end in zip(borders, borders[1:]):
        rows, columns = positions[begin:end, 1], positions[begin:end, 2]
        height, width = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
        if height * width != end - begin:
            raise UnknownGridError(f"{end - begin} image tokens are not one image of {height} x {width}")
        sizes.append((height, width))
    height, width = sizes[0]
    if all(size == sizes[0] for size in sizes):
        return TokenGrid(len(sizes), height, width, text_before=text_before)
    return TokenGrid(1, height, width, text_before=text_before, text_after=tokens - height * width)
