"""Evaluations that are made up, to be printed."""

from __future__ import annotations

from collections.abc import Sequence

from diffsparse.search.clip_report import ClipReport
from diffsparse.search.evaluate import EvalReport, NoiseFloor
from diffsparse.search.generate import GenerationSettings

__all__ = ["PROMPT", "clip", "report"]

PROMPT = "a red fox, 雪の中を走る, in the style of an old photograph of the nineteenth century; slow motion"


def clip(seed: int, psnr: float, lpips: float | None = 0.1) -> ClipReport:
    return ClipReport(PROMPT, seed, psnr, psnr - 1, 0.9123, lpips, psnr - 15.0, 12.5, 8.25, 14.0, 9.75, [], [])


def report(clips: Sequence[ClipReport]) -> EvalReport:
    return EvalReport(
        plan="out/plans/a-long-name-of-a-folder/with-another-in-it/sparse_plan",
        clips=list(clips),
        settings=GenerationSettings(num_inference_steps=20),
        call_density=0.25,
        trajectory_density=0.3,
        other_seed_psnr=15.0,
        noise_floor=NoiseFloor("torch SDPA, efficient_attention", 61.5, 0.9999),
        attention={},
        notes=["calls that ran dense (warm-up included): 120 x the mask is no padding mask, and a plan knows none"],
        environment={"device": "cuda: NVIDIA H200", "threads": 16},
    )
