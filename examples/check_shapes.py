"""Do generated clips show the sprite shapes that their captions name?

A sprite is found by its captioned colour. In each frame its pixels are centred, scaled to a fixed area and compared
with templates of the six shapes, drawn by the data's own code at several angles, sizes and places. Pixels that other
sprites cover or that lie outside the frame count neither for nor against a template. The shape whose best templates
overlap most over all frames is the one that is read.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from check_colours import MIN_SHARE, colour_map
from scipy import ndimage
from tiny_wan_data import SHAPES, SPRITE_COLOURS, captioned_sprites, signed_distance

# Masks are compared on WINDOW x WINDOW points, which reach REACH times the square root of the mask's area to each side.
WINDOW = 32
REACH = 1.25
# Frames that show less of a sprite than this share of what the median frame shows say nothing of its shape.
MIN_SEEN = 0.3
# Overlap (intersection over union) that the best shape must reach over the frames; a smear is read as no shape at all.
MIN_OVERLAP = 0.6
# How often a shape comes back to itself in one turn; those that always do need one angle.
SYMMETRY = {"circle": 0, "square": 4, "triangle": 3, "ring": 0, "star": 5, "cross": 4}
# Between two templates' angles, in degrees.
ANGLE_STEP = 10
# A sprite that is partly hidden is larger than its area says, and its centre lies elsewhere.
SCALES = (0.9, 1.0, 1.1, 1.25)
OFFSETS = (-0.2, -0.1, 0.0, 0.1, 0.2)


@functools.cache
def _templates() -> tuple[torch.Tensor, torch.Tensor]:
    """Masks ``[templates, WINDOW ** 2]``, 1 inside and 0 outside, and the number of each one's shape in ``SHAPES``."""
    axis = ((torch.arange(WINDOW) + 0.5) / WINDOW * 2 - 1) * REACH
    variants = torch.tensor(list(itertools.product(SCALES, OFFSETS, OFFSETS)))
    scale, right, down = variants.T[:, :, None, None]
    x = (axis[None, None] - right).expand(-1, WINDOW, -1)
    y = (axis[None, :, None] - down).expand(-1, -1, WINDOW)
    masks, shapes = [], []
    for number, shape in enumerate(SHAPES):
        fine = torch.linspace(-1.5, 1.5, 600)
        area = (signed_distance(shape, fine[None], fine[:, None], torch.ones(1, 1)) < 0).float().mean() * 9
        turn = 360 / SYMMETRY[shape] if SYMMETRY[shape] else ANGLE_STEP
        for angle in map(math.radians, np.arange(0, turn, ANGLE_STEP)):
            along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
            distance = signed_distance(shape, along, across, scale / area.sqrt())
            # As soft at the border as one point of the window.
            masks.append((0.5 - distance / (2 * REACH / WINDOW)).clamp(0, 1).flatten(1))
            shapes += [number] * len(variants)
    return torch.cat(masks), torch.tensor(shapes)


def _largest_part(seen: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Of a frame's mask, the part with most pixels; parts that only other sprites divide are one."""
    labels, count = ndimage.label(seen | hidden)
    sizes = np.bincount(labels[seen], minlength=count + 1)
    return seen & (labels == sizes.argmax())


def _normalised(seen: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks ``[n, height, width]`` on the points of their windows: what is seen, and which points count."""
    height, width = seen.shape[1:]
    x, y = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    area = seen.sum((1, 2))
    centre_x, centre_y = (seen.sum(1) * x).sum(1) / area, (seen.sum(2) * y).sum(1) / area
    axis = ((torch.arange(WINDOW) + 0.5) / WINDOW * 2 - 1) * REACH
    at_x = centre_x[:, None] + axis * area.sqrt()[:, None]
    at_y = centre_y[:, None] + axis * area.sqrt()[:, None]
    grid = torch.stack(
        [
            (at_x / width * 2 - 1)[:, None].expand(-1, WINDOW, -1),
            (at_y / height * 2 - 1)[:, :, None].expand(-1, -1, WINDOW),
        ],
        -1,
    )
    both = torch.stack([seen, 1 - hidden], 1)
    both = torch.nn.functional.grid_sample(both, grid, align_corners=False).flatten(2)  # 0 outside the frame
    return both[:, 0], both[:, 1]


def shape_overlaps(seen: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """How well each shape fits masks ``[n, height, width]`` of 0 and 1.

    ``seen``: the sprite's pixels, at least one in each mask; ``hidden``: those that may be its own or not.

    Returns the best template's intersection over union, float ``[n, shapes]`` in [0, 1].
    """
    templates, numbers = _templates()
    out = []
    for part, unsure in zip(seen.float().split(128), hidden.float().split(128), strict=True):
        mask, counts = _normalised(part, unsure)
        mask = mask * counts
        both = mask @ templates.T
        either = mask.sum(1, keepdim=True) + counts @ templates.T - both
        overlap = both / either.clamp_min(1e-6)
        out.append(torch.stack([overlap[:, numbers == i].amax(1) for i in range(len(SHAPES))], 1))
    return torch.cat(out)


def read_shape(clip: torch.Tensor, colour: str) -> str | None:
    """The shape of a clip's sprite of a colour, from ``[3, frames, height, width]``, RGB in [0, 1].

    None where the colour covers less than ``MIN_SHARE`` of the clip, or no shape fits.
    """
    return _read(colour_map(clip).cpu().numpy(), colour)


def _read(colours: np.ndarray, colour: str) -> str | None:
    """The same, from the clip's colour map ``[frames, height, width]``."""
    number = list(SPRITE_COLOURS).index(colour)
    share = np.bincount(colours[colours >= 0], minlength=len(SPRITE_COLOURS)) / colours.size
    if share[number] < MIN_SHARE:
        return None
    # Colours that are no sprites, as the blurred borders of others, hide nothing.
    others = np.flatnonzero((share >= MIN_SHARE) & (np.arange(len(share)) != number))
    hidden = np.isin(colours, others)
    seen = np.stack([_largest_part(s, h) for s, h in zip(colours == number, hidden, strict=True)])
    areas = seen.sum((1, 2))
    kept = areas >= max(1.0, MIN_SEEN * float(np.median(areas[areas > 0])))
    overlaps = shape_overlaps(torch.from_numpy(seen[kept]), torch.from_numpy(hidden[kept])).mean(0)
    best = int(overlaps.argmax())
    return SHAPES[best] if overlaps[best] >= MIN_OVERLAP else None


def shape_score(clips: torch.Tensor, captions: Sequence[str]) -> float:
    """The share of the captioned sprites whose shape is read from ``clips`` ``[clips, 3, frames, height, width]``.

    A sprite whose colour is not there counts as wrong.
    """
    hits = []
    for clip, caption in zip(clips, captions, strict=True):
        colours = colour_map(clip).cpu().numpy()
        hits += [_read(colours, sprite.colour) == sprite.shape for sprite in captioned_sprites(caption)]
    return sum(hits) / len(hits)
