"""What to search for."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch

from diffsparse.online import OnlineRepair
from diffsparse.plan import PlanError
from diffsparse.search.columns import shorten
from diffsparse.search.errors import BadInput
from diffsparse.search.generate import MAX_SEED, GenerationSettings
from diffsparse.search.metrics import SSIM_WINDOW
from diffsparse.search.signature import PLAIN, check_generates, parameters
from diffsparse.search.verdict import SAME_SSIM
from diffsparse.tokens import BLOCK_SIZES

__all__ = ["DEFAULT_TARGET", "FREE_SETTINGS", "SearchConfig", "thoroughness"]

# What may differ between two searches that share a store: nothing that is measured depends on it.
FREE_SETTINGS = (
    "budget", "density", "target", "points", "steps", "dense_steps", "validation_prompts", "candidates", "repair",
    "reuse_memory", "repair_rows",
)  # fmt: skip

#: SSIM that every clip keeps where neither a budget nor a density is given: clips that are taken for the same.
DEFAULT_TARGET = SAME_SSIM
#: Plans that are validated on the way to a target, at most.
DEFAULT_POINTS = 4


@dataclass(frozen=True)
class SearchConfig:
    """What to search for. At most one of ``budget``, ``density`` and ``target`` is set; none means a target of 0.95.

    ``budget``: share of the dense run's self-attention time over the whole trajectory. ``density``: whole-trajectory
    density. ``target``: SSIM to dense that the worst validation clip keeps; the sparsest plan that does so is searched.
    ``steps``: denoising steps of the generations that the plan is tuned for (it runs with any number).
    ``trace_steps``: steps of the generations that are measured. ``trace_prompts``: how many of the prompts are traced;
    None: as many as take a few minutes.
    ``block_size``: tokens of a block, 64 or 128; None is 128 for heads of 128 channels, for which kernels on a GPU are
    faster with larger blocks, else 64. ``samples``: queries sampled of every query
    block; None: fewer where there are more blocks. ``dense_steps`` fixes the
    number of dense first steps, which the search chooses otherwise. ``validation_prompts``: on how many prompts that
    were not traced whole generations choose among the best ``candidates`` plans (0: the predicted best is taken). None
    is 1, and 2 for a target, which takes further seeds where there are too few prompts. ``candidates``: None is 3, and
    1 for a target, at every budget that is tried. ``repair``: fit what the chosen plan's heads get wrong, on the
    traced prompts (``diffsparse.repair``), or, where ``repair_rows`` is not 0, have each call fit it by so many
    exact rows (``diffsparse.online``). ``points``: how many budgets are tried for a target, at most; None is 4.
    ``reuse_memory``: GB of outputs that a run may keep to use them again at later steps (``diffsparse.reuse``); 0:
    none; None: a quarter of the most that the dense model takes on a GPU, 1 GB on a CPU. Sizes are in pixels.
    ``also_size``: height, width and frames (None for images) of a second size, at which two generations are traced as
    well: masks are made from both sizes, and options are chosen by what they leave at both.
    Steps, guidance and sizes that are None are the pipeline's own (:meth:`resolved`).
    """

    budget: float | None = None
    density: float | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    seed: int = 0
    block_size: int | None = None
    trace_steps: int = 8
    trace_prompts: int | None = 2
    samples: int | None = 4
    dense_steps: int | None = None
    validation_prompts: int | None = None
    candidates: int | None = None
    repair: bool = True
    repair_rows: int = 0
    target: float | None = None
    points: int | None = None
    reuse_memory: float | None = None
    also_size: tuple[int, int, int | None] | None = None

    def __post_init__(self) -> None:
        asked = {n: v for n in ("budget", "density", "target") if (v := getattr(self, n)) is not None}
        if len(asked) > 1:
            given = " and ".join(f"{name} {shorten(repr(value), 60)}" for name, value in asked.items())
            raise BadInput(f"give a budget, a density or a target, one of the three, got {given}")
        for name, share in asked.items():
            if isinstance(share, bool) or not isinstance(share, Real) or not 0 < float(share) <= 1:
                what = "an SSIM" if name == "target" else "a share"
                raise BadInput(f"a {name} is {what} in (0, 1], got {shorten(repr(share), 60)}")
        for name in ("steps", "trace_steps", "trace_prompts", "samples", "candidates", "points"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise BadInput(f"{name} must be at least 1, got {value}")
        if self.block_size not in (None, *BLOCK_SIZES):
            raise BadInput(
                f"block_size is {' or '.join(map(str, BLOCK_SIZES))}, got {shorten(repr(self.block_size), 60)}"
            )
        if not 0 <= self.seed <= MAX_SEED:
            raise BadInput(f"the seed is an integer from 0 to {MAX_SEED}, got {shorten(str(self.seed), 60)}")
        if self.also_size is not None:
            object.__setattr__(self, "also_size", _checked_size(self.also_size))
        memory = self.reuse_memory
        if memory is not None and not (isinstance(memory, Real) and math.isfinite(memory) and memory >= 0):
            raise BadInput(f"a reuse memory is a number of GB of at least 0, got {shorten(repr(memory), 60)}")
        if self.repair_rows:
            try:
                OnlineRepair(self.repair_rows)
            except PlanError as error:
                raise BadInput(f"{error}, or 0 for maps that the search fits") from None
            if not self.repair:
                raise BadInput(f"repair_rows is {self.repair_rows}, and repair is switched off; give one of the two")
        if self.validation_prompts is not None and self.validation_prompts < 0:
            raise BadInput(f"validation_prompts must be at least 0, got {self.validation_prompts}")
        if self.goal is None and self.points is not None:
            raise BadInput(
                f"points are of a search for a target, and one for a {next(iter(asked))} has none; leave points out"
            )
        if self.goal is not None and self.validation_prompts == 0:
            raise BadInput(
                f"a target ({self.goal:g}) is measured on whole generations, and validation_prompts is 0; "
                "give 1 or more, or a budget or density instead"
            )
        if self.dense_steps is not None and self.dense_steps < 0:
            raise BadInput(f"dense_steps must be at least 0, got {self.dense_steps}")
        if self.dense_steps is not None and self.steps is not None and self.dense_steps >= self.steps:
            raise BadInput(f"dense_steps lies between 0 and {self.steps - 1}, got {self.dense_steps}")

    @property
    def also_text(self) -> str:
        """The second size as an option names it."""
        return "x".join(str(side) for side in self.also_size or () if side is not None)

    @property
    def goal(self) -> float | None:
        """The target that is searched for; None where a budget or density is."""
        return DEFAULT_TARGET if self.budget is None and self.density is None and self.target is None else self.target

    def for_heads(self, head_dim: int) -> SearchConfig:
        """The same with a block size for heads of so many channels, where it is left open."""
        return replace(self, block_size=self.block_size or (128 if head_dim == 128 else 64))

    @property
    def block(self) -> int:
        """Tokens of a block; 64 as long as that is left open (:meth:`for_heads`)."""
        return self.block_size or min(BLOCK_SIZES)

    @property
    def tries(self) -> int:
        """How many budgets are tried at most."""
        return 1 if self.goal is None else DEFAULT_POINTS if self.points is None else self.points

    @property
    def clips(self) -> int:
        """How many clips a plan is validated on at most."""
        if self.validation_prompts is not None:
            return self.validation_prompts
        return 1 if self.goal is None else 2

    @property
    def online(self) -> OnlineRepair | None:
        """The repair that each call fits, where that is asked for."""
        return OnlineRepair(self.repair_rows) if self.repair_rows else None

    @property
    def fits_repair(self) -> bool:
        """Whether the search fits what the chosen plan gets wrong."""
        return self.repair and not self.repair_rows

    @property
    def tried_plans(self) -> int:
        """Among how many of the best plans whole generations choose, under one budget or density."""
        if not self.clips:
            return 1
        if self.candidates is not None:
            return self.candidates
        return 3 if self.goal is None else 1

    def resolved(self, pipe: Any, given: Collection[str] = PLAIN) -> SearchConfig:
        """The same with the pipeline's own steps, guidance and sizes where this has None.

        ``given``: the arguments of the inputs. Raises :class:`BadInput` where no search is possible with them and this
        pipeline, with the reason.
        """
        check_generates(pipe, given)
        if "num_inference_steps" not in parameters(pipe):
            raise BadInput(
                f"{type(pipe).__name__} takes no num_inference_steps, and a search measures generations of few steps; "
                "search with another pipeline of this model: a plan fits every pipeline with the same transformer"
            )
        own = self.settings(self.steps).resolved(pipe)
        if own.num_inference_steps is None:
            raise BadInput(
                f"{type(pipe).__name__} has no number of steps of its own; give it: --steps, or num_inference_steps="
            )
        for name in ("height", "width"):
            if self.goal is not None and (side := getattr(own, name)) is not None and side < SSIM_WINDOW:
                raise BadInput(
                    f"a {name} of {side}: a target is of SSIM, which needs at least {SSIM_WINDOW} pixels a side; "
                    "give a larger size, or a budget or density"
                )
        return replace(
            self,
            steps=own.num_inference_steps,
            guidance_scale=own.guidance_scale,
            height=own.height,
            width=own.width,
            num_frames=own.num_frames,
        )

    def settings(self, steps: int | None) -> GenerationSettings:
        """Of a generation with this many steps, all else as it is searched for."""
        return GenerationSettings(
            steps, self.guidance_scale, self.height, self.width, self.num_frames, true_cfg_scale=self.true_cfg_scale
        )


def _checked_size(size: Any) -> tuple[int, int, int | None]:
    """``(height, width, frames or None)`` of two or three numbers. Raises :class:`BadInput` for anything else."""
    sides = tuple(size) if isinstance(size, (tuple, list)) else ()
    if len(sides) == 3 and sides[2] is None:
        sides = sides[:2]
    if len(sides) not in (2, 3) or not all(isinstance(x, int) and not isinstance(x, bool) and x >= 1 for x in sides):
        raise BadInput(
            "also_size is a height and a width in pixels, and the frames of a clip, as (480, 832, 49); got "
            f"{shorten(repr(size), 60)}"
        )
    return sides[0], sides[1], sides[2] if len(sides) == 3 else None


def thoroughness(device: torch.device, trace_prompts: int | None = None, samples: int | None = None) -> dict[str, Any]:
    """How much to measure by default: on a GPU as much as the model's size allows, on a CPU what takes minutes."""
    on_gpu = device.type == "cuda"
    return {
        "trace_prompts": (None if on_gpu else 2) if trace_prompts is None else trace_prompts,
        "samples": (None if on_gpu else 4) if samples is None else samples,
    }
