"""The short scripts, as they stand, with random weights."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.helpers.process import ROOT, run_script

EXAMPLES = ROOT / "examples"
WRITERS = ("wan", "hunyuan_video", "flux")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[object, str]]:
    """Runs a script as ``python examples/NAME.py ...`` does, in this process, which has loaded the libraries already.

    Gives the exit code (or the message, where a script ends with one) and what it printed.
    """
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(ROOT)

    def run(script: str, *arguments: object) -> tuple[object, str]:
        file = str(EXAMPLES / f"{script}.py")
        monkeypatch.setattr(sys, "argv", [file, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(file, run_name="__main__")
        return end.value.code, capsys.readouterr().out

    return run


def start(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The same in a process of its own."""
    return run_script(EXAMPLES / f"{script}.py", *arguments, timeout=900, HF_HUB_OFFLINE="1")


def calls(output: str) -> tuple[int, int]:
    """Sparse and dense attention calls, from the summary that is printed."""
    found = re.search(r"(\d+) sparse attention calls .*?, (\d+) dense", output)
    assert found, output
    return int(found[1]), int(found[2])


@pytest.mark.parametrize("script", WRITERS)
def test_tiny(script: str, run: Callable[..., tuple[object, str]], tmp_path: Path) -> None:
    file = tmp_path / ("deep/image.png" if script == "flux" else "deep/clip.mp4")
    code, out = run(script, "--tiny", "--plan", "window", "--device", "cpu", "--out", file)
    assert not code
    sparse, dense = calls(out)
    assert sparse > 0 and dense > 0  # the preset leaves the first steps dense
    assert "preset 'window'" in out and f"written: {file}" in out
    if script == "flux":
        with Image.open(file) as image:
            assert image.size == (96, 128)
    else:
        assert b"ftyp" in file.read_bytes()[:16]


def test_lora_beside_a_plan(run: Callable[..., tuple[object, str]]) -> None:
    """The way through the script; what compiles is left out."""
    code, out = run("lora_compile", "--tiny", "--plan", "window", "--backend", "eager", "--device", "cpu")
    assert not code
    assert calls(out)[0] > 0 and "ran on: compiled" in out
    torch._dynamo.reset()


@pytest.mark.slow(reason="generates a clip with the small model in a process of its own")
def test_a_model_and_its_own_plan(tmp_path: Path) -> None:
    size = ("--height", 64, "--width", 64, "--num-frames", 9, "--steps", 2)
    done = start("wan", "--model", "examples/tiny_wan", *size, "--device", "cpu", "--out", tmp_path / "clip.mp4")
    assert done.returncode == 0, done.stderr
    assert "shipped with the model" in done.stdout
    assert calls(done.stdout)[0] > 0


@pytest.mark.slow(reason="compiles a model in a process of its own")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_lora_and_compile(backend: str) -> None:
    done = start("lora_compile", "--tiny", "--plan", "window", "--backend", backend, "--device", "cpu")
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
def test_a_mistake_is_one_line(
    script: str, arguments: tuple[str, ...], message: str, run: Callable[..., tuple[object, str]]
) -> None:
    code, _ = run(script, *arguments)
    assert isinstance(code, str) and code.startswith(message) and "\n" not in code


@pytest.mark.parametrize("script", [*WRITERS, "lora_compile"])
def test_help(script: str, run: Callable[..., tuple[object, str]]) -> None:
    code, out = run(script, "--help")
    assert not code
    for option in ("--model", "--plan", "--tiny"):
        assert option in out
