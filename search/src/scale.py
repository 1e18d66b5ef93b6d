"""From sizes in pixels and frames to a token grid, before any model runs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from diffsparse.grid import TokenGrid
from diffsparse.search.errors import BadInput

__all__ = ["TokenScale", "scale_of_class", "scale_of_pipeline", "scale_of_record"]


@dataclass(frozen=True)
class TokenScale:
    """What one token covers.

    height, width: pixels. frames: frames of the clip for one of the latent; None for a model of images.
    first_alone: the first frame has a latent frame of its own, so that clips have ``frames * k + 1`` frames.
    frame_patch: latent frames of one token.
    source: where this is known from, for messages.
    """

    height: int
    width: int
    frames: int | None
    first_alone: bool = True
    frame_patch: int = 1
    source: str = ""

    def grid(self, height: int, width: int, num_frames: int | None) -> TokenGrid:
        """The visual tokens of an output of ``height x width`` pixels. Raises :class:`BadInput` for odd sizes."""
        for name, value, unit in (("height", height, self.height), ("width", width, self.width)):
            if value < unit or value % unit:
                below = max(value // unit, 1) * unit
                raise BadInput(
                    f"--{name} {value}: a token covers {unit} pixels ({self.source}), so it must be a multiple of "
                    f"{unit}, for example {below} or {below + unit}"
                )
        return TokenGrid(self._token_frames(num_frames), height // self.height, width // self.width)

    def _token_frames(self, num_frames: int | None) -> int:
        if self.frames is None:
            if num_frames not in (None, 1):
                raise BadInput(f"--num-frames {num_frames}: this model makes images ({self.source}); leave it out")
            return 1
        if num_frames is None:
            raise BadInput("give --num-frames too: this model makes videos")
        first = 1 if self.first_alone else 0
        latent, rest = divmod(num_frames - first, self.frames)
        if rest or latent + first < 1:
            form = f"{self.frames}k+1" if first else f"{self.frames}k"
            below = max(latent, 0 if first else 1) * self.frames + first
            raise BadInput(
                f"--num-frames {num_frames}: this model takes {form} frames ({self.source}), for example {below} or "
                f"{below + self.frames}"
            )
        return -(-(latent + first) // self.frame_patch)


def scale_of_pipeline(pipe: Any) -> TokenScale:
    """From a pipeline's autoencoder and patches; its weights need not be there (:func:`load.load_shapes`)."""
    from diffsparse.pipelines import architecture_of, find_transformers
    from diffsparse.search.load import compression, shape_rule

    temporal, spatial = compression(pipe)
    patch = architecture_of(next(iter(find_transformers(pipe).values()))).patch_size
    video = shape_rule(pipe).frames is not None
    return TokenScale(
        height=spatial * patch[1],
        width=spatial * patch[2],
        frames=temporal if video else None,
        frame_patch=patch[0],
        source=f"{type(pipe).__name__} of this folder",
    )


def scale_of_class(name: str) -> tuple[TokenScale, tuple[int, int, int | None]]:
    """From the usual size of a transformer class (``docs/models.md``), which it gives too: height, width, frames."""
    from diffsparse.pipelines.families.sizes import USUAL_SIZES

    if name not in USUAL_SIZES:
        raise BadInput(
            f"--model-shape {name!r}: neither a folder nor a transformer class that is known; `diffsparse models` "
            "lists the classes"
        )
    text, grid = USUAL_SIZES[name]
    found = re.match(r"(\d+) x (\d+)(?:, (\d+) frames)?", text)
    assert found is not None, text
    height, width = int(found[1]), int(found[2])
    frames = int(found[3]) if found[3] else None
    ratio = None if frames is None else _frame_ratio(frames, grid.frames)
    if height % grid.height or width % grid.width or (frames is not None and ratio is None):
        raise BadInput(
            f"--model-shape {name}: its usual size ({text}) does not tell the grid of others; name a model's folder, "
            "or give --grid T,H,W"
        )
    scale = TokenScale(
        height // grid.height,
        width // grid.width,
        None if ratio is None else ratio[0],
        first_alone=ratio is None or ratio[1],
        source=f"as usual for {name}",
    )
    return scale, (height, width, frames)


def scale_of_record(calibration: Any, grid: TokenGrid) -> TokenScale | None:
    """From what a plan says of the clips that it was searched with, or None where it does not say."""
    if not isinstance(calibration, dict):
        return None
    height, width, frames = (calibration.get(name) for name in ("height", "width", "num_frames"))
    if not isinstance(height, int) or not isinstance(width, int) or height % grid.height or width % grid.width:
        return None
    ratio: tuple[int, bool] | None = None
    if isinstance(frames, int):
        # One frame tells nothing about the others.
        ratio = _frame_ratio(frames, grid.frames) if grid.frames > 1 else None
        if ratio is None:
            return None
    elif frames is not None or grid.frames > 1:
        return None
    return TokenScale(
        height // grid.height,
        width // grid.width,
        None if ratio is None else ratio[0],
        first_alone=ratio is None or ratio[1],
        source="by the plan's calibration",
    )


def _frame_ratio(frames: int, tokens: int) -> tuple[int, bool] | None:
    """``(frames for each token, whether the first stands alone)``, or None where neither rule gives a whole number."""
    if tokens > 1 and frames > 1 and (frames - 1) % (tokens - 1) == 0:
        return (frames - 1) // (tokens - 1), True
    return (frames // tokens, False) if frames % tokens == 0 else None
