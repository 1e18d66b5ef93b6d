"""How near two clips are, and whether a clip is broken.

A clip is float ``[frames, channels, height, width]`` in [0, 1], as decoded and before any video encoding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

__all__ = [
    "MAX_PSNR",
    "SSIM_WINDOW",
    "border_error",
    "find_defects",
    "frame_errors",
    "frame_psnr",
    "last_frame_error",
    "load_lpips",
    "lpips_distance",
    "motion",
    "psnr",
    "ssim",
]

#: PSNR of equal clips in dB: fp32 pixels hold no finer difference, and an average of infinities says nothing.
MAX_PSNR = 120.0
#: Side of the window of SSIM in pixels; smaller pictures have none.
SSIM_WINDOW = 11

# Thresholds for broken clips, in units of the pixel range; half a step of 8-bit video is 0.002.
BLACK_LEVEL = 0.01
FLAT_STD = 0.002
FROZEN_MOTION = 1e-4
FROZEN_SHARE = 0.05  # of the motion of the dense clip


def _check(clip: torch.Tensor, reference: torch.Tensor) -> None:
    if clip.ndim != 4 or clip.shape != reference.shape:
        raise ValueError(
            f"clips must be [frames, channels, height, width] of one shape, got {tuple(clip.shape)} "
            f"and {tuple(reference.shape)}"
        )


def _decibel(mse: float) -> float:
    if math.isnan(mse):
        return math.nan
    return MAX_PSNR if mse <= 10 ** (-MAX_PSNR / 10) else -10 * math.log10(mse)


def psnr(clip: torch.Tensor, reference: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB over all pixels of all frames, at most :data:`MAX_PSNR`; NaN if a pixel is."""
    _check(clip, reference)
    return _decibel(float((clip.double() - reference.double()).square().mean()))


def border_error(clip: torch.Tensor, reference: torch.Tensor) -> float | None:
    """Squared error along the four edges over that of the middle; None where the middle has none.

    The edge is a sixteenth of the side, at least a pixel: one or two latent tokens of the sizes that models make.
    """
    _check(clip, reference)
    error = (clip.double() - reference.double()).square().mean((0, 1))
    inside = torch.zeros_like(error, dtype=torch.bool)
    top, left = (max(1, side // 16) for side in error.shape)
    inside[top : error.shape[0] - top, left : error.shape[1] - left] = True
    return _over(error[~inside], error[inside])


def last_frame_error(clip: torch.Tensor, reference: torch.Tensor) -> float | None:
    """Squared error of the last frame over the mean of the others; None for an image, or where the others have none."""
    _check(clip, reference)
    error = (clip.double() - reference.double()).square().mean((1, 2, 3))
    return _over(error[-1:], error[:-1])


def _over(part: torch.Tensor, rest: torch.Tensor) -> float | None:
    if not rest.numel() or not float(rest.mean()):
        return None
    return float(part.mean() / rest.mean())


def frame_errors(clip: torch.Tensor, reference: torch.Tensor) -> list[float]:
    """Mean squared error of every frame, of pixels in [0, 1]."""
    _check(clip, reference)
    return [float(m) for m in (clip.double() - reference.double()).square().mean((1, 2, 3))]


def frame_psnr(clip: torch.Tensor, reference: torch.Tensor) -> list[float]:
    """:func:`psnr` of every frame."""
    return [_decibel(error) for error in frame_errors(clip, reference)]


def ssim(clip: torch.Tensor, reference: torch.Tensor) -> float | None:
    """Structural similarity, mean over pixels, channels and frames: 1 for equal clips; None below 11 pixels a side.

    Wang et al., "Image quality assessment: from error visibility to structural similarity", IEEE TIP 13(4), 2004,
    section III: a Gaussian window of 11 pixels with a deviation of 1.5, pictures being reflected at their edges.
    """
    _check(clip, reference)
    if min(clip.shape[2:]) < SSIM_WINDOW:
        return None
    # Frame by frame: all of a long clip at once would take many copies of it.
    values = [_ssim_of_frame(a.double(), b.double()) for a, b in zip(clip, reference, strict=True)]
    return sum(values) / len(values)


def _ssim_of_frame(x: torch.Tensor, y: torch.Tensor) -> float:
    """Of ``[channels, height, width]`` each."""
    at = torch.arange(SSIM_WINDOW, dtype=x.dtype) - SSIM_WINDOW // 2
    window = torch.exp(-(at**2) / (2 * 1.5**2)).to(x.device)
    window = window / window.sum()
    x, y = (F.pad(each, [SSIM_WINDOW // 2] * 4, mode="reflect") for each in (x, y))
    maps = torch.stack([x, y, x * x, y * y, x * y]).flatten(0, 1)[:, None]
    maps = F.conv2d(F.conv2d(maps, window[None, None, :, None]), window[None, None, None])
    mean_x, mean_y, xx, yy, xy = maps[:, 0].unflatten(0, (5, -1))
    of_means, of_squares = mean_x * mean_y, mean_x**2 + mean_y**2
    light, contrast = 0.01**2, 0.03**2  # of pixels in [0, 1]
    top = (2 * of_means + light) * (2 * (xy - of_means) + contrast)
    return float((top / ((of_squares + light) * (xx + yy - of_squares + contrast))).mean())


def load_lpips(device: torch.device | str = "cpu") -> Any | None:
    """LPIPS (AlexNet), or None where the package or its weights are not here."""
    try:
        import lpips

        return lpips.LPIPS(net="alex", verbose=False).to(device).eval()
    except (ImportError, OSError):  # not installed; no network to fetch the weights through
        return None


def lpips_distance(model: Any, clip: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean LPIPS distance of the frames; ``model`` is what :func:`load_lpips` gave."""
    _check(clip, reference)
    device = next(model.parameters()).device
    with torch.no_grad():
        values = [
            float(model((a[None] * 2 - 1).to(device), (b[None] * 2 - 1).to(device)))
            for a, b in zip(clip.float(), reference.float(), strict=True)
        ]
    return sum(values) / len(values)


def motion(clip: torch.Tensor) -> float:
    """Mean absolute difference between neighbouring frames; 0 for a single frame."""
    return float(clip.diff(dim=0).abs().mean()) if clip.shape[0] > 1 else 0.0


def find_defects(clip: torch.Tensor, reference: torch.Tensor | None = None) -> list[str]:
    """What is broken about a clip: ``nan``, ``black``, ``flat`` (every frame of one colour), ``frozen``; mostly empty.

    With a ``reference`` a clip is frozen, too, where it moves less than 5% of what the reference does.
    """
    if not torch.isfinite(clip).all():
        return ["nan"]
    found = []
    if float(clip.max()) < BLACK_LEVEL:
        found.append("black")
    elif float(clip.std(dim=(2, 3), correction=0).max()) < FLAT_STD:
        found.append("flat")
    if clip.shape[0] > 1 and not found:
        moves = motion(clip)
        wanted = motion(reference) * FROZEN_SHARE if reference is not None else 0.0
        if moves < max(FROZEN_MOTION, wanted):
            found.append("frozen")
    return found
