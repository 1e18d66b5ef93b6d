"""What a plan says of the generations that it was searched with, checked: its file may be somebody else's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from diffsparse.search.columns import printable, shorten
from diffsparse.search.errors import BadInput

__all__ = ["RECORDED", "recorded", "recorded_value"]

#: Names in a plan's ``calibration``, and whether the value is a whole number.
RECORDED = {
    "steps": True,
    "height": True,
    "width": True,
    "num_frames": True,
    "guidance_scale": False,
    "true_cfg_scale": False,
}


def recorded_value(record: Mapping[str, Any], name: str) -> Any:
    """One of :data:`RECORDED` in a plan's ``record``, or None where it does not say.

    Raises :class:`BadInput` for a value that is not such a number.
    """
    calibration = record.get("calibration")
    if calibration is None:
        return None
    if not isinstance(calibration, Mapping):
        raise BadInput(f"the plan's calibration is {_shown(calibration)}, and not an object; {_ADVICE}")
    value = calibration.get(name)
    if value is None:
        return None
    whole = RECORDED[name]
    number = isinstance(value, int) or (not whole and isinstance(value, float))
    if isinstance(value, bool) or not number or not math.isfinite(value) or value < (1 if whole else 0):
        allowed = "a whole number of at least 1" if whole else "a number of at least 0"
        raise BadInput(
            f"the plan's calibration has {name}: {_shown(value)}; it must be {allowed}. {_ADVICE.capitalize()}"
        )
    return value


def recorded(record: Mapping[str, Any]) -> dict[str, Any]:
    """All of :data:`RECORDED` that the plan says. Raises :class:`BadInput` for a value that is not such a number."""
    found = {name: recorded_value(record, name) for name in RECORDED}
    return {name: value for name, value in found.items() if value is not None}


_ADVICE = "search the plan again, or mend its sparse_plan.json"


def _shown(value: Any) -> str:
    return printable(shorten(repr(value), 60))
