"""The benchmark of 8 bits: its parts on the CPU, where products are made inexact by hand, and what it says without a
Hopper GPU."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from diffsparse.kernels import sparse_attention
from diffsparse.plan import SparsityPlan
from diffsparse.preset_plans import preset
from diffsparse.search import load
from diffsparse.search.errors import BadInput
from diffsparse.search.generate import GenerationSettings
from tests.helpers.scripts import load_script

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "numerics.py"


@pytest.fixture
def script() -> ModuleType:
    return load_script(SCRIPT)


def test_without_a_hopper_gpu_it_says_so() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}
    )
    if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
        pytest.skip("there is a Hopper GPU")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: 8 bits need the backend gluon_sm90")


def test_errors_and_clips_of_a_model(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With errors of known size in the place of 8 bits: calls report them, and clips move by them, and not in 16."""
    from tests.search.tiny import SHAPE, build_pipeline

    sizes = {"auto": 0.0, "int8": 1e-3, "fp8": 1e-2}

    def inexact(q: Any, k: Any, v: Any, layout: Any, **options: Any) -> torch.Tensor:
        assert options.pop("backend") == "gluon_sm90" and layout.heads.has_tail
        out = sparse_attention(q, k, v, layout, **options)
        noise = torch.randn_like(out)
        (numerics,) = layout.heads.numerics
        return out + sizes[numerics] * noise * (out.norm() / noise.norm())

    monkeypatch.setattr(script, "sparse_attention", inexact)
    monkeypatch.setattr(load, "load_pipeline", lambda *_, **__: build_pipeline())
    plan = preset("window", size=(1, 0.5, 0.5), tail="centroids", sparse_below=1.0)
    found = script.generations("tiny", plan, ["a red circle"], GenerationSettings(2, 5.0, **SHAPE))
    assert found["int8"]["error_median"] == pytest.approx(1e-3, rel=1e-3)
    assert found["fp8"]["error_worst"] == pytest.approx(1e-2, rel=1e-3)
    assert found["fp8"]["error_median"] <= found["fp8"]["error_p99"] <= found["fp8"]["error_worst"]
    assert found["int8"]["calls"] == 2 * 2 * 2  # layers, steps, guidance
    assert found["int8"]["psnr_mean"] > found["fp8"]["psnr_mean"] > found["another seed"]["psnr_mean"]


def test_clips_have_the_size_of_the_plan(script: ModuleType) -> None:
    plan = SparsityPlan.from_pretrained(ROOT / "examples" / "tiny_wan" / "sparse_plan")
    settings = script.settings_of(plan, 7)
    assert (settings.num_inference_steps, settings.height, settings.width, settings.num_frames) == (7, 128, 128, 17)
    with pytest.raises(BadInput, match="does not say at which size"):
        script.settings_of(replace(plan, record={}), 7)
