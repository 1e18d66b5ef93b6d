"""The Hopper kernel without a GPU: emulated on the CPU, and compiled for a GPU that is not there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffsparse.grid import TokenGrid
from diffsparse.kernels import available_backends, sparse_attention
from tests.kernels.apart import check_cases, run
from tests.kernels.cases import head, inputs, random_layout

pytest.importorskip("triton")


def test_emulated(repo_root: Path) -> None:
    check_cases(repo_root, 13, "tests.kernels.emulate")


@pytest.mark.slow(reason="emulates larger grids and more heads than the fast test")
def test_emulated_more(repo_root: Path) -> None:
    """What goes out of range is in the fast test alone."""
    check_cases(repo_root, 10, "tests.kernels.emulate", "--slow")


def test_emulated_in_eight_bits(repo_root: Path) -> None:
    check_cases(repo_root, 12, "tests.kernels.emulate", "--eight")


@pytest.mark.slow(reason="emulates thirteen faults until each shows; some end in a signal that never comes")
def test_emulation_notices_faults(repo_root: Path) -> None:
    check_cases(repo_root, 13, "tests.kernels.emulate", "--faults")


def compiled(root: Path, *flags: str, **environment: str) -> list[dict]:
    done = run(root, "tests.kernels.compile_for", "90", "--gluon", *flags, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    for kernel in kernels:
        assert kernel["shared"] <= 227 << 10, kernel
        assert kernel["wgmma"] and kernel["bulk"], f"Hopper's own units are not used: {kernel}"
        assert kernel["spill_bytes"] <= 128, kernel  # some addresses at most
        assert not kernel["serialized"], kernel
        # Memory that is still a barrier must not be used for anything else; one that is given up at the end never is.
        assert kernel["barriers"] == kernel["given_up"] > 0, kernel
    return kernels


def test_compiles(repo_root: Path) -> None:
    assert len(compiled(repo_root)) == 2


@pytest.mark.slow(reason="LLVM and the assembler make 24 kernels")
def test_compiles_in_every_form(repo_root: Path) -> None:
    assert len(compiled(repo_root, "--slow")) == 24


@pytest.mark.slow(reason="downloads Triton 3.6 and compiles 24 kernels")
def test_compiles_with_triton_3_6(repo_root: Path, tmp_path: Path) -> None:
    """The oldest Triton that torch 2.11 and newer come with: names in Gluon differ between versions."""
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), "triton==3.6.0"]
    subprocess.run(install, check=True, capture_output=True)
    kernels = compiled(repo_root, "--slow", PYTHONPATH=f"{tmp_path}:{repo_root}")
    assert [kernel["triton"] for kernel in kernels] == ["3.6.0"] * 24


def test_small_calls_take_one_pass() -> None:
    """And so does what has not the range for the first of two."""
    from diffsparse.kernels.backends.gluon_sm90.host import passes_of

    def passes(tokens: int, dtype: torch.dtype = torch.bfloat16, numerics: str = "auto", batch: int = 1) -> int:
        return len(passes_of(torch.empty(batch, tokens, 24, 128, dtype=dtype, device="meta"), numerics))

    assert [passes(6688), passes(6689), passes(6688, batch=2), passes(118_800)] == [1, 2, 2, 2]
    assert passes(118_800, torch.float16) == passes(118_800, numerics="int8") == passes(118_800, numerics="fp8") == 1


def test_asked_for_where_it_cannot_run() -> None:
    grid = TokenGrid(1, 8, 16)
    layout = random_layout(grid, [head()], 64, 0.5)
    reason = available_backends()["gluon_sm90"]
    if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
        assert reason is None
    else:
        assert reason is not None and "gluon_sm90 needs a" in reason
    with pytest.raises(ValueError, match="runs tensors on a Hopper GPU, got cpu"):
        sparse_attention(*inputs(grid, 1, 64), layout, backend="gluon_sm90")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(numerics="int8"), "numerics 'int8' needs backend='gluon_sm90', got 'auto'"),
        (dict(numerics="int4", backend="gluon_sm90"), "numerics must be one of 'auto', 'int8', 'fp8', got 'int4'"),
        (dict(numerics="fp8", backend="gluon_sm90", dim=80), "numerics 'fp8' takes head_dim 64 or 128, got 80"),
    ],
)
def test_eight_bits_where_they_cannot_be(arguments: dict, message: str) -> None:
    grid = TokenGrid(1, 8, 16)
    layout = random_layout(grid, [head()], 64, 0.5)
    with pytest.raises(ValueError, match=message):
        sparse_attention(*inputs(grid, 1, arguments.pop("dim", 64)), layout, **arguments)
