"""From what the user passed as ``plan`` to one plan per transformer, and where it came from."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffsparse.kernels.cache import cache_root
from diffsparse.pipelines._diffusers import local_folder
from diffsparse.pipelines.families.sizes import USUAL_SIZES
from diffsparse.pipelines.family import architecture_of
from diffsparse.plan import JSON_NAME, PlanError, SparsityPlan
from diffsparse.presets import PRESETS, conservative, preset

__all__ = ["PLAN_FOLDER", "cache_folder", "resolve_plans"]

logger = logging.getLogger("diffsparse")

#: Where a model's folder holds its plan.
PLAN_FOLDER = "sparse_plan"
#: Blocks of 64 tokens that are square: on an image a run of as many in raster order is a piece of a row.
IMAGE_TILE = (1, 8, 8)


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
        if plan == "conservative":
            return conservative(), "preset 'conservative'"
        if plan == "radial" and _makes_images(transformer):
            return preset(plan, tile=IMAGE_TILE), f"preset {plan!r} on tiles of 8 x 8, as for images"
        if plan in PRESETS:
            return preset(plan), f"preset {plan!r}"
    if isinstance(plan, (str, os.PathLike)):
        return SparsityPlan.from_pretrained(plan), str(plan)
    raise TypeError(
        f"plan must be a SparsityPlan, a folder or Hub id, 'auto', 'conservative', {', '.join(map(repr, PRESETS))}, or "
        f"a dict of these by transformer; got {type(plan).__name__}"
    )


def _makes_images(transformer: torch.nn.Module) -> bool:
    usual = USUAL_SIZES.get(architecture_of(transformer).model_class)
    return usual is not None and usual[1].frames == 1


def _describe(plan: SparsityPlan) -> str:
    name = plan.record.get("preset")
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
    logger.info("%s: plan 'auto' took the conservative preset: %s%s", name, why, _passed(passed))
    return conservative(), f"auto: conservative preset, {why}"


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
