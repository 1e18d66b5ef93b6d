"""The CPU kernel for ARM against the reference, in an emulator: types, tails, short blocks, text and closed keys."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from diffsparse.grid import TokenGrid
from diffsparse.kernels import reference_attention, sparse_attention
from diffsparse.kernels.backends.cpu import compiled
from diffsparse.kernels.backends.cpu.instructions import Kernel
from tests.kernels.cases import MIXED, assert_like_torch, inputs, random_layout
from tests.kernels.emulated import build, cannot_emulate, run_emulated
from tests.tolerance import ATTENTION, assert_near

pytestmark = [
    pytest.mark.slow(reason="compiles for ARM and runs in an emulator"),
    pytest.mark.skipif(cannot_emulate() is not None, reason=str(cannot_emulate())),
]
GRID = TokenGrid(2, 9, 13, text_before=5, text_after=40)


@pytest.fixture(params=["neon", "generic"])
def isas(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The instruction sets that calls of the CPU backend ran in: that of ARM, and plain vectors on ARM."""
    program = build(tmp_path, *(["-DDIFFSPARSE_GENERIC"] if request.param == "generic" else []))
    ran: set[str] = set()
    monkeypatch.setattr(compiled, "find_kernel", lambda: Kernel(library=object()))  # type: ignore[arg-type]
    monkeypatch.setattr(compiled, "_run", lambda part, threads: ran.add(run_emulated(program, part)))
    yield ran
    assert ran == {request.param}


@pytest.mark.parametrize("dim", [16, 72, 128])
def test_fp32(isas: set[str], dim: int) -> None:
    layout = random_layout(GRID, MIXED, 64, 0.4)
    q, k, v = inputs(GRID, len(MIXED), dim)
    mask = torch.ones(1, GRID.seq_len, dtype=torch.bool)
    mask[:, -30:] = False
    for kv_len in (None, mask):
        out, lse = sparse_attention(q, k, v, layout, kv_len=kv_len, backend="cpu", return_lse=True)
        want, want_lse = reference_attention(q, k, v, layout, kv_len=kv_len)
        assert_near(out.double(), want, ATTENTION)
        assert_near(lse.double(), want_lse, ATTENTION)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(isas: set[str], dtype: torch.dtype) -> None:
    layout = random_layout(GRID, MIXED, 128, 0.4, diagonal=True)
    q, k, v = inputs(GRID, len(MIXED), 40, dtype=dtype)
    out, lse = sparse_attention(q, k, v, layout, backend="cpu", return_lse=True)
    assert_like_torch(out, lse, q, k, v, layout)


def test_nan_stays_in_its_query(isas: set[str]) -> None:
    layout = random_layout(GRID, MIXED[:1], 64, 1.0, diagonal=True)
    q, k, v = inputs(GRID, 1, 64)
    q[0, 7] = torch.nan
    out, _ = sparse_attention(q, k, v, layout, backend="cpu", return_lse=True)
    assert bool(out[0, 7].isnan().all()) and int(out.isnan().any(-1).sum()) == 1
