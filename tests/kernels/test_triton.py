"""The Triton backend without a GPU: in Triton's interpreter, and compiled for GPUs that are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def run(root: Path, *arguments: str, **environment: str) -> str:
    """A module in a fresh process: Triton reads its mode when it is imported."""
    keep = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", *arguments]
    env = {**keep, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_interpreted(repo_root: Path) -> None:
    assert run(repo_root, "tests.kernels.interpret", TRITON_INTERPRET="1").count("ok") == 7


@pytest.mark.slow
def test_interpreted_more(repo_root: Path) -> None:
    assert run(repo_root, "tests.kernels.interpret", "--slow", TRITON_INTERPRET="1").count("ok") == 9


def compiled(root: Path, capability: int, *flags: str) -> list[dict]:
    found = [json.loads(line) for line in run(root, "tests.kernels.compile_for", str(capability), *flags).splitlines()]
    for kernel in found:
        assert kernel["shared"] <= kernel["allowed"], kernel
        if "float32" not in kernel["case"] and "summary" not in kernel["kernel"]:
            unit = {80: "mma", 89: "mma", 90: "wgmma", 100: "tcgen05"}[capability]
            assert kernel[unit], f"the matrix units of sm{capability} are not used: {kernel}"
    return found


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles(repo_root: Path, capability: int) -> None:
    kernels = compiled(repo_root, capability)
    assert len(kernels) == 2
    assert all((k["bulk"] > 0) == (capability >= 90) for k in kernels), "tensor descriptors from sm90 on"
    if capability == 90:
        # Short blocks take a loop of their own, whose registers have to be there.
        assert kernels[1]["spill_bytes"] < 64


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90, 100])
def test_compiles_in_every_form(repo_root: Path, capability: int) -> None:
    assert len(compiled(repo_root, capability, "--slow")) == 2 * 20 + 2 * 18
