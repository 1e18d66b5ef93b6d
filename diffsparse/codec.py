"""Entries and schedules as plain JSON values, and back, with every field checked."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

import numpy as np

from diffsparse.entry import Execution, HeadEntry
from diffsparse.messages import shown
from diffsparse.patterns.registry import decode_pattern, encode_pattern
from diffsparse.schedule import Schedule
from diffsparse.selection import Budget, OnlineSelection
from diffsparse.typed import PlanError, Reading, Shape, know, plain, read_object

__all__ = [
    "PlanError",
    "decode_entry",
    "decode_pattern",
    "decode_schedule",
    "encode_entry",
    "encode_pattern",
    "encode_schedule",
]


def _read_execution(value: Any, where: str, reading: Reading) -> Execution:
    return read_object(Execution, value, "an entry's execution", where, reading)  # type: ignore[no-any-return]


def _read_budget(value: Any, where: str, reading: Reading) -> Budget:
    return read_object(Budget, value, "a budget", where, reading)  # type: ignore[no-any-return]


def _read_selection(value: Any, where: str, reading: Reading) -> OnlineSelection:
    parameters = value.get("parameters", {})
    if type(parameters) is not dict:
        raise PlanError(f"{where}.parameters must be an object, got {shown(parameters)}")
    if "budget" not in value:
        raise PlanError(f"{where} lacks budget")
    value = value | {"parameters": [[name, number] for name, number in parameters.items()]}
    return read_object(OnlineSelection, value, "a selection", where, reading)  # type: ignore[no-any-return]


know(Execution, Shape("an object", (dict,), _read_execution))
know(Budget, Shape("an object", (dict,), _read_budget))
know(OnlineSelection, Shape("an object", (dict,), _read_selection))


def encode_entry(entry: HeadEntry, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """A head entry as JSON values."""
    return {
        "order": str(entry.order),
        "pattern": encode_pattern(entry.pattern, arrays),
        "selection": _plain_selection(entry.selection),
        "execution": _plain_execution(entry.execution),
    }


def _plain_selection(selection: str | OnlineSelection) -> Any:
    if isinstance(selection, str):
        return selection
    cadence = list(selection.cadence) if isinstance(selection.cadence, tuple) else selection.cadence
    return {
        "rule": selection.rule,
        "budget": asdict(selection.budget),
        "parameters": dict(selection.parameters),
        "cadence": cadence,
    }


def _plain_execution(execution: Execution) -> dict[str, Any]:
    # Plans without reuse stay as they were, for versions that do not know it.
    values = {f.name: getattr(execution, f.name) for f in fields(Execution)}
    return values if execution.reuse else {name: value for name, value in values.items() if name != "reuse"}


def decode_entry(data: Any, arrays: dict[str, np.ndarray] | Reading, where: str = "") -> HeadEntry:
    """The inverse of :func:`encode_entry`; raises :class:`PlanError`. ``where``: its place in the file."""
    reading = arrays if isinstance(arrays, Reading) else Reading(arrays)
    reading.parts = 0
    return read_object(HeadEntry, data, "an entry", where, reading)  # type: ignore[no-any-return]


def encode_schedule(schedule: Schedule) -> dict[str, Any]:
    """A schedule as JSON values."""
    values = {f.name: plain(getattr(schedule, f.name), {}, encode_pattern) for f in fields(Schedule)}
    if not schedule.dense_between:
        del values["dense_between"]  # such plans stay as they were, for versions that do not know it
    return values


def decode_schedule(data: Any) -> Schedule:
    """The inverse of :func:`encode_schedule`; raises :class:`PlanError`."""
    return read_object(Schedule, data, "the schedule", "schedule", Reading())  # type: ignore[no-any-return]
