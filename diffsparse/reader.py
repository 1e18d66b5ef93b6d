"""Reads plan files, which come from other people: sizes are bounded first, and every value is checked.

What is wrong is a :class:`PlanError` of one line that says where it stands and shows at most a few words of it.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from diffsparse.architecture import TEXT_POSITIONS, Architecture
from diffsparse.codec import decode_entry, decode_schedule
from diffsparse.limits import MAX_ARRAY_BYTES, MAX_ENTRIES, MAX_HEADS, MAX_JSON_BYTES, MAX_JSON_VALUES
from diffsparse.messages import named, one_line, shown
from diffsparse.provenance import check_record
from diffsparse.repair import REPAIR_KEY, read_repair
from diffsparse.saving import ARRAYS_NAME, DIGEST_KEY, JSON_NAME, arrays_digest
from diffsparse.typed import PlanError, Reading, read_object, shape_of

__all__ = ["FORMAT_VERSION", "read_files", "read_plan"]

FORMAT_VERSION = 1

_REQUIRED = {"format", "format_version", "block_size", "schedule", "entries", "layers", "index"}
_KEYS = _REQUIRED | {"architecture", "record", DIGEST_KEY, REPAIR_KEY}
_NAMES = shape_of(tuple[str, ...])
_INTEGER = shape_of(int)


# -- bytes -------------------------------------------------------------------------------------------------------------


def read_files(folder: Path) -> tuple[bytes, dict[str, np.ndarray]]:
    """The JSON and the arrays of a plan's folder. Raises :class:`PlanError`, also for files larger than plans are."""
    file, arrays = folder / JSON_NAME, folder / ARRAYS_NAME
    if not file.is_file():
        raise PlanError(
            f"{folder} is not a plan: it has no {JSON_NAME}; a plan is a folder that `diffsparse search` wrote"
        )
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise PlanError(f"{file} is larger than {MAX_JSON_BYTES >> 20} MiB, the most that a plan may have")
        return file.read_bytes(), _read_arrays(arrays) if arrays.is_file() else {}
    except OSError as error:
        raise PlanError(f"{error.filename or file} cannot be read: {error.strerror or error}") from error


def _read_arrays(file: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if file.stat().st_size > MAX_ARRAY_BYTES:
        raise PlanError(f"{file} is larger than {MAX_ARRAY_BYTES >> 20} MiB, the most that a plan may have")
    try:
        return load_file(file)
    # The last three: types of numbers that numpy lacks.
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise PlanError(f"{file} cannot be read: {one_line(str(error), 120)}") from error


def _parse(content: bytes) -> Any:
    """The JSON's values; keys that stand twice and numbers that are none are refused."""
    if len(content) > MAX_JSON_BYTES:
        raise PlanError(f"it has more than {MAX_JSON_BYTES >> 20} MiB, the most that a plan may have")
    if sum(content.count(sign) for sign in (b",", b"[", b"{")) > MAX_JSON_VALUES:
        raise PlanError(f"it has more than {MAX_JSON_VALUES:,} values, the most that a plan may have")
    try:
        return json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_no_constants,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        raise PlanError(f"it is not valid JSON: {one_line(str(error), 160)}") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} stands twice")
    return found


def _no_constants(name: str) -> Any:
    raise ValueError(f"{name} is not a number that JSON has")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{one_line(text, 40)} is too large for a number")
    return value


# -- values ------------------------------------------------------------------------------------------------------------


