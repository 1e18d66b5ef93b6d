"""From what the user passed as ``plan`` to one plan per transformer, and where it came from."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffsparse.grid import TokenGrid
from diffsparse.kernels.cache import cache_root
from diffsparse.order import TileOrder
from diffsparse.pipelines._diffusers import local_folder
from diffsparse.pipelines.families.sizes import USUAL_SIZES
from diffsparse.pipelines.family import architecture_of
from diffsparse.plan import JSON_NAME, PlanError, SparsityPlan
from diffsparse.preset_plans import PRESETS, preset

__all__ = ["PLAN_FOLDER", "cache_folder", "makes_images", "named_plan", "resolve_plans"]

logger = logging.getLogger("diffsparse")

#: Where a model's folder holds its plan.
PLAN_FOLDER = "sparse_plan"
#: The preset that ``"auto"`` takes where there is no plan: of those that need no search the one that came out best.
WITHOUT_SEARCH = "online"


def cache_folder(fingerprint: str) -> Path:
    """Where this machine keeps an architecture's plan, below ``$DIFFSPARSE_CACHE`` or ``~/.cache/diffsparse``."""
    return cache_root() / "plans" / fingerprint


def resolve_plans(
    pipe: Any, transformers: Mapping[str, torch.nn.Module], plan: Any
) -> dict[str, tuple[SparsityPlan, str]]:
    """``{component: (plan, where it came from)}``; transformers that a dict leaves out stay dense."""
    if not isinstance(plan, Mapping):
        return {name: _resolve(pipe, name, transformer, plan) for name, transformer in transformers.items()}
    if not plan:
        raise ValueError("the dict of plans is empty")
    if unknown := [name for name in plan if name not in transformers]:
        raise ValueError(f"no transformer called {', '.join(map(repr, unknown))}; there are {', '.join(transformers)}")
    return {name: _resolve(pipe, name, transformers[name], one) for name, one in plan.items() if one is not None}


def _resolve(pipe: Any, name: str, transformer: torch.nn.Module, plan: Any) -> tuple[SparsityPlan, str]:
    if isinstance(plan, SparsityPlan):
        return plan, _describe(plan)
    if isinstance(plan, str):
        if plan == "auto":
            return _auto(pipe, name, transformer)
        if plan in PRESETS:
            found = named_plan(plan, architecture_of(transformer).model_class)
            return found, _describe(found)
    if isinstance(plan, (str, os.PathLike)):
        return SparsityPlan.from_pretrained(plan), str(plan)
    raise TypeError(
        f"plan must be a SparsityPlan, a folder or Hub id, 'auto', {', '.join(map(repr, PRESETS))}, or "
        f"a dict of these by transformer; got {type(plan).__name__}"
    )


def named_plan(name: str, model_class: str | None = None, grid: TokenGrid | None = None) -> SparsityPlan:
    """The plan that one of ``PRESETS`` means for a transformer class. Whoever runs, judges or shows it asks here.

    Without a class that is known, a ``grid`` of one frame is an image. Raises ValueError for other names.
    """
    return preset(name, images=makes_images(model_class, grid))


def makes_images(model_class: str | None, grid: TokenGrid | None = None) -> bool:
    """Whether a transformer class makes images; of one that is not known, whether ``grid`` is one."""
    usual = USUAL_SIZES.get(model_class or "")
    known = usual[1] if usual is not None else grid
    return known is not None and known.frames == 1


def _describe(plan: SparsityPlan) -> str:
    name, order = plan.record.get("preset"), plan.entries[0].order
    if name == "radial" and isinstance(order, TileOrder):
        return f"preset 'radial' on tiles of {order.h} x {order.w}, as for images"
    return f"preset {name!r}" if isinstance(name, str) else "a SparsityPlan"


def _auto(pipe: Any, name: str, transformer: torch.nn.Module) -> tuple[SparsityPlan, str]:
    fingerprint = architecture_of(transformer).fingerprint
    passed: list[str] = []
    places = [(f"shipped with the model in {folder}", folder) for folder in _shipped(pipe, name, transformer)]
    places.append((f"cached for this architecture in {cache_folder(fingerprint)}", cache_folder(fingerprint)))
    for why, folder in places:
        if not (folder / JSON_NAME).is_file():
            continue
        try:
            plan = SparsityPlan.from_pretrained(folder)
        except PlanError as error:
            passed.append(str(error))
            continue
        if plan.architecture is None or plan.architecture.fingerprint != fingerprint:
            theirs = plan.architecture.fingerprint if plan.architecture else "none"
            passed.append(f"{folder} is for another architecture (fingerprint {theirs}, this is {fingerprint})")
            continue
        logger.info("%s: plan 'auto' took the plan %s%s", name, why, _passed(passed))
        return plan, f"auto: {why}"
    why = f"no plan is shipped or cached for this architecture (fingerprint {fingerprint})"
    logger.info("%s: plan 'auto' took the preset %r: %s%s", name, WITHOUT_SEARCH, why, _passed(passed))
    model = local_folder(pipe) or local_folder(transformer) or "MODEL"
    # Python shows a warning of one text once. It comes from this line, whoever calls.
    warnings.warn(
        f"plan='auto' found no plan for {architecture_of(transformer).model_class}{_passed(passed)}; the preset "
        f"{WITHOUT_SEARCH!r} runs, which picks blocks in every call. It was not searched for this model and changes "
        f"the output. A searched plan is closer and faster: `diffsparse search {model} --prompts FILE --out plan`. "
        f"plan={WITHOUT_SEARCH!r} takes this preset without a warning",
        stacklevel=1,
    )
    return preset(WITHOUT_SEARCH), f"auto: preset {WITHOUT_SEARCH!r}, {why}"


def _passed(passed: list[str]) -> str:
    return f"; passed over: {'; '.join(passed)}" if passed else ""


def _shipped(pipe: Any, name: str, transformer: torch.nn.Module) -> list[Path]:
    """Folders in which a model could ship its plan, most specific first."""
    roots: list[Path] = []
    for source, parent in ((pipe, False), (transformer, True)):
        if (folder := local_folder(source)) is not None:
            # A transformer lies in a folder of the pipeline's folder.
            roots += [folder, folder.parent] if parent else [folder]
    folders = [path for root in roots for path in (root / PLAN_FOLDER / name, root / PLAN_FOLDER)]
    return list(dict.fromkeys(folders))
