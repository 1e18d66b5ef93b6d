"""Synthetic captioned clips: moving coloured shapes over panning, muted textures.

A :class:`Scene` is what a caption says ("a red circle and a blue square over yellow stripes, panning left");
everything else (positions, speeds, sizes, the texture's period) is drawn from a seed. :func:`render` turns scenes into
clips in one batch on any device. Sprites are saturated (or white) and textures muted, so that the colours of the
sprites and their shapes can be read back from the pixels: ``check_colours.py`` and ``check_shapes.py`` do so.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from dataclasses import dataclass

import torch

Colour = tuple[float, float, float]

# RGB in [0, 1]; any two are at least 0.45 apart, which the check relies on.
SPRITE_COLOURS: dict[str, Colour] = {
    "red": (0.90, 0.08, 0.10),
    "orange": (1.00, 0.55, 0.02),
    "green": (0.08, 0.75, 0.18),
    "cyan": (0.10, 0.88, 0.95),
    "blue": (0.10, 0.18, 0.95),
    "purple": (0.55, 0.10, 0.85),
    "pink": (1.00, 0.35, 0.75),
    "white": (0.98, 0.98, 0.98),
}
# Mid tones of the textures. Muted, so no shade of theirs comes near a sprite's colour.
BACKGROUND_COLOURS: dict[str, Colour] = {
    "yellow": (0.62, 0.58, 0.38),
    "grey": (0.50, 0.50, 0.50),
    "brown": (0.50, 0.40, 0.32),
    "olive": (0.44, 0.48, 0.32),
    "teal": (0.34, 0.48, 0.48),
    "mauve": (0.52, 0.42, 0.52),
}
SHAPES = ("circle", "square", "triangle", "ring", "star", "cross")
TEXTURES = ("stripes", "checks", "dots", "waves", "gradient")
PANS: dict[str, tuple[float, float]] = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
# How often a scene has one, two or three sprites.
SPRITE_COUNTS = (0.4, 0.45, 0.15)
# One scene in so many is held out of training.
HELDOUT_ONE_IN = 16


@dataclass(frozen=True)
class Sprite:
    """One moving shape: a name of ``SPRITE_COLOURS`` and one of ``SHAPES``."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{_article(self.colour)} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a caption says of a clip. Sprites of one scene differ in colour; later ones are drawn over earlier ones."""

    sprites: tuple[Sprite, ...]
    background: str
    texture: str
    pan: str

    @property
    def caption(self) -> str:
        """For example ``a red circle and a blue square over yellow stripes, panning left``."""
        *first, last = map(str, self.sprites)
        listed = f"{', '.join(first)} and {last}" if first else last
        article = f"{_article(self.background)} " if self.texture == "gradient" else ""
        return f"{listed} over {article}{self.background} {self.texture}, panning {self.pan}"

    @property
    def colours(self) -> frozenset[str]:
        """The sprites' colours."""
        return frozenset(sprite.colour for sprite in self.sprites)

    @property
    def heldout(self) -> bool:
        """Whether training never sees this scene: decided by a hash in which the order of the sprites does not count,
        so that no held-out caption is a training caption said in another order."""
        return self._heldout(self.pan)

    @property
    def still_heldout(self) -> bool:
        """The same for a picture, whose caption does not name the pan."""
        return self._heldout()

    def _heldout(self, *motion: str) -> bool:
        key = "|".join([*sorted(map(str, self.sprites)), self.background, self.texture, *motion])
        return hashlib.sha256(key.encode()).digest()[0] % HELDOUT_ONE_IN == 0


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def captioned_colours(caption: str) -> frozenset[str]:
    """The sprite colours that a caption names. Backgrounds use other words, so the words alone tell."""
    return frozenset(caption.lower().replace(",", " ").split()) & SPRITE_COLOURS.keys()


def captioned_sprites(caption: str) -> list[Sprite]:
    """The sprites that a caption names, in its order."""
    words = caption.lower().replace(",", " ").split()
    return [Sprite(*pair) for pair in itertools.pairwise(words) if pair[0] in SPRITE_COLOURS and pair[1] in SHAPES]


def sample_scenes(count: int, seed: int | str, *, heldout: bool = False, still: bool = False) -> list[Scene]:
    """Draw ``count`` scenes of one split of the caption space, the same ones for the same seed.

    ``still``: the split of pictures, whose captions leave out the pan, instead of that of clips.
    """
    rng = random.Random(f"scenes {seed}")
    scenes: list[Scene] = []
    while len(scenes) < count:
        sprites = rng.choices((1, 2, 3), SPRITE_COUNTS)[0]
        colours = rng.sample(sorted(SPRITE_COLOURS), sprites)
        scene = Scene(
            tuple(Sprite(colour, rng.choice(SHAPES)) for colour in colours),
            rng.choice(sorted(BACKGROUND_COLOURS)),
            rng.choice(TEXTURES),
            rng.choice(sorted(PANS)),
        )
        if (scene.still_heldout if still else scene.heldout) == heldout:
            scenes.append(scene)
    return scenes


