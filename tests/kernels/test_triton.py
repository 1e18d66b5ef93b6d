"""The Triton backend without a GPU: in Triton's interpreter, and compiled for GPUs that are not there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from diffsparse.grid import TokenGrid
from diffsparse.order import AxisOrder, TileOrder
from tests.kernels.apart import check_cases, compiled
from tests.kernels.cases import head, random_layout

pytest.importorskip("triton")


def test_interpreted(repo_root: Path) -> None:
    check_cases(repo_root, 7, "tests.kernels.interpret")


@pytest.mark.slow(reason="interprets larger grids than the fast test")
def test_interpreted_more(repo_root: Path) -> None:
    """The preparations are in the fast test alone."""
    check_cases(repo_root, 6, "tests.kernels.interpret", "--slow")


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles(repo_root: Path, capability: int) -> None:
    kernels = compiled(repo_root, capability)
    assert len(kernels) == 2
    assert all((k["bulk"] > 0) == (capability >= 90) for k in kernels), "tensor descriptors from sm90 on"
    if capability == 90:
        # Short blocks take a loop of their own, whose registers have to be there.
        assert kernels[1]["spill_bytes"] < 64


@pytest.mark.slow(reason="LLVM makes 76 kernels")
@pytest.mark.parametrize("capability", [80, 89, 90, 100])
def test_compiles_in_every_form(repo_root: Path, capability: int) -> None:
    assert len(compiled(repo_root, capability, "--slow")) == 2 * 20 + 2 * 18


def test_device_code_numbers_things_as_the_vocabulary_does() -> None:
    from diffsparse import entry, heads
    from diffsparse.kernels.backends.triton import codes

    tails = {f"TAIL_{name.upper()}": code for code, name in enumerate(entry.TAILS)}
    numerics = {f"IN_{name.upper()}": code for code, name in enumerate(entry.NUMERICS)}
    columns = {"SKIP_COLUMN": heads.SKIP, "TAIL_COLUMN": heads.TAIL, "GATHERED_COLUMN": heads.GATHERED}
    for name, value in {**tails, **numerics, **columns}.items():
        assert getattr(codes, name).value == value, name
    layout = random_layout(TokenGrid(2, 9, 15), [head(), head(TileOrder(1, 8, 8)), head(AxisOrder("HWF"))], 64, 0.5)
    assert layout.heads.table.shape[1] == codes.COLUMNS.value
    assert layout.heads.table[:, heads.GATHERED].tolist() == [0, codes.RAGGED.value, 1]


def test_no_tail_or_numerics_is_a_literal_number_in_device_code() -> None:
    folder = Path(__file__).resolve().parents[2] / "kernels" / "src" / "backends"
    literal = re.compile(r"\b(tail|NUMERICS|KIND|mode|head_kind \+ h\)) *(==|!=|>|<) *\d|head_mode \+ h \* \d")
    found = {
        f"{path.parent.name}/{path.name}:{number}": line.strip()
        for path in folder.rglob("*.py")
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if literal.search(line)
    }
    assert not found
