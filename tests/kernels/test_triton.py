"""The Triton backend without a GPU: in Triton's interpreter, and compiled for GPUs that are not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.kernels.apart import check_cases, run

pytest.importorskip("triton")


def test_interpreted(repo_root: Path) -> None:
    check_cases(repo_root, 7, "tests.kernels.interpret")


@pytest.mark.slow
def test_interpreted_more(repo_root: Path) -> None:
    check_cases(repo_root, 9, "tests.kernels.interpret", "--slow")


def compiled(root: Path, capability: int, *flags: str) -> list[dict]:
    done = run(root, "tests.kernels.compile_for", str(capability), *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
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