def render(
    scenes: list[Scene],
    seed: int,
    *,
    frames: int = 17,
    height: int = 128,
    width: int = 128,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Draw one clip per scene.

    All random numbers are drawn on the CPU, so a seed means the same clips on every device.

    Returns:
        ``[len(scenes), 3, frames, height, width]`` float32, RGB in [0, 1].
    """
    generator = torch.Generator().manual_seed(seed)
    clips = _textures(scenes, generator, frames, height, width, device)
    count = len(scenes)
    slots = max(len(scene.sprites) for scene in scenes)
    centres, radii = _paths(scenes, slots, generator, frames, height, width)
    angles = _uniform(generator, (count, slots, 1), 0, 2 * math.pi) + _uniform(
        generator, (count, slots, 1), -0.06, 0.06
    ) * torch.arange(frames)
    for slot in range(slots):
        for shape in SHAPES:
            # Only the clips that have this shape in this slot are touched; which ones is known on the CPU.
            chosen = [i for i, s in enumerate(scenes) if len(s.sprites) > slot and s.sprites[slot].shape == shape]
            if not chosen:
                continue
            index = torch.tensor(chosen)
            x, y = _local_coordinates(centres[index, slot], angles[index, slot], height, width, device)
            radius = radii[index, slot].to(device).view(-1, 1, 1, 1)
            # One pixel of antialiasing around the border.
            alpha = (0.5 - signed_distance(shape, x, y, radius)).clamp(0, 1).unsqueeze(1)
            colour = torch.tensor([SPRITE_COLOURS[scenes[i].sprites[slot].colour] for i in chosen], device=device)
            index = index.to(device)
            clips[index] = torch.lerp(clips[index], colour.view(-1, 3, 1, 1, 1), alpha)
    return clips


def _uniform(generator: torch.Generator, shape: tuple[int, ...], low: float, high: float) -> torch.Tensor:
    return torch.rand(shape, generator=generator) * (high - low) + low


def _grid(height: int, width: int, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixel centres as ``x`` [1, 1, 1, width] and ``y`` [1, 1, height, 1]."""
    x = torch.arange(width, device=device, dtype=torch.float32).view(1, 1, 1, -1) + 0.5
    y = torch.arange(height, device=device, dtype=torch.float32).view(1, 1, -1, 1) + 0.5
    return x, y


def _textures(
    scenes: list[Scene], generator: torch.Generator, frames: int, height: int, width: int, device: torch.device | str
) -> torch.Tensor:
    """The panning backgrounds, ``[clips, 3, frames, height, width]``."""
    count = len(scenes)
    speed = _uniform(generator, (count, 1), 0.75, 2.5) * min(height, width) / 128  # pixels per frame
    period = _uniform(generator, (count,), 0.2, 0.36) * min(height, width)
    tilt = _uniform(generator, (count,), -0.7, 0.7)
    phase = _uniform(generator, (count, 2), 0, 1)
    direction = torch.tensor([PANS[scene.pan] for scene in scenes])
    shift = speed * direction  # [clips, 2]
    # The texture's own axis lies near the direction of the pan, or stripes would be seen to stand still.
    angle = torch.atan2(direction[:, 1], direction[:, 0]) + tilt
    time = torch.arange(frames).view(1, -1)
    per_frame = [(shift[:, axis : axis + 1] * time).to(device).view(count, frames, 1, 1) for axis in (0, 1)]

    def column(values: torch.Tensor) -> torch.Tensor:
        return values.to(device).view(-1, 1, 1, 1)

    x, y = _grid(height, width, device)
    x, y = x - per_frame[0], y - per_frame[1]
    cos, sin = column(angle.cos()), column(angle.sin())
    along = (x * cos + y * sin) / column(period) + column(phase[:, 0])  # in periods
    across = (y * cos - x * sin) / column(period) + column(phase[:, 1])
    level = torch.empty_like(along)
    for texture in TEXTURES:
        chosen = [i for i, scene in enumerate(scenes) if scene.texture == texture]
        if chosen:
            index = torch.tensor(chosen, device=device)
            level[index] = _texture_level(texture, along[index], across[index])
    middle = torch.tensor([BACKGROUND_COLOURS[scene.background] for scene in scenes], device=device)
    middle = middle.view(count, 3, 1, 1, 1)
    return torch.lerp(middle * 0.78, middle * 1.18, level.unsqueeze(1))


def _texture_level(texture: str, along: torch.Tensor, across: torch.Tensor) -> torch.Tensor:
    """Brightness in [0, 1] at coordinates counted in periods. Edges are soft, for the autoencoder's sake."""
    turn = 2 * math.pi
    if texture == "stripes":
        wave = torch.sin(turn * along)
    elif texture == "checks":
        wave = 1.5 * torch.sin(turn / 1.4 * along) * torch.sin(turn / 1.4 * across)
    elif texture == "dots":
        wave = torch.cos(turn * along) + torch.cos(turn * across) - 0.7
    elif texture == "waves":
        wave = torch.sin(turn * (along + 0.25 * torch.sin(turn / 1.5 * across)))
    elif texture == "gradient":
        return 0.5 + 0.5 * torch.sin(turn / 4 * along)
    else:
        raise ValueError(f"unknown texture {texture!r}; one of {', '.join(TEXTURES)}")
    return torch.sigmoid(4 * wave)


def _paths(
    scenes: list[Scene], slots: int, generator: torch.Generator, frames: int, height: int, width: int, tries: int = 24
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where sprites are: centres ``[clips, slots, frames, 2]`` and radii ``[clips, slots]`` in pixels.

    A sprite moves in a straight line and bounces at the border. Of several random paths the first is taken whose
    sprites never touch, or else the one whose sprites touch least.
    """
    count, size = len(scenes), min(height, width)
    radii = _uniform(generator, (count, slots), 0.12, 0.19) * size
    extent = torch.tensor([float(width), float(height)]).view(1, 1, 1, 2)
    margin = radii.view(count, 1, slots, 1) * 0.9
    start = torch.rand((count, tries, slots, 2), generator=generator) * (extent - 2 * margin)
    heading = _uniform(generator, (count, tries, slots), 0, 2 * math.pi)
    speed = _uniform(generator, (count, tries, slots), 0.4, 2.4) * size / 128  # pixels per frame
    velocity = torch.stack([heading.cos(), heading.sin()], -1) * speed.unsqueeze(-1)
    travelled = start.unsqueeze(3) + velocity.unsqueeze(3) * torch.arange(frames).view(1, 1, 1, -1, 1)
    room = (extent - 2 * margin).unsqueeze(3)
    folded = torch.remainder(travelled, 2 * room)
    centres = torch.minimum(folded, 2 * room - folded) + margin.unsqueeze(3)  # [clips, tries, slots, frames, 2]
    gap = torch.zeros(count, tries)
    sprites = torch.tensor([len(scene.sprites) for scene in scenes]).view(-1, 1)
    for first in range(slots):
        for second in range(first + 1, slots):
            distance = (centres[:, :, first] - centres[:, :, second]).norm(dim=-1).amin(-1)
            room_left = distance - (radii[:, first] + radii[:, second]).view(-1, 1)
            gap = torch.where(sprites > second, torch.minimum(gap, room_left), gap)
    best = gap.argmax(1)
    return centres[torch.arange(count), best], radii


def _local_coordinates(
    centres: torch.Tensor, angles: torch.Tensor, height: int, width: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixel coordinates ``[sprites, frames, height, width]`` in each sprite's own turned frame."""
    x, y = _grid(height, width, device)
    centres = centres.to(device)
    x, y = x - centres[..., 0, None, None], y - centres[..., 1, None, None]
    cos, sin = angles.cos().to(device)[..., None, None], angles.sin().to(device)[..., None, None]
    return x * cos + y * sin, y * cos - x * sin


def signed_distance(shape: str, x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """About how many pixels a point lies outside a shape of the given radius (negative inside)."""
    if shape == "circle":
        return torch.hypot(x, y) - 0.92 * radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.8 * radius
    if shape == "triangle":
        sides = [x * math.cos(a) + y * math.sin(a) for a in (0.0, 2 * math.pi / 3, 4 * math.pi / 3)]
        return torch.maximum(torch.maximum(sides[0], sides[1]), sides[2]) - 0.55 * radius
    if shape == "ring":
        return (torch.hypot(x, y) - 0.72 * radius).abs() - 0.26 * radius
    if shape == "cross":
        flat = torch.maximum(x.abs() - radius, y.abs() - 0.34 * radius)
        upright = torch.maximum(x.abs() - 0.34 * radius, y.abs() - radius)
        return torch.minimum(flat, upright)
    if shape == "star":
        # Fold the plane into one half of one of five points, whose border is a straight line from the tip to a notch.
        fifth = 2 * math.pi / 5
        angle = (torch.remainder(torch.atan2(y, x) + fifth / 2, fifth) - fifth / 2).abs()
        length = torch.hypot(x, y)
        px, py = length * angle.cos(), length * angle.sin()
        notch_x, notch_y = 0.52 * math.cos(fifth / 2), 0.52 * math.sin(fifth / 2)
        normal_x, normal_y = notch_y, 1.08 - notch_x
        scale = math.hypot(normal_x, normal_y)
        return ((px - 1.08 * radius) * normal_x + py * normal_y) / scale
    raise ValueError(f"unknown shape {shape!r}; one of {', '.join(SHAPES)}")
