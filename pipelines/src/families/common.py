"""Shapes that many families share. All sizes are in tokens unless said otherwise."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from diffsparse.grid import TokenGrid
from diffsparse.pipelines.family import UnknownGridError

__all__ = [
    "cubic_patch",
    "flat_patch",
    "image_of",
    "images",
    "images_by_ids",
    "packed_images",
    "packed_patch",
    "text_length",
    "timed_patch",
    "video_of",
]


def cubic_patch(config: Any) -> tuple[int, int, int]:
    """``config.patch_size`` given as (t, h, w)."""
    t, h, w = config.patch_size
    return (int(t), int(h), int(w))


def flat_patch(config: Any) -> tuple[int, int, int]:
    """``config.patch_size`` given as one number, for height and width."""
    return (1, int(config.patch_size), int(config.patch_size))


def timed_patch(config: Any) -> tuple[int, int, int]:
    """``config.patch_size_t`` for frames, ``config.patch_size`` for height and width."""
    return (int(config.patch_size_t), int(config.patch_size), int(config.patch_size))


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


def packed_patch(config: Any) -> tuple[int, int, int]:
    """2 x 2 latent pixels a token, packed by the pipeline before the model sees them (Flux and its kin)."""
    return (1, 2, 2)


def packed_images(config: Any, arguments: Mapping[str, Any]) -> TokenGrid:
    """Text, then packed images ``[B, S, C]`` with position ids, under the argument names of Flux and its kin."""
    return images_by_ids(arguments.get("img_ids"), arguments["hidden_states"].shape[1], text_length(arguments))


def images(sizes: Sequence[tuple[int, int, int]], text_before: int = 0) -> TokenGrid:
    """The grid of images one after another, each ``(frames, height, width)``, behind text.

    The first one is what is generated; those behind it, as in editing, are frames of the same video as long as they
    have its height and width. From the first one of another size on they count as text, which is always exact.
    """
    frames, height, width = sizes[0]
    same = 1
    while same < len(sizes) and sizes[same][1:] == (height, width):
        frames += sizes[same][0]
        same += 1
    rest = sum(f * h * w for f, h, w in sizes[same:])
    return TokenGrid(frames, height, width, text_before=text_before, text_after=rest)


def images_by_ids(ids: torch.Tensor | None, tokens: int, text_before: int, skip: int = 0) -> TokenGrid:
    """The grid of packed images (Flux and its kin) from position ids ``[S, A]`` or ``[B, S, A]``, ``A`` 3 or 4.

    The first axis tells images apart, the second and third are row and column; :func:`images` says what becomes of
    several images. ``skip``: positions of text that come first.
    """
    if ids is None:
        raise UnknownGridError("img_ids is missing; it gives the image's height and width")
    if ids.ndim not in (2, 3) or ids.shape[-1] < 3:
        raise UnknownGridError(f"img_ids of shape {tuple(ids.shape)} tell no rows and columns")
    if ids.shape[-2] - skip != tokens:
        raise UnknownGridError(f"{tokens} image tokens, but positions of {ids.shape[-2] - skip}")
    return images(_sizes_by_ids(ids, skip), text_before)


# (id of a tensor of positions, text in it) -> (that tensor, its version, the sizes found in it). A pipeline gives the
# same tensor at every step, and only its values tell portrait from landscape: reading them waits for the device.
_KNOWN_IDS: OrderedDict[tuple[int, int], tuple[weakref.ref[torch.Tensor], int, list[tuple[int, int, int]]]] = (
    OrderedDict()
)


def _sizes_by_ids(ids: torch.Tensor, skip: int) -> list[tuple[int, int, int]]:
    """The sizes of the images in position ids. Waits for the device once per tensor and version of it."""
    if ids.is_inference():  # has no version
        return _read_ids(ids, skip)
    known = _KNOWN_IDS.get((id(ids), skip))
    if known is not None and known[0]() is ids and known[1] == ids._version:
        return known[2]
    sizes = _read_ids(ids, skip)
    _KNOWN_IDS[id(ids), skip] = (weakref.ref(ids), ids._version, sizes)
    while len(_KNOWN_IDS) > 16:
        _KNOWN_IDS.popitem(last=False)
    return sizes


def _read_ids(ids: torch.Tensor, skip: int) -> list[tuple[int, int, int]]:
    ids = (ids[0] if ids.ndim == 3 else ids)[skip:].cpu()  # models read those of the first item
    image, row, column = ids[:, :3].unbind(1)
    # Rows only grow within an image, so one that goes back starts another image with the same number.
    starts = (image[1:] != image[:-1]) | (row[1:] < row[:-1])
    borders = [0, *(starts.nonzero()[:, 0] + 1).tolist(), len(ids)]
    sizes = []
    for begin, end in zip(borders, borders[1:]):
        rows, columns = row[begin:end], column[begin:end]
        width = int((rows == rows[0]).sum())
        raster = torch.arange(end - begin)
        # Compared in the type of the ids: bfloat16 has no 257.
        if (
            (end - begin) % width
            or not torch.equal(rows, (int(rows[0]) + raster // width).to(ids.dtype))
            or not torch.equal(columns, (int(columns[0]) + raster % width).to(ids.dtype))
        ):
            raise UnknownGridError(f"{end - begin} image tokens are not one image with rows of {width}")
        sizes.append((1, (end - begin) // width, width))
    return sizes
