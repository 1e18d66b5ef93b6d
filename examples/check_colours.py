"""Do generated clips show the sprite colours that their captions name?

A pixel counts for the nearest sprite colour if it lies within ``MAX_DISTANCE`` of it; a colour is *found* in a clip if
at least ``MIN_SHARE`` of all its pixels count for it; a clip passes if the colours found are exactly those of its
caption, none missing and none besides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tiny_wan_data import SPRITE_COLOURS, captioned_colours

# Half the distance between the two closest sprite colours, so that no pixel could count for two.
MAX_DISTANCE = 0.23
# A share of all pixels of all frames. The smallest sprite covers about 1.5%, blurred borders of others less than 0.2%.
MIN_SHARE = 0.005


def colour_map(clip: torch.Tensor) -> torch.Tensor:
    """The sprite colour that each pixel of a clip ``[3, frames, height, width]``, RGB in [0, 1], counts for.

    Returns int64 ``[frames, height, width]``: its number in ``SPRITE_COLOURS``, or -1 for none.
    """
    pixels = clip.float().flatten(1).T  # [pixels, 3]
    palette = torch.tensor(list(SPRITE_COLOURS.values()), device=pixels.device)
    distance, nearest = torch.cdist(pixels, palette, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    return nearest.masked_fill(distance > MAX_DISTANCE, -1).view(clip.shape[1:])


def colour_shares(clip: torch.Tensor) -> dict[str, float]:
    """For each sprite colour, its share of the pixels of a clip ``[3, frames, height, width]``, RGB in [0, 1]."""
    found = colour_map(clip)
    counts = torch.bincount(found[found >= 0], minlength=len(SPRITE_COLOURS))
    return dict(zip(SPRITE_COLOURS, (counts / found.numel()).tolist(), strict=True))


def colours_found(clip: torch.Tensor) -> frozenset[str]:
    """The sprite colours that cover at least ``MIN_SHARE`` of a clip ``[3, frames, height, width]``."""
    return frozenset(name for name, share in colour_shares(clip).items() if share >= MIN_SHARE)


def clip_matches(clip: torch.Tensor, caption: str) -> bool:
    """Whether a clip ``[3, frames, height, width]`` shows exactly the sprite colours that its caption names."""
    return colours_found(clip) == captioned_colours(caption)


def score(clips: torch.Tensor, captions: Sequence[str]) -> float:
    """The share of ``clips`` ``[clips, 3, frames, height, width]`` that match their captions."""
    return sum(clip_matches(clip, caption) for clip, caption in zip(clips, captions, strict=True)) / len(captions)


def shuffled_score(clips: torch.Tensor, captions: Sequence[str]) -> float:
    """What chance would score: the mean score over all ways to shift the captions against the clips."""
    found = [colours_found(clip) for clip in clips]
    named = [captioned_colours(caption) for caption in captions]
    count = len(named)
    hits = sum(found[i] == named[(i + shift) % count] for shift in range(1, count) for i in range(count))
    return hits / (count * (count - 1))
