"""Qwen-Image, its edit and layered versions: one sequence of text (padding masked by a key mask), then the images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.grid import TokenGrid
from diffsparse.pipelines.families.common import flat_patch, images, text_length
from diffsparse.pipelines.family import Family, UnknownGridError


def _grid(config: Any, arguments: Mapping[str, Any]) -> TokenGrid:
    shapes = arguments.get("img_shapes")
    if not shapes:
        raise UnknownGridError("img_shapes is missing; it gives the images' heights and widths")
    # One list of (frames, height, width) an item, or one such tuple an item; the model looks at the first item's.
    first = shapes[0] if isinstance(shapes, list) else shapes
    sizes = [(int(f), int(h), int(w)) for f, h, w in (first if isinstance(first, list) else [first])]
    if any(shape != shapes[0] for shape in shapes if isinstance(shapes, list)):
        raise UnknownGridError("img_shapes differ within the batch")
    tokens, told = arguments["hidden_states"].shape[1], sum(f * h * w for f, h, w in sizes)
    if tokens != told:
        raise UnknownGridError(f"{tokens} image tokens, but img_shapes of {told}")
    return images(sizes, text_length(arguments))


FAMILIES = (
    Family(
        name="qwenimage",
        classes=("QwenImageTransformer2DModel",),
        layers=("transformer_blocks.*.attn",),
        grid=_grid,
        patch_size=flat_patch,
        text_position="before",
        timestep_scale="unit",
        stays_dense="batches whose images differ in size",
    ),
)
