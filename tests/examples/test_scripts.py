"""The short scripts, as they stand, with random weights."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.house.process import ROOT

WRITERS = ("wan", "hunyuan_video", "flux")


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "DIFFSPARSE"))}
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{script}.py"), *map(str, arguments)],
        cwd=ROOT,
        env={**kept, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,
    )


def calls(output: str) -> tuple[int, int]:
    """Sparse and dense attention calls, from the summary that is printed."""
    found = re.search(r"(\d+) sparse attention calls .*?, (\d+) dense", output)
    assert found, output
    return int(found[1]), int(found[2])


@pytest.mark.parametrize("script", WRITERS)
def test_tiny(script: str, tmp_path: Path) -> None:
    file = tmp_path / ("deep/image.png" if script == "flux" else "deep/clip.mp4")
    done = run(script, "--tiny", "--plan", "window", "--out", file)
    assert done.returncode == 0, done.stderr
    sparse, dense = calls(done.stdout)
    assert sparse > 0 and dense > 0  # the preset leaves the first steps dense
    assert "preset 'window'" in done.stdout and f"written: {file}" in done.stdout
    if script == "flux":
        with Image.open(file) as image:
            assert image.size == (96, 128)
    else:
        assert b"ftyp" in file.read_bytes()[:16]


@pytest.mark.slow
def test_a_model_and_its_own_plan(tmp_path: Path) -> None:
    size = ("--height", 64, "--width", 64, "--num-frames", 9, "--steps", 2)
    done = run("wan", "--model", "examples/tiny_wan", *size, "--device", "cpu", "--out", tmp_path / "clip.mp4")
    assert done.returncode == 0, done.stderr
    assert "shipped with the model" in done.stdout
    assert calls(done.stdout)[0] > 0


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_lora_and_compile(backend: str) -> None:
    done = run("lora_compile", "--tiny", "--plan", "window", "--backend", backend, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert calls(done.stdout)[0] > 0 and "ran on: compiled" in done.stdout
    first, second = (float(s) for s in re.findall(r"clip: ([\d.]+) s", done.stdout))
    assert second < first  # nothing is compiled a second time


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("wan", ("--tiny", "--plan", "nowhere"), "error: 'nowhere' is neither a folder nor a plan on the Hub"),
        ("flux", ("--model", "no such model"), "error: no model at 'no such model'"),
        ("hunyuan_video", ("--tiny", "--device", "cpu", "--offload"), "error: --offload moves parts"),
        ("lora_compile", ("--tiny", "--backend", "gcc"), "error: --backend 'gcc'"),
    ],
)
def test_a_mistake_is_one_line(script: str, arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    out = () if script == "lora_compile" else ("--out", tmp_path / "x.mp4")
    done = run(script, *arguments, *out)
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr
