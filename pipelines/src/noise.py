"""The noise level of a forward, in [0, 1], with as few waits for the device as possible."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch

from diffsparse.pipelines.state import ModelState

__all__ = ["noise_level"]


def noise_level(state: ModelState, arguments: Mapping[str, Any]) -> float | None:
    """What the family makes of the forward's timestep, 1 at the start; None where the forward was given none.

    Of timesteps that differ between items or tokens (image-to-video holds given frames at 0) the noisiest counts.
    """
    timestep = arguments.get(state.family.timestep)
    if timestep is None:
        return None
    if isinstance(timestep, torch.Tensor):
        value = _from_schedule(state, timestep) if timestep.device.type != "cpu" else None
        if value is None:
            # Waits for the device where the tensor is on one.
            rising = state.family.timestep_scale == "unit_rising"
            value = float(timestep.min() if rising else timestep.max())
    else:
        value = float(timestep)
    scheduler = state.scheduler
    steps = int(scheduler.config.get("num_train_timesteps", 1000)) if scheduler else state.num_train_timesteps
    return state.family.noise_level(value, steps, scheduler)


def _from_schedule(state: ModelState, timestep: torch.Tensor) -> float | None:
    """The value of a timestep that is a view of the scheduler's timesteps: its offset tells which, its value is known.

    Costs one wait per schedule instead of one per forward.
    """
    timesteps = getattr(state.scheduler, "timesteps", None)
    if (
        not isinstance(timesteps, torch.Tensor)
        or timesteps.ndim != 1
        or timesteps.dtype != timestep.dtype
        or timesteps.device != timestep.device
        or timesteps.untyped_storage().data_ptr() != timestep.untyped_storage().data_ptr()
        or not (timestep.numel() == 1 or all(stride == 0 for stride in timestep.stride()))
    ):
        return None
    position, rest = divmod(int(timestep.storage_offset() - timesteps.storage_offset()), int(timesteps.stride(0)) or 1)
    if rest or not 0 <= position < len(timesteps):
        return None
    known = state.schedule
    version = None if timesteps.is_inference() else timesteps._version  # those made in inference mode count none
    if known is None or known[0][0]() is not timesteps or known[0][1] != version:
        known = ((weakref.ref(timesteps), version), timesteps.tolist())
        state.schedule = known
    return float(known[1][position])
