"""The comparison of a plan with hand-made ones runs as it stands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diffsparse.search.metrics import MAX_PSNR
from diffsparse.search.search import SearchConfig, search_plan
from tests.search.tiny import PROMPTS, SHAPE

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "quality.py"


@pytest.mark.slow(reason="two whole searches, and clips of every row")
def test_rows_of_equal_density(pipe: Any, model_folder: Path, prompts_file: Path, tmp_path: Path) -> None:
    config = SearchConfig(budget=None, density=0.7, steps=4, trace_steps=3, samples=2, dense_steps=1, **SHAPE)
    search_plan(pipe, PROMPTS, config, tmp_path / "plan", progress=False, say=lambda line: None)
    out = tmp_path / "out.json"
    command = [
        sys.executable, str(SCRIPT), str(model_folder), str(tmp_path / "plan"), "--prompts", str(prompts_file),
        "--count", "1", "--seeds", "2", "--steps", "4", "--device", "cpu", "--json", str(out),
        "--calibration", str(prompts_file), "--search-out", str(tmp_path / "radial"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    searched, *windows, radial, at_radial = result["rows"]
    assert searched["plan"] == "searched" and searched["clips"] == 2
    assert windows and all(w["trajectory_density"] >= searched["trajectory_density"] for w in windows)
    assert at_radial["trajectory_density"] <= radial["trajectory_density"]
    apart = result["psnr_of_another_seed"]
    for r in result["rows"]:
        assert r["above_another_seed"] == pytest.approx(r["psnr"] - apart)
        assert r["worst_above_another_seed"] <= r["above_another_seed"]
        # Nearer to its dense twin than a clip of another seed is, and no nearer than the same clip.
        assert apart < r["psnr"] <= MAX_PSNR, r
