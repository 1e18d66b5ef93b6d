"""A look at a clip while it is denoised: its first frame, decoded now and then."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

__all__ = ["Previewer"]

#: Previews may take this share of the time.
SHARE = 0.1


def _moments_decoder(pipe: Any, latents: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """For video autoencoders with a mean and a spread per channel (Wan and its kin); latents ``[B, C, T, h, w]``."""
    config = pipe.vae.config
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if latents.ndim != 5 or mean is None or std is None or len(mean) != latents.shape[1]:
        return None
    shape = (1, -1, 1, 1, 1)

    def decode(z: torch.Tensor) -> torch.Tensor:
        z = z[:, :, :1]  # the first frame is coded by itself, so it alone can be decoded by itself
        z = z * torch.tensor(std, device=z.device).view(shape) + torch.tensor(mean, device=z.device).view(shape)
        return pipe.vae.decode(z.to(pipe.vae.dtype), return_dict=False)[0][:, :, 0]  # type: ignore[no-any-return]

    return decode


def _scale_decoder(pipe: Any, latents: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """For image autoencoders with one scale (AutoencoderKL); latents ``[B, C, h, w]``."""
    config = pipe.vae.config
    scale, channels = getattr(config, "scaling_factor", None), getattr(config, "latent_channels", None)
    if latents.ndim != 4 or scale is None or channels != latents.shape[1]:
        return None

    def decode(z: torch.Tensor) -> torch.Tensor:
        z = z / scale + (getattr(config, "shift_factor", None) or 0.0)
        return pipe.vae.decode(z.to(pipe.vae.dtype), return_dict=False)[0]  # type: ignore[no-any-return]

    return decode


def _decoder(pipe: Any, latents: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor] | None:
    if getattr(pipe, "vae", None) is None:
        return None
    return _moments_decoder(pipe, latents) or _scale_decoder(pipe, latents)


class Previewer:
    """Decodes a frame from the latents of a step, where enough time has passed since the last one.

    What is decoded is the clip that the model has in mind, not the noisy latents: of a step of flow matching by Euler,
    ``x' = x + (s' - s) v``, follows the velocity ``v``, and ``x' - s' v`` is the clip without noise. With other
    schedulers the latents are decoded as they are.

    ``seconds``: what all previews took. ``known``: False once a pipeline's latents turn out to be of a kind that cannot
    be decoded here; then there are no previews.
    """

    def __init__(self, pipe: Any, clock: Callable[[], float] = time.perf_counter) -> None:
        self._pipe, self._clock = pipe, clock
        self._before: torch.Tensor | None = None
        self._next = 0.0
        self.seconds = 0.0
        self.known = True

    def frame(self, step: int, latents: torch.Tensor) -> np.ndarray | None:
        """uint8 ``[height, width, 3]``, or None where it is too early for the next one, or none can be made."""
        before, self._before = self._before, latents.detach().clone()
        decode = _decoder(self._pipe, latents)
        self.known = decode is not None
        start = self._clock()
        if decode is None or start < self._next:
            return None
        with torch.no_grad():
            image = decode(self._clean(step, before, latents).float())[0]
        shown = ((image.float() / 2 + 0.5).clamp(0, 1).nan_to_num() * 255).round().byte()
        array = shown.permute(1, 2, 0).cpu().numpy()  # waits for the device
        took = self._clock() - start
        self.seconds += took
        self._next = self._clock() + took * (1 / SHARE - 1)
        return array if array.shape[2] == 3 else array[..., :1].repeat(3, 2)

    def _clean(self, step: int, before: torch.Tensor | None, after: torch.Tensor) -> torch.Tensor:
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = self._pipe.scheduler
        if before is None or not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            return after
        high, low = (float(s) for s in scheduler.sigmas[step : step + 2])
        return after.float() - low * (after.float() - before.float()) / (low - high)