def read_plan(content: bytes, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """The arguments of a ``SparsityPlan`` from the bytes of its JSON and its arrays by name."""
    data = _parse(content)
    if not isinstance(data, dict) or data.get("format") != "diffsparse.sparse_plan":
        raise PlanError("not a sparsity plan (its 'format' is not 'diffsparse.sparse_plan')")
    version = data.get("format_version")
    if type(version) is not int or version < 1:
        raise PlanError(f"format_version must be an integer of at least 1, got {shown(version)}")
    if version > FORMAT_VERSION:
        raise PlanError(
            f"format version {shown(version)} is newer than {FORMAT_VERSION}, which this diffsparse reads; "
            "update diffsparse"
        )
    _check_keys(data)
    # Where there are none at all, the entry that names one is told.
    if arrays and DIGEST_KEY in data and data[DIGEST_KEY] != arrays_digest(arrays):
        raise PlanError(
            f"{ARRAYS_NAME} belongs to another plan: saving was interrupted, or the folder was copied in part; "
            "save or search the plan again, or copy the whole folder"
        )
    entries, record = data["entries"], data.get("record", {})
    if not isinstance(entries, list) or not isinstance(record, dict):
        raise PlanError("entries must be a list and record an object")
    if len(entries) > MAX_ENTRIES:
        raise PlanError(f"the plan has {len(entries):,} entries, at most {MAX_ENTRIES:,} are read")
    check_record(record)
    reading = Reading(arrays)
    return {
        "entries": tuple([decode_entry(entry, reading, f"entries[{i}]") for i, entry in enumerate(entries)]),
        "index": _index(data["index"]),
        "layers": _NAMES(data["layers"], "layers", reading),
        "schedule": decode_schedule(data["schedule"]),
        "block_size": _INTEGER(data["block_size"], "block_size", reading),
        "architecture": _architecture(data.get("architecture"), reading),
        "record": record,
        "repair": read_repair(data.get(REPAIR_KEY), arrays),
    }


def _check_keys(data: dict[str, Any]) -> None:
    ignorable = data.get("ignorable", [])
    if not isinstance(ignorable, list) or not all(isinstance(key, str) for key in ignorable):
        raise PlanError(f"ignorable must be a list of keys, got {shown(ignorable)}")
    unknown = sorted(set(data) - _KEYS - {"ignorable"})
    # A newer writer lists the keys that no number depends on; any other unknown key might change the output.
    if refused := sorted(set(unknown) - set(ignorable)):
        raise PlanError(f"keys this version does not know: {named(refused)}; update diffsparse")
    if unknown:
        warnings.warn(f"the plan has keys that this version ignores: {named(unknown)}", stacklevel=5)
    if missing := sorted(_REQUIRED - set(data)):
        raise PlanError(f"it lacks {', '.join(missing)}")


def _index(data: Any) -> np.ndarray:
    """Places in the entries, int64 ``[phases, layers, heads]``, from a string of numbers for each phase and layer."""
    if not isinstance(data, list) or not data or not all(isinstance(phase, list) and phase for phase in data):
        raise PlanError(f"index must have a list for each phase, with a string for each layer; got {shown(data)}")
    rows = [row for phase in data for row in phase]
    if any(type(row) is not str for row in rows) or len({len(phase) for phase in data}) > 1:
        raise PlanError("index must have one string for each layer, and as many of them in every phase")
    text = "\n".join(rows)
    if found := re.search(r"[^0-9 \n]|[0-9]{8}", text):
        raise PlanError(f"index must have places in entries, parted by spaces; got {shown(found.group())}")
    heads = {len(row.split()) for row in rows}
    if len(heads) > 1 or heads == {0}:
        raise PlanError(f"index must have as many heads in every layer and phase; got {shown(sorted(heads))}")
    count = len(rows) * heads.pop()
    if count > MAX_HEADS:
        raise PlanError(f"index has {count:,} heads over all layers and phases, at most {MAX_HEADS:,} are read")
    return np.array(text.split()).astype(np.int64).reshape(len(data), len(data[0]), -1)


def _architecture(data: Any, reading: Reading) -> Architecture | None:
    if data is None:
        return None
    if not isinstance(data, dict):
        raise PlanError(f"architecture must be an object, got {shown(data)}")
    read: Architecture = read_object(Architecture, data, "architecture", "architecture", reading, extra="fingerprint")
    if read.text_position not in TEXT_POSITIONS:
        raise PlanError(
            f"architecture.text_position must be one of {', '.join(TEXT_POSITIONS)}; got {shown(read.text_position)}"
        )
    for name, value in (("heads", read.heads), ("head_dim", read.head_dim), ("patch_size", min(read.patch_size))):
        if value < 1:
            raise PlanError(f"architecture.{name} must be at least 1, got {value}")
    if not read.layers or len(set(read.layers)) != len(read.layers):
        raise PlanError("architecture.layers must name at least one layer, and each once")
    if data.get("fingerprint", read.fingerprint) != read.fingerprint:
        raise PlanError("the architecture does not match its fingerprint: the file was edited or damaged")
    return read
