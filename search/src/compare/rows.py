"""What is compared: a row for each method at each density, and one for each plan."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffsparse.plan import SparsityPlan
from diffsparse.search.errors import BadInput
from diffsparse.search.load import load_plan

__all__ = ["DENSITIES", "METHOD", "PLAN", "SEARCHED", "Row", "check_densities", "plans_by_name", "rows_of"]

#: Whole-trajectory densities that methods are brought to, where none are asked for.
DENSITIES = (0.5, 0.35, 0.25)
#: Kinds of rows: a preset at a density, a plan composed from a search's record, a plan as it is.
METHOD, SEARCHED, PLAN = "method", "searched", "plan"


@dataclass(frozen=True)
class Row:
    """One row. ``key``: names it in the record and in files. ``asked``: the density, None for a plan as it is.
    ``plan``: where it is known beforehand."""

    key: str
    name: str
    kind: str
    asked: float | None = None
    plan: SparsityPlan | None = None


def check_densities(densities: Sequence[float]) -> tuple[float, ...]:
    """The densities, each once, the largest first. Raises :class:`BadInput`."""
    found = sorted({float(value) for value in densities}, reverse=True)
    if not found or not all(0 < value < 1 for value in found):
        raise BadInput(
            f"--densities {','.join(f'{value:g}' for value in densities)}: shares of dense attention between 0 and 1, "
            "for example .5,.35,.25"
        )
    return tuple(found)


def plans_by_name(plans: Mapping[str, Any] | Sequence[Any]) -> dict[str, SparsityPlan]:
    """Plans by the names of their rows: what is given by name, and folders by their own. Raises :class:`BadInput`."""
    if isinstance(plans, (str, os.PathLike, SparsityPlan)):
        raise BadInput("plans are a list or a dict by name, got one by itself; put it in brackets")
    named = list(plans.items()) if isinstance(plans, Mapping) else [(_name_of(plan), plan) for plan in plans]
    found: dict[str, SparsityPlan] = {}
    for name, plan in named:
        unique, count = name, 1
        while unique in found:
            count += 1
            unique = f"{name} ({count})"
        found[unique] = plan if isinstance(plan, SparsityPlan) else load_plan(os.fspath(plan))
    return found


def _name_of(plan: Any) -> str:
    if isinstance(plan, SparsityPlan):
        return str(plan.record.get("preset") or plan.record.get("name") or "plan")
    path = Path(plan)
    return (path.resolve().name if path.exists() else str(plan)) or str(plan)


def rows_of(
    methods: Sequence[str], densities: Sequence[float], searched: bool, plans: Mapping[str, SparsityPlan]
) -> list[list[Row]]:
    """All rows, in groups that one process makes together: the densities of a method share what was tried."""
    groups = []
    if searched:
        groups.append([Row(f"searched-{d:g}", "searched", SEARCHED, d) for d in densities])
    for name, plan in plans.items():
        groups.append([Row(f"plan-{_slug(name)}", name, PLAN, None, plan)])
    groups += [[Row(f"{name}-{d:g}", name, METHOD, d) for d in densities] for name in methods]
    keys = [row.key for group in groups for row in group]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise BadInput(f"two plans have names that are alike ({', '.join(twice)}); rename one's folder")
    return groups


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")[:60] or "plan"
