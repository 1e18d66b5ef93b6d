"""Presets brought to a given share of the attention, so that methods can be compared at equal density.

Each has one number that says how much it computes: its knob. That number is looked for; all else stays as the preset
has it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

from diffsparse.preset_plans import PRESETS
from diffsparse.published import PUBLISHED
from diffsparse.search.errors import BadInput

__all__ = ["KNOBS", "NEAR", "REACH", "Knob", "OutOfReach", "find_value", "knob_of", "method_names", "parse_methods"]

#: How near a density is looked for, and how far from it the nearest one may be where a knob has steps.
NEAR, REACH = 0.005, 0.05
#: Values that are tried for one density where each takes a generation: so many, or more until one is within reach.
TRIES, MOST_TRIES = 9, 16
#: Values where trying one costs no generation.
CHEAP_TRIES = 40
#: Presets that are no method of their own: nothing is left out, and a window with another size.
NO_METHODS = ("dense", "conservative")


@dataclass(frozen=True)
class Knob:
    """``options`` of a preset for a number from ``low`` to ``high``: the larger it is, the more is computed."""

    low: float
    high: float
    options: Callable[[float], dict[str, Any]]


def _option(name: str, low: float = 0.005, high: float = 1.0) -> Knob:
    return Knob(low, high, lambda value: {name: value})


def _size(t: float, h: float, w: float) -> Knob:
    """A window that grows in its own proportions until it is all that there is."""
    return Knob(0.02, 1 / min(t, h, w), lambda value: {"size": tuple(min(1.0, value * side) for side in (t, h, w))})


#: By preset. Others with an option ``density`` take that.
KNOBS: dict[str, Knob] = {
    "window": _size(0.5, 0.4, 0.4),
    "radial": _option("decay", 0.02),
    "gna": _size(0.6, 0.5, 0.3),
    "xattention": _option("tau", 0.02),
    "blade": Knob(0.02, 1.0, lambda value: {"mass": value, "least": 0.0, "most": 1.0}),
    "vmoba": _option("tau", 0.02),
    # What stands out by fewer deviations is more.
    "sol": Knob(-4.0, 4.0, lambda value: {"tau": -value}),
    "online": _option("density"),
    "sta": _size(0.6, 0.5, 0.3),
    "sparge": _option("tau", 0.02),
    # Logits that fall behind by more are let go.
    "lite": Knob(-2.0, 40.0, lambda value: {"threshold": -value}),
    "sale": Knob(-4.0, 40.0, lambda value: {"tau": math.exp(-value)}),
    "anchor": _option("theta", -20.0, 80.0),
    "flexprefill": _option("gamma", 0.02),
    "proxyattn": _option("gamma", 0.02),
}


class OutOfReach(ValueError):
    """A method cannot be brought to a density. The message is the row's reason."""


def method_names() -> tuple[str, ...]:
    """All methods that there are, each a preset."""
    return tuple(name for name in PRESETS if name not in NO_METHODS)


def parse_methods(text: str | Iterable[str]) -> tuple[str, ...]:
    """``all``, ``none`` (plans only), or names in a list or with commas between them. Raises :class:`BadInput`."""
    names = [name.strip() for name in text.split(",")] if isinstance(text, str) else list(text)
    if names == ["none"] or not names:
        return ()
    chosen: list[str] = []
    for name in names:
        if name == "all":
            chosen += method_names()
        elif name in method_names():
            chosen.append(name)
        else:
            raise BadInput(f"--methods: there is no method {name!r}; use all, none, or {', '.join(method_names())}")
    return tuple(dict.fromkeys(chosen))


def knob_of(name: str) -> Knob:
    """The knob of a preset. Raises :class:`OutOfReach` for one that has none."""
    if name in KNOBS:
        return KNOBS[name]
    if name in PUBLISHED and "density" in inspect.signature(PUBLISHED[name].entry).parameters:
        return _option("density")
    raise OutOfReach(f"{name} has no option that sets how much it computes")


def find_value(
    knob: Knob,
    wanted: float,
    density_of: Callable[[float], float],
    known: MutableMapping[float, float],
    *,
    cheap: bool,
) -> tuple[float, float]:
    """The value of a knob whose density is nearest to ``wanted``, and that density.

    density_of: the whole-trajectory density at a value, which does not fall as the value rises. known: what was tried,
    also for other densities; it grows. cheap: trying costs no generation. Where two are as near, the sparser one is
    taken. Raises :class:`OutOfReach` where the nearest one is further away than :data:`REACH`.
    """

    def tried(value: float) -> float:
        if value not in known:
            known[value] = density_of(value)
        return known[value]

    def nearest() -> tuple[float, float]:
        return min(known.items(), key=lambda each: (round(abs(each[1] - wanted), 6), each[1]))

    if (least := tried(knob.low)) > wanted + NEAR:
        return _within_reach(wanted, nearest(), f"it takes {least:.3f} at least")
    if cheap and (most := tried(knob.high)) < wanted - NEAR:
        return _within_reach(wanted, nearest(), f"it takes {most:.3f} at most")
    why = f"{CHEAP_TRIES if cheap else MOST_TRIES} values were tried"
    for turn in range(CHEAP_TRIES if cheap else MOST_TRIES):
        if abs(nearest()[1] - wanted) <= (REACH if turn >= TRIES and not cheap else NEAR):
            break
        low, below = max(each for each in known.items() if each[1] <= wanted + NEAR)
        # At the far end nothing is left out, whether that was tried or not.
        high, above = min(
            (each for each in known.items() if each[1] > wanted + NEAR and each[0] > low), default=(knob.high, 1.0)
        )
        # On the line between the two, and now and then halfway, for densities that rise in steps.
        share = 0.5 if turn % 3 == 2 or above <= below else min(0.9, max(0.1, (wanted - below) / (above - below)))
        value = round(low + share * (high - low), 6)
        if value in (low, high):
            why = "it goes in steps"
            break
        tried(value)
    return _within_reach(wanted, nearest(), why)


def _within_reach(wanted: float, found: tuple[float, float], why: str) -> tuple[float, float]:
    if abs(found[1] - wanted) <= REACH:
        return found
    raise OutOfReach(f"cannot be brought to {wanted:g}: {why}; the nearest density found is {found[1]:.3f}")
