"""Scores in a byte each: for ranking blocks and adding up what they are worth, the size of a score is what counts."""

from __future__ import annotations

import numpy as np

__all__ = ["from_codes", "to_codes"]

#: What is smaller than the largest score by more than this counts as nothing.
RANGE = 1e9
_STEP = float(np.log(RANGE)) / 254


def to_codes(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of the values' logarithms, 4% from them at most, and the largest value of each matrix.

    values: float ``[..., N, N]``, none below 0. Returns uint8 of the same shape and float32 ``[..., 1, 1]``.
    """
    wide = np.maximum(values.astype(np.float32), 0.0)
    peak = wide.max(axis=(-2, -1), keepdims=True)
    # Code 0 is 0; 255 is the peak.
    least = np.where(peak > 0, peak, 1.0)
    with np.errstate(divide="ignore"):
        codes = np.rint(255 + np.log(wide / least) / _STEP)
    return np.clip(codes, 0, 255).astype(np.uint8), peak.astype(np.float32)


def from_codes(codes: np.ndarray, peak: np.ndarray) -> np.ndarray:
    """The values again, float32."""
    levels = np.exp((np.arange(256) - 255) * _STEP).astype(np.float32)
    levels[0] = 0.0
    return levels[codes] * peak
