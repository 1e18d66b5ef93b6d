"""Small moving pictures of clips, for the page: WebP, or PNG where Pillow was built without it."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image, features

from diffsparse.saving import write_whole
from diffsparse.search.errors import writing

__all__ = ["find_picture", "write_clip_picture"]

#: Pixels of the longer side, at most, and frames, of which a longer clip shows every few.
MAX_SIDE, MAX_FRAMES = 320, 33
#: Milliseconds of a frame where all of a clip's are shown: 8 a second, as in the videos of an evaluation.
FRAME_MS = 125


def write_clip_picture(frames: torch.Tensor, place: Path) -> Path:
    """Float ``[frames, channels, height, width]`` in [0, 1] as a file; ``place`` without an ending.

    Raises :class:`~diffsparse.search.errors.BadInput` where it cannot be written.
    """
    step = -(-frames.shape[0] // MAX_FRAMES)
    images = [_image(frame) for frame in frames[::step]]
    kind = "webp" if features.check("webp") else "png"
    buffer = io.BytesIO()
    options = {"quality": 80} if kind == "webp" else {}
    images[0].save(
        buffer, kind.upper(), save_all=True, append_images=images[1:], duration=FRAME_MS * step, loop=0, **options
    )
    file = place.with_name(f"{place.name}.{kind}")
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        return write_whole(file, buffer.getvalue())


def find_picture(place: Path) -> Path | None:
    """The file that :func:`write_clip_picture` wrote, if it is there."""
    return next((f for kind in ("webp", "png") if (f := place.with_name(f"{place.name}.{kind}")).is_file()), None)


def _image(frame: torch.Tensor) -> Image.Image:
    array = (frame.nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    image = Image.fromarray(array if array.shape[2] == 3 else array[..., :1].repeat(3, 2))
    if max(image.size) > MAX_SIDE:
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return image
