"""What to search for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from diffsparse.search.columns import shorten
from diffsparse.search.errors import BadInput
from diffsparse.search.generate import MAX_SEED, GenerationSettings
from diffsparse.search.signature import check_generates, parameters

__all__ = ["FREE_SETTINGS", "SearchConfig", "thoroughness"]

# What may differ between two searches that share a store: nothing that is measured depends on it.
FREE_SETTINGS = ("budget", "density", "steps", "dense_steps", "validation_prompts", "candidates", "repair")


@dataclass(frozen=True)
class SearchConfig:
    """What to search for. Exactly one of ``budget`` and ``density`` is set.

    ``budget``: share of the dense run's self-attention time over the whole trajectory. ``density``: whole-trajectory
    density. ``steps``: denoising steps of the generations that the plan is tuned for (it runs with any number).
    ``trace_steps``: steps of the generations that are measured. ``trace_prompts``: how many of the prompts are traced.
    ``samples``: queries sampled of every query block. ``dense_steps`` fixes the number of dense first steps, which the
    search chooses otherwise. ``validation_prompts``: on how many prompts that were not traced whole generations choose
    among the best ``candidates`` plans (0: the predicted best is taken). ``repair``: fit what the chosen plan's heads
    get wrong, on the traced prompts (``diffsparse.repair``). Sizes are in pixels. Steps, guidance and sizes
    that are None are the pipeline's own (:meth:`resolved`).
    """

    budget: float | None = 0.4
    density: float | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    seed: int = 0
    block_size: int = 64
    trace_steps: int = 8
    trace_prompts: int = 2
    samples: int = 4
    dense_steps: int | None = None
    validation_prompts: int = 1
    candidates: int = 3
    repair: bool = True

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.density is None):
            raise BadInput("give a budget or a density, one of the two")
        share = self.budget if self.budget is not None else self.density
        if share is None or not 0 < share <= 1:
            raise BadInput(f"a budget or density is a share in (0, 1], got {share}")
        for name in ("steps", "trace_steps", "trace_prompts", "samples", "candidates"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise BadInput(f"{name} must be at least 1, got {value}")
        if not 0 <= self.seed <= MAX_SEED:
            raise BadInput(f"the seed is an integer from 0 to {MAX_SEED}, got {shorten(str(self.seed), 60)}")
        if self.validation_prompts < 0:
            raise BadInput(f"validation_prompts must be at least 0, got {self.validation_prompts}")
        if self.dense_steps is not None and self.dense_steps < 0:
            raise BadInput(f"dense_steps must be at least 0, got {self.dense_steps}")
        if self.dense_steps is not None and self.steps is not None and self.dense_steps >= self.steps:
            raise BadInput(f"dense_steps lies between 0 and {self.steps - 1}, got {self.dense_steps}")

    def resolved(self, pipe: Any) -> SearchConfig:
        """The same with the pipeline's own steps, guidance and sizes where this has None.

        Raises :class:`BadInput` where no search is possible with this pipeline, with the reason.
        """
        check_generates(pipe)
        if "num_inference_steps" not in parameters(pipe):
            raise BadInput(
                f"{type(pipe).__name__} takes no num_inference_steps, and a search measures generations of few steps; "
                "search with another pipeline of this model: a plan fits every pipeline with the same transformer"
            )
        own = self.settings(self.steps).resolved(pipe)
        if own.num_inference_steps is None:
            raise BadInput(f"{type(pipe).__name__} has no number of steps of its own; give it: --steps, or steps=")
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


def thoroughness(device: torch.device, trace_prompts: int | None = None, samples: int | None = None) -> dict[str, Any]:
    """How much to measure by default: on a GPU more than a few CPU cores can do in minutes."""
    on_gpu = device.type == "cuda"
    return {
        "trace_prompts": (4 if on_gpu else 2) if trace_prompts is None else trace_prompts,
        "samples": (12 if on_gpu else 4) if samples is None else samples,
    }
