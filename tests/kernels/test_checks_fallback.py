"""Where ``auto`` has only the reference, and why."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffsparse.kernels import checks
from diffsparse.kernels.backends import gluon_sm90, triton


def tensor(device: str, dtype: torch.dtype = torch.bfloat16, head_dim: int = 64) -> Any:
    """What checks read of a tensor, on a device that need not be here."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1, 128, 2, head_dim))


def test_a_kernel_there_is() -> None:
    assert checks.no_kernel(tensor("cpu")) is None


@pytest.mark.parametrize(
    ("q", "reason"),
    [
        (tensor("cpu", torch.float64), "got torch.float64"),
        (tensor("mps"), "got mps"),
        (tensor("cuda", torch.float64), "got torch.float64"),
        (tensor("cuda", head_dim=12), "got 12"),
    ],
)
def test_only_the_reference(q: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "not_installed", lambda: None)
    assert checks.choose_backend("auto", q) == "reference"
    assert reason in str(checks.no_kernel(q))


@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_a_gpu_without_triton(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "not_installed", lambda: "triton is not installed")
    monkeypatch.setattr(gluon_sm90, "_no_gluon", lambda: "triton is not installed")
    assert checks.no_kernel(tensor(device)) == "triton is not installed"
