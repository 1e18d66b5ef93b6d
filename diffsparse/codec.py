"""Patterns, entries and schedules as plain JSON values, and back, with every field checked."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

import numpy as np

from diffsparse.entry import Execution, HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.order import TokenOrder, parse_order
from diffsparse.pattern import (
    Band,
    Bitmap,
    Columns,
    Diagonals,
    Empty,
    Full,
    GridStripes,
    Intersection,
    Pattern,
    Radial,
    Sink,
    TextColumns,
    TextRows,
    Union,
    Window,
)
from diffsparse.schedule import Schedule

__all__ = ["PlanError", "decode_entry", "decode_schedule", "encode_entry", "encode_schedule"]

PATTERNS: dict[str, type[Pattern]] = {
    cls.kind: cls
    for cls in (
        Band, Bitmap, Columns, Diagonals, Empty, Full, GridStripes, Intersection, Radial, Sink, TextColumns, TextRows,
        Union, Window,
    )
}  # fmt: skip


class PlanError(ValueError):
    """A plan that cannot be read, or that does not belong to the model at hand."""


def _plain(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, Pattern):
        return encode_pattern(value, arrays)
    if isinstance(value, TokenOrder):
        return str(value)
    if isinstance(value, TokenGrid):
        return list(value.shape)
    if isinstance(value, bytes):
        name = f"bitmap_{len(arrays)}"
        arrays[name] = np.frombuffer(value, np.uint8)
        return name
    return [_plain(v, arrays) for v in value] if isinstance(value, tuple) else value


def encode_pattern(pattern: Pattern, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """A pattern as JSON values; bitmaps put their bits into ``arrays`` and keep the name."""
    return {"kind": pattern.kind, **{f.name: _plain(getattr(pattern, f.name), arrays) for f in fields(pattern)}}


def _check_keys(what: str, data: Any, cls: type, extra: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise PlanError(f"{what} must be an object, got {type(data).__name__}")
    known = {f.name: f for f in fields(cls)}
    if unknown := sorted(set(data) - set(known) - set(extra)):
        raise PlanError(f"{what} has keys this version does not know: {', '.join(unknown)}; update diffsparse")
    required = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    if missing := sorted(set(required) - set(data)):
        raise PlanError(f"{what} lacks {', '.join(missing)}")
    return {k: v for k, v in data.items() if k in known}


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def decode_pattern(data: Any, arrays: dict[str, np.ndarray], depth: int = 0) -> Pattern:
    """The inverse of :func:`encode_pattern`; raises :class:`PlanError`."""
    if depth > 16:
        raise PlanError("a pattern is nested more than 16 deep")
    kind = data.get("kind") if isinstance(data, dict) else None
    if kind not in PATTERNS:
        raise PlanError(f"unknown pattern kind {kind!r}; this version knows {', '.join(sorted(PATTERNS))}")
    cls = PATTERNS[kind]
    values = _check_keys(f"pattern {kind!r}", data, cls, ("kind",))
    try:
        if cls is Bitmap:
            name = values["bits"]
            if name not in arrays:
                raise PlanError(f"the plan names a bitmap {name!r} that its safetensors file does not hold")
            return Bitmap(
                grid=TokenGrid(*values["grid"]),
                order=parse_order(values["order"]),
                block_size=values["block_size"],
                bits=arrays[name].tobytes(),
                fallback=decode_pattern(values["fallback"], arrays, depth + 1) if "fallback" in values else Full(),
            )
        if cls in (Union, Intersection):
            parts = tuple(decode_pattern(part, arrays, depth + 1) for part in values["parts"])
            return cls(parts=parts)  # type: ignore[call-arg]
        return cls(**{k: _tuples(v) for k, v in values.items()})
    except PlanError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        raise PlanError(f"pattern {kind!r}: {error}") from error


def encode_entry(entry: HeadEntry, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """A head entry as JSON values."""
    return {
        "order": str(entry.order),
        "pattern": encode_pattern(entry.pattern, arrays),
        "selection": entry.selection,
        "execution": {f.name: getattr(entry.execution, f.name) for f in fields(Execution)},
    }


def decode_entry(data: Any, arrays: dict[str, np.ndarray]) -> HeadEntry:
    """The inverse of :func:`encode_entry`; raises :class:`PlanError`."""
    values = _check_keys("an entry", data, HeadEntry)
    execution = _check_keys("an entry's execution", values.get("execution", {}), Execution)
    try:
        return HeadEntry(
            order=parse_order(values.get("order", "raster")),
            pattern=decode_pattern(values.get("pattern", {"kind": "full"}), arrays),
            selection=values.get("selection", "static"),
            execution=Execution(**execution),
        )
    except PlanError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        raise PlanError(f"entry: {error}") from error


def encode_schedule(schedule: Schedule) -> dict[str, Any]:
    """A schedule as JSON values."""
    return {f.name: _plain(getattr(schedule, f.name), {}) for f in fields(Schedule)}


def decode_schedule(data: Any) -> Schedule:
    """The inverse of :func:`encode_schedule`; raises :class:`PlanError`."""
    values = _check_keys("the schedule", data, Schedule)
    try:
        return Schedule(**{k: _tuples(v) for k, v in values.items()})
    except (TypeError, ValueError) as error:
        raise PlanError(f"schedule: {error}") from error
