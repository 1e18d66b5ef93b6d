"""The kernels of rules and budgets without a GPU: in Triton's interpreter, and compiled for GPUs that are not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffsparse.kernels.backends.installed import no_triton_for
from diffsparse.kernels.select.available import no_blocks_kernel
from tests.kernels.apart import check_cases, fitting


def test_what_the_kernels_do_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "GPU" in str(no_triton_for(torch.empty(1)))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    assert no_blocks_kernel(torch.empty(1, 2, 3, 8)) is None
    for x, parts in (
        (torch.empty(1, 2, 3, 512), 1),
        (torch.empty(1, 2, 3, 8, dtype=torch.float64), 1),
        (torch.empty(1, 2, 8, 3).transpose(2, 3), 1),
        (torch.empty(1, 2, 3, 8), 17),
    ):
        assert "side by side" in str(no_blocks_kernel(x, parts))


@pytest.mark.slow(reason="the interpreter takes a minute and a half")
def test_interpreted(repo_root: Path) -> None:
    pytest.importorskip("triton")
    check_cases(repo_root, 60, "tests.kernels.ranked")


def compiles(root: Path, capability: int, *flags: str) -> int:
    """How many kernels came out; all fit into shared memory and spill few registers."""
    kernels = fitting(root, capability, "--select", *flags)
    assert all(kernel.get("spill_bytes", 0) <= 512 for kernel in kernels), kernels
    return len(kernels)


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles(repo_root: Path, capability: int) -> None:
    pytest.importorskip("triton")
    assert compiles(repo_root, capability) == 18
