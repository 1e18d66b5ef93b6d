"""A plan against dense attention on a tiny random pipeline."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from diffsparse.pipelines import sparse_attention_summary
from diffsparse.preset_plans import preset
from diffsparse.search import evaluate_plan, metrics
from diffsparse.search.errors import BadInput
from diffsparse.search.evaluate import DenseSet, compare, generate_dense, paired
from diffsparse.search.generate import GenerationSettings, LoopTimer, generate_clip, generate_clips
from tests.search.plans import make_plan
from tests.search.tiny import PROMPTS, SHAPE

SETTINGS = GenerationSettings(num_inference_steps=3, guidance_scale=3.0, **SHAPE)


@pytest.fixture(scope="module")
def dense(pipe: Any) -> DenseSet:
    return generate_dense(pipe, PROMPTS, (1, 2), SETTINGS, progress=False)


def test_clips_depend_on_the_seed_alone(pipe: Any) -> None:
    a, b = generate_clips(pipe, PROMPTS[:1], [3, 4], SETTINGS, progress=False)
    again = generate_clip(pipe, PROMPTS[0], 3, SETTINGS)
    assert a.frames.shape == (9, 3, 48, 48) and a.frames.dtype == torch.float32
    assert torch.equal(a.frames, again.frames) and not torch.equal(a.frames, b.frames)
    assert a.noise_levels[0] == 1.0 and len(a.noise_levels) == 3
    assert 0 < a.loop_seconds < a.seconds


def test_an_argument_that_the_pipeline_does_not_take_is_refused() -> None:
    class Images:
        def __call__(self, prompt: str, num_inference_steps: int, guidance_scale: float) -> None: ...

    with pytest.raises(BadInput, match="takes no num_frames"):
        GenerationSettings(num_frames=5).arguments(Images())
    with pytest.raises(BadInput, match="takes no negative_prompt, true_cfg_scale"):
        GenerationSettings(true_cfg_scale=3.0).arguments(Images())


def test_true_guidance_gets_something_to_guide_away_from() -> None:
    class Images:
        def __call__(
            self,
            prompt: str,
            negative_prompt: str | None,
            true_cfg_scale: float,
            num_inference_steps: int,
            guidance_scale: float,
        ) -> None: ...

    def given(**settings: Any) -> dict[str, Any]:
        return GenerationSettings(**settings).arguments(Images())

    assert given(true_cfg_scale=3.0)["negative_prompt"] == "" and given(true_cfg_scale=3.0)["true_cfg_scale"] == 3.0
    assert given(true_cfg_scale=3.0, negative_prompt="blurred")["negative_prompt"] == "blurred"
    assert "negative_prompt" not in given(true_cfg_scale=1.0)
    assert "true_cfg_scale" not in given()


@pytest.mark.parametrize("seeds", [[], [-1], [2, 2]])
def test_seeds_are_checked(pipe: Any, seeds: list[int]) -> None:
    with pytest.raises(BadInput, match="seeds"):
        generate_dense(pipe, PROMPTS, seeds, SETTINGS)


def test_the_timer_covers_the_loop_alone() -> None:
    class Slow(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.02)
            return x

    module = Slow()
    timer = LoopTimer([module])
    with timer.running():
        time.sleep(0.05)
        for _ in range(2):
            module(torch.zeros(1))
            time.sleep(0.01)
        time.sleep(0.05)
    assert 0.05 <= timer.seconds < 0.1
    assert not module._forward_hooks and not module._forward_pre_hooks
    assert LoopTimer([module]).seconds == 0.0


def test_the_dense_plan_is_dense(pipe: Any, dense: DenseSet) -> None:
    report = compare(pipe, preset("dense"), dense, progress=False)
    assert [c.psnr for c in report.clips] == [metrics.MAX_PSNR] * 4
    assert report.trajectory_density == 1.0 and report.call_density is None
    assert report.passed and report.broken == []


def test_a_sparse_plan(pipe: Any, dense: DenseSet) -> None:
    plan = make_plan()
    report = compare(pipe, plan, dense, progress=False)
    assert [(c.prompt, c.seed) for c in report.clips] == [(p, s) for p in PROMPTS for s in (1, 2)]
    assert dense.other_seed_psnr is not None and dense.other_seed_psnr < 40
    for clip in report.clips:
        assert 20 < clip.psnr < metrics.MAX_PSNR and clip.worst_frame_psnr <= clip.psnr
        assert clip.above_other_seed == pytest.approx(clip.psnr - dense.other_seed_psnr)
        assert clip.ssim is not None and 0 < clip.ssim <= 1 and clip.lpips is None
    assert report.worst.psnr == min(c.psnr for c in report.clips)
    assert not sparse_attention_summary(pipe).enabled


def test_densities_are_those_of_the_plan(pipe: Any, dense: DenseSet) -> None:
    """What ran, warm-up left out, is what the plan's arithmetic says."""
    from diffsparse.grid import TokenGrid

    plan, grid = make_plan(), TokenGrid(3, 12, 12)
    report = compare(pipe, plan, dense, progress=False)
    assert report.trajectory_density == pytest.approx(plan.trajectory_density(grid, dense.noise_levels))
    phases = [p for p in plan.schedule.phases(dense.noise_levels) if p is not None]
    calls = plan.call_densities(grid)[phases]
    # A layer whose heads keep everything on this grid runs dense, and is no sparse call.
    assert report.call_density == pytest.approx(float(calls[calls < 1].mean()))
    assert 0 < report.call_density < report.trajectory_density < 1


