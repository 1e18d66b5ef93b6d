"""What a plan's record says, as far as code reads it: free JSON otherwise.

Nothing in it changes an output, but commands take their defaults from it and print it: a known key has its type.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from diffsparse.grid import TokenGrid
from diffsparse.limits import MAX_GRID_TOKENS, MAX_INTEGER, MAX_ITEMS, MAX_TEXT
from diffsparse.messages import shown
from diffsparse.typed import PlanError, Reading, shape_of

__all__ = ["check_record", "recorded_grid"]

Check = Callable[[Any, str], None]
_READING = Reading()
_LARGEST = 2**20  # of steps, of a picture's side, of frames


def _text(value: Any, where: str) -> None:
    if not isinstance(value, str) or len(value) > MAX_TEXT or not value.isprintable():
        raise PlanError(f"{where} must be a text of at most {MAX_TEXT:,} characters on one line, got {shown(value)}")


def _number(value: Any, where: str) -> None:
    shape_of(float)(value, where, _READING)


def _at_most_one(value: Any, where: str) -> None:
    _number(value, where)
    if not -1 <= value <= 1:
        raise PlanError(f"{where} must be from -1 to 1, got {shown(value)}")


def _count(value: Any, where: str) -> None:
    if type(value) is not int or not 0 <= value <= _LARGEST:
        raise PlanError(f"{where} must be an integer from 0 to {_LARGEST:,}, got {shown(value)}")


def _flag(value: Any, where: str) -> None:
    if not isinstance(value, bool):
        raise PlanError(f"{where} must be true or false, got {shown(value)}")


def _setting(value: Any, where: str) -> None:
    """Of a generation: commands that take their defaults from it say what is wrong with it; here it is bounded."""
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise PlanError(f"{where} must be at most {_LARGEST:,}, got {shown(value)}")


def _list_of(check: Check) -> Check:
    def checked(value: Any, where: str) -> None:
        if not isinstance(value, list) or len(value) > MAX_ITEMS:
            raise PlanError(f"{where} must be a list of at most {MAX_ITEMS:,}, got {shown(value)}")
        for i, item in enumerate(value):
            check(item, f"{where}[{i}]")

    return checked


def _object_of(**known: Check) -> Check:
    """An object whose known keys are as given, or null, and which may have others."""

    def checked(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise PlanError(f"{where} must be an object, got {shown(value)}")
        for name, check in known.items():
            if value.get(name) is not None:
                check(value[name], f"{where}.{name}")

    return checked


def _each(check: Check) -> Check:
    def checked(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise PlanError(f"{where} must be an object, got {shown(value)}")
        for name, item in value.items():
            check(item, f"{where}.{shown(name, 40)}")

    return checked


def _grid(value: Any, where: str) -> None:
    grid = recorded_grid(value)
    if grid is not None and grid.seq_len > MAX_GRID_TOKENS:
        raise PlanError(f"{where} has {grid.seq_len:,} tokens, at most {MAX_GRID_TOKENS:,} are read")


_RECORD = _object_of(
    preset=_text,
    name=_text,
    model=_object_of(id=_text, pipeline=_text),
    calibration=_object_of(
        grid=_grid,
        trace_steps=_count,
        traced_prompts=_count,
        also=_object_of(grid=_grid, **dict.fromkeys(("height", "width", "num_frames"), _setting)),
        **dict.fromkeys(("steps", "height", "width", "num_frames", "guidance_scale", "true_cfg_scale"), _setting),
    ),
    search=_object_of(
        budget=_number,
        density=_number,
        target=_at_most_one,
        points=_list_of(_object_of(**dict.fromkeys(("budget", "density", "ssim_worst", "loop_speedup"), _number))),
        dense_steps=_count,
        of_steps=_count,
        phases=_count,
        seconds=_number,
        trajectory_density=_number,
        call_density=_number,
        predicted_attention_time=_number,
        predicted_error=_number,
        unstable_heads=_list_of(_text),
    ),
    costs=_object_of(
        device=_text,
        dense_seconds=_number,
        fill=_number,
        densities=_list_of(_number),
        share=_each(_list_of(_number)),
    ),
    quality=_object_of(
        prompts=_count,
        reached=_flag,
        held_out=_flag,
        **dict.fromkeys(("psnr_mean", "loop_speedup"), _number),
        **dict.fromkeys(("ssim_worst", "target", "density"), _at_most_one),
    ),
    speed=_object_of(),
    environment=_object_of(),
)


def check_record(record: Any) -> None:
    """Raise :class:`PlanError` where a key that code reads has another type than it relies on."""
    _RECORD(record, "record")


def recorded_grid(value: Any) -> TokenGrid | None:
    """A grid as ``str(grid)`` wrote it (``5x32x32``, ``226+13x30x45``, ``33x45x80+256``), or as a list of three.

    None if it is not a grid; commands then ask for one, as they do when nothing is recorded.
    """
    before, after = 0, 0
    if isinstance(value, str):
        found = re.fullmatch(r"(?:([0-9]{1,9})\+)?([0-9]{1,9})x([0-9]{1,9})x([0-9]{1,9})(?:\+([0-9]{1,9}))?", value)
        if found is None:
            return None
        before, *shape, after = (int(digits or 0) for digits in found.groups())
    elif isinstance(value, list) and len(value) == 3 and all(type(n) is int and n <= MAX_INTEGER for n in value):
        shape = value
    else:
        return None
    frames, height, width = shape
    return TokenGrid(frames, height, width, before, after) if min(shape) >= 1 else None
