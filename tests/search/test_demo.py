"""The script that `make demo` runs, on the small model, as short as it goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.process import ROOT, run_script

DEMO = ROOT / "examples" / "demo.py"


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    done = run_script(DEMO, "--model", tmp_path / "nowhere", "--out", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: no model at") and done.stderr.count("\n") == 1


@pytest.mark.slow(reason="a whole search on the small model, and two clips")
def test_the_demo(tmp_path: Path) -> None:
    done = run_script(DEMO, "--out", tmp_path, "--steps", 4, "--prompts", 1, timeout=1800)
    assert done.returncode == 0, done.stderr
    for part in ("density of the whole trajectory", "of another seed", "SSIM", "worst clip", "minutes in all"):
        assert part in done.stdout
    for name in ("plan/sparse_plan.json", "plan.png", "contact_sheet.png", "clip_00.mp4", "eval.json"):
        assert (tmp_path / name).stat().st_size > 1000
    report = json.loads((tmp_path / "eval.json").read_text("utf-8"))
    assert report["passed"] and 0 < report["trajectory_density"] < 1
    assert report["psnr"]["mean"] > report["other_seed_psnr"]
