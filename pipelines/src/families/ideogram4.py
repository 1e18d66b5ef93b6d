"""Ideogram 4: one sequence of padding, text, then an image; its twin for guidance sees the image alone.

The model makes a mask of all pairs of tokens, so that several samples could share a sequence. With one sample its last
row, that of an image token, says all that matters as a key mask: rows of padding are different then, but no other token
ever attends to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from diffsparse.grid import TokenGrid
from diffsparse.pipelines._diffusers import StandIn
from diffsparse.pipelines.context import CTX
from diffsparse.pipelines.families.common import images_by_ids
from diffsparse.pipelines.family import Family, UnknownGridError
from diffsparse.pipelines.patch import takes_key_mask

PADDING, IMAGE = 0, 2  # what ``indicator`` says of a token


class KeyMaskProcessor(StandIn):
    """Gives the model's own processor a mask ``[B, 1, 1, S]``, or none where all tokens are of the image."""

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, image_rotary_emb: Any
    ) -> torch.Tensor:
        """Attention of all tokens ``[B, S, C]``."""
        if attention_mask is not None and takes_key_mask(hidden_states.device):
            attention_mask = attention_mask[:, :, -1:] if _has_text() else None
        out: torch.Tensor = self.original(attn, hidden_states, attention_mask, image_rotary_emb)
        return out


def _has_text() -> bool:
    layer, call = CTX.layer, CTX.call
    grid = layer.layout.grid if layer is not None and layer.layout is not None else None
    if grid is None and call is not None:  # a tap
        grid = call.grid
    return grid is None or grid.text_before > 0


def _stand_in(processor: Any) -> KeyMaskProcessor | None:
    return KeyMaskProcessor(processor) if type(processor).__name__ == "Ideogram4AttnProcessor" else None


def _patch_size(config: Any) -> tuple[int, int, int]:
    # The pipeline packs 2 x 2 latent pixels into a token before the model sees them.
    return (1, 2, 2)


def _grid(config: Any, arguments: Mapping[str, Any]) -> TokenGrid:
    indicator, segments = arguments["indicator"], arguments["segment_ids"]  # [B, S]
    image = (indicator == IMAGE).int()
    tokens = image.sum(1)
    at_the_end = (image[:, 1:] >= image[:, :-1]).all()
    packed = ((indicator != PADDING) & (segments != segments[:, -1:])).any()
    # One wait for the device per forward: text and padding are told from the image by values alone.
    least, most, at_the_end, packed = torch.stack([tokens.min(), tokens.max(), at_the_end, packed]).tolist()
    if packed or not at_the_end or least != most:
        raise UnknownGridError("several samples in one sequence, or images that are not at the end")
    text = indicator.shape[1] - most
    return images_by_ids(arguments["position_ids"], most, text, skip=text)


FAMILIES = (
    Family(
        name="ideogram4",
        classes=("Ideogram4Transformer2DModel",),
        layers=("layers.*.attention",),
        grid=_grid,
        patch_size=_patch_size,
        text_position="before",
        timestep_scale="unit_rising",
        stand_in=_stand_in,
        stays_dense="several samples in one sequence",
    ),
)
