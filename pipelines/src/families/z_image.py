"""Z-Image: one sequence of an image, then its caption, each padded to a multiple of 32 tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.grid import TokenGrid
from diffsparse.pipelines.families.common import video_of
from diffsparse.pipelines.family import Family, UnknownGridError

MULTIPLE = 32


def _patch_size(config: Any) -> tuple[int, int, int]:
    return (int(config.all_f_patch_size[0]), int(config.all_patch_size[0]), int(config.all_patch_size[0]))


def _padding(tokens: int) -> int:
    return -tokens % MULTIPLE


def _layer_grid(config: Any, layer: str, grid: TokenGrid) -> TokenGrid:
    """Layers before the caption see the image and its padding, which is not masked: text, as attention goes."""
    return TokenGrid(*grid.shape, text_after=_padding(grid.num_visual)) if layer.startswith("noise") else grid


def _grid(config: Any, arguments: Mapping[str, Any]) -> TokenGrid:
    images, captions = arguments["x"], arguments["cap_feats"]  # lists of [C, F, H, W] and [S, C], one an item
    if isinstance(images[0], (list, tuple)):
        raise UnknownGridError("several images an item (Z-Image's omni mode) stand between caption and features")
    if any(image.shape != images[0].shape for image in images):
        raise UnknownGridError("the images of the batch have different sizes")
    patch = (int(arguments.get("f_patch_size", 1)), *2 * (int(arguments.get("patch_size", 2)),))
    grid = TokenGrid(*video_of(images[0][None], patch))
    # Shorter captions end in padding that a key mask leaves out.
    longest = max(len(caption) for caption in captions)
    return TokenGrid(*grid.shape, text_after=_padding(grid.num_visual) + longest + _padding(longest))


FAMILIES = (
    Family(
        name="z_image",
        classes=("ZImageTransformer2DModel",),
        # The refiner of the caption has attention of its own, which stays as it is.
        layers=("noise_refiner.*.attention", "layers.*.attention"),
        grid=_grid,
        patch_size=_patch_size,
        text_position="after",
        layer_grid=_layer_grid,
        timestep="t",
        timestep_scale="unit_rising",
        heads=lambda config: int(config.n_heads),
        head_dim=lambda config: int(config.dim) // int(config.n_heads),
        stays_dense="the omni pipeline; batches whose images differ in size",
    ),
)
