"""What the tests of families need to know of one tiny model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from diffsparse.grid import TokenGrid

Inputs = dict[str, Any]
Shape = tuple[int, int, int]

TEXT = 7
VIDEO_SHAPES: tuple[Shape, Shape] = ((3, 7, 9), (3, 9, 7))
IMAGE_SHAPES: tuple[Shape, Shape] = ((1, 13, 16), (1, 16, 13))


@dataclass(frozen=True)
class Case:
    """A family's tiny model.

    inputs: ``(frames, height, width, timestep=500)``, in tokens and thousandths of the noise level (whatever unit the
        model has), to the arguments of its forward. Random ones come from torch's global generator.
    layers: every self-attention module that must be routed, in the model's order.
    before, after: text tokens.
    shapes: two grids, ragged in every axis; the second is the first one's portrait.
    masked: a key-padding mask reaches the attention.
    visual_only: those of ``layers`` that see no text.
    calls: attention calls of each layer in one forward.
    """

    build: Callable[[], torch.nn.Module]
    inputs: Callable[..., Inputs]
    layers: tuple[str, ...]
    before: int = 0
    after: int = 0
    shapes: tuple[Shape, Shape] = VIDEO_SHAPES
    heads: int = 3
    head_dim: int = 16
    masked: bool = False
    visual_only: tuple[str, ...] = ()
    calls: int = 1

    def grid(self, shape: Shape, layer: str = "") -> TokenGrid:
        """The grid of a forward, or that of one layer's calls."""
        if layer in self.visual_only:
            return TokenGrid(*shape)
        return TokenGrid(*shape, text_before=self.before, text_after=self.after)
