"""The script that `make demo` runs, on the small model, as short as it goes."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from diffsparse.search.errors import BadInput
from tests.helpers.process import ROOT, run_script
from tests.search.evaluations import clip, report

DEMO = ROOT / "examples" / "demo.py"


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_script", DEMO)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    done = run_script(DEMO, "--model", tmp_path / "nowhere", "--out", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: no model at") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--target", "1.5"], "error: a target is an SSIM in (0, 1], got 1.5"),
        (["--target", "0.9", "--budget", "0.4"], "error: give a budget, a density or a target, one of the three"),
        (["--points", "0"], "error: points must be at least 1, got 0"),
        (["--budget", "0.4", "--points", "3"], "error: points are of a search for a target"),
    ],
)
def test_wrong_options_are_told_before_a_model_is_loaded(
    demo: ModuleType, options: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["demo.py", "--out", str(tmp_path), *options])
    monkeypatch.setattr("diffsparse.search.load.load_pipeline", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as caught:
        demo.main()
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


def test_clips_of_validation_keep_more_than_the_target(demo: ModuleType) -> None:
    assert demo.validation_target(0.95) == pytest.approx(0.9625) and demo.validation_target(1.0) == 1.0
    for target in (0.01, 0.5, 0.99):
        assert target < demo.validation_target(target) < 1
    prompts = ["traced, and the longest of all", "b", "ccc", "dd"]
    assert demo.in_order(prompts, 1) == [prompts[0], "ccc", "dd", "b"]
    assert demo.in_order(prompts, 4) == prompts


@pytest.mark.parametrize(
    ("ssim", "seconds", "target", "says"),
    [
        (0.97, 8.0, 0.95, "1.25 times as fast as dense, and you would not see it: every clip is taken for its"),
        (0.97, 12.5, 0.95, "slower than dense here (0.80x), so leave this model dense, and you would not see it"),
        (0.90, 5.0, 0.95, "2.00 times as fast as dense, the clips miss the target of 0.95, and you would see it side"),
        (0.90, 5.0, None, "2.00 times as fast as dense, and you would see it side by side only"),
        (0.50, 5.0, 0.4, "2.00 times as fast as dense, and you would see it: some clips differ plainly"),
    ],
)
def test_it_ends_with_one_sentence(
    demo: ModuleType, ssim: float, seconds: float, target: float | None, says: str
) -> None:
    clips = [
        replace(clip(i, 30.0), ssim=ssim + i / 1000, dense_loop_seconds=10.0, sparse_loop_seconds=seconds)
        for i in range(2)
    ]
    sentence = demo.in_short(report(clips), target)
    assert sentence.startswith("In short: the denoising loop ") and says in sentence
    assert "\n" not in sentence and sentence.endswith(".")


@pytest.mark.slow(reason="a whole search on the small model, and small clips")
def test_the_demo_for_a_budget(tmp_path: Path) -> None:
    small = ("--size", 5, 64, 64, "--steps", 4, "--prompts", 1)
    done = run_script(DEMO, "--out", tmp_path, "--budget", 0.9, *small, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert "the best for 0.9 of the dense attention time" in done.stdout and "point 1" not in done.stdout
    assert done.stdout.splitlines()[-1].startswith("In short: the denoising loop ")


@pytest.mark.slow(reason="a whole search on the small model, and two clips")
def test_the_demo(demo: ModuleType, tmp_path: Path) -> None:
    done = run_script(DEMO, "--out", tmp_path, "--steps", 4, "--prompts", 1, timeout=1800)
    assert done.returncode == 0, done.stderr
    for part in (
        "density of the whole trajectory",
        "of another seed",
        "SSIM",
        "worst clip",
        "minutes in all",
        "point 1: budget",
    ):
        assert part in done.stdout
    for name in ("plan/sparse_plan.json", "plan.png", "contact_sheet.png", "clip_00.mp4", "eval.json"):
        assert (tmp_path / name).stat().st_size > 1000
    found = json.loads((tmp_path / "eval.json").read_text("utf-8"))
    assert done.stdout.splitlines()[-1].startswith("In short: the denoising loop ")
    search = json.loads((tmp_path / "plan" / "sparse_plan.json").read_text("utf-8"))["record"]["search"]
    assert search["target"] == demo.validation_target(demo.TARGET) and 1 <= len(search["points"]) <= 3
    assert found["passed"] and 0 < found["trajectory_density"] < 1
    assert found["psnr"]["mean"] > found["other_seed_psnr"]


def test_the_small_model_gets_its_shift(demo: ModuleType) -> None:
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    pipe = SimpleNamespace(scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0))
    demo.lean(pipe, None)
    assert pipe.scheduler.config.shift == 2.0
    demo.lean(pipe, demo.SHIFT)
    assert pipe.scheduler.config.shift == 9.0 and type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler
    for shift, scheduler in ((0.0, pipe.scheduler), (3.0, DDIMScheduler())):
        with pytest.raises(BadInput, match=f"--shift {shift:g}: it is above 0, and only schedulers that have"):
            demo.lean(SimpleNamespace(scheduler=scheduler), shift)