def test_the_report_is_plain_json(pipe: Any, dense: DenseSet) -> None:
    report = compare(pipe, preset("window"), dense, progress=False)
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["plan"] == "window" and data["passed"] and len(data["clips"]) == 4
    assert data["psnr"]["n"] == 4 and data["psnr"]["minimum"] <= data["psnr"]["mean"] <= data["psnr"]["maximum"]
    assert data["psnr"]["low"] is None is data["psnr"]["high"]  # four clips have no interval
    assert data["noise_floor"]["psnr"] > 60 and data["settings"]["num_frames"] == 9
    assert data["loop_seconds"]["speedup"] > 0 and data["seconds"]["dense"] > data["loop_seconds"]["dense"]
    text = report.table()
    for part in ("whole trajectory", "of another seed", "worst clip", PROMPTS[1]):
        assert part in text
    assert PROMPTS[0] not in report.table(clips=False).split("worst clip")[0]


def test_another_seed_with_one_seed_given(pipe: Any) -> None:
    report = evaluate_plan(
        pipe, "window", PROMPTS[:1], seeds=[5], num_inference_steps=2, noise_floor=False, progress=False, **SHAPE
    )
    assert report.other_seed_psnr is not None and report.noise_floor is None
    assert report.psnr is not None and report.psnr.low is None  # one clip has no interval


def test_broken_clips_fail(pipe: Any, dense: DenseSet, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffsparse.search import evaluate as module

    real = module.generate_clip

    def black_second(pipe: Any, prompt: Any, seed: int, settings: GenerationSettings) -> Any:
        clip = real(pipe, prompt, seed, settings)
        return replace(clip, frames=clip.frames * torch.nan) if seed == 2 and clip.prompt == PROMPTS[0] else clip

    monkeypatch.setattr(module, "generate_clip", black_second)
    report = compare(pipe, preset("window"), dense, progress=False)
    assert not report.passed
    assert report.broken == [f"sparse clip of {PROMPTS[0]!r}, seed 2: nan"]
    assert (report.worst.prompt, report.worst.seed) == (PROMPTS[0], 2)
    assert report.psnr is not None and report.psnr.n == 3
    data = report.to_dict()
    assert not data["passed"] and data["clips"][1]["psnr"] is None
    assert "BROKEN: sparse clip" in report.table()


def test_two_plans_in_pairs(pipe: Any, dense: DenseSet) -> None:
    window = compare(pipe, preset("window"), dense, progress=False)
    same = compare(pipe, preset("dense"), dense, progress=False)
    difference = paired(same, window)
    assert difference is not None and difference.n == 4 and difference.minimum > 0
    assert paired(window, window).mean == 0  # type: ignore[union-attr]


def test_sparse_attention_is_off_after_an_error(pipe: Any, dense: DenseSet, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffsparse.search import evaluate as module

    def fail(*args: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(module, "generate_clip", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        compare(pipe, preset("window"), dense, progress=False)
    assert not sparse_attention_summary(pipe).enabled


def test_lpips_that_is_not_there_is_noted(pipe: Any, dense: DenseSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lpips", None)
    report = compare(pipe, preset("dense"), dense, lpips=True, progress=False)
    assert report.lpips is None and any("LPIPS" in note for note in report.notes)
