"""Scores in a byte each: for ranking blocks, the size of a score is what counts."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["from_codes", "to_codes"]

#: What is smaller than the largest score by more than this counts as nothing.
RANGE = 1e9
_STEP = float(np.log(RANGE)) / 254


def to_codes(values: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of the values' logarithms, 4% from them at most, and the largest value of each matrix.

    values: float ``[..., N, N]`` on any device, none below 0. Returns uint8 of the same shape and float32
    ``[..., 1, 1]``.
    """
    wide = values.float().clamp_min(0.0)
    peak = wide.amax((-2, -1), keepdim=True)
    # Code 0 is 0; 255 is the peak. The logarithm of 0 is -inf, which ends at 0.
    codes = (255 + (wide / torch.where(peak > 0, peak, 1.0)).log_() / _STEP).round_().clamp_(0, 255)
    return codes.to(torch.uint8).cpu().numpy(), peak.cpu().numpy()


def from_codes(codes: np.ndarray, peak: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """The values again, float32."""
    levels = np.exp((np.arange(256) - 255) * _STEP).astype(np.float32)
    levels[0] = 0.0
    if torch.device(device).type == "cpu":  # several times as fast as torch's indexing
        return torch.from_numpy(np.take(levels, codes) * peak)
    found = torch.from_numpy(levels).to(device)[torch.from_numpy(codes).to(device).int()]
    return found * torch.from_numpy(peak).to(device)
