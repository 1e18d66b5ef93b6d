"""The benchmark of the CPU backend: every way is timed, and what cannot be measured is refused in a line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from diffsparse.kernels.backends.cpu.compiler import SWITCH
from diffsparse.kernels.backends.cpu.instructions import ISA_SWITCH
from tests.helpers.scripts import load_script
from tests.kernels.cases import kernel_isas

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "cpu.py"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_way_is_timed(dtype: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (SWITCH, ISA_SWITCH):  # so that they are put back
        monkeypatch.setenv(name, "")
    small = ["--tokens", "256", "--heads", "2", "--head-dim", "16", "--rounds", "2", "--density", "0.5"]
    monkeypatch.setattr(sys, "argv", ["cpu.py", *small, "--dtype", dtype])
    assert load_script(SCRIPT).main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"256 tokens, 2 heads of 16, {dtype}" in lines[1]
    assert [line.split()[1] for line in lines[2:]] == ["dense", *kernel_isas(), "uncompiled"]
    assert lines[2].endswith(" 1.00x") and all(float(line.split()[2]) > 0 for line in lines[2:])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--density", "none"], "--density 'none': numbers between 0 and 1"),
        (["--density", "1.0"], "--density '1.0': numbers between 0 and 1"),
        (["--tokens", "100"], "--tokens 100: a multiple of 64"),
        (["--rounds", "0"], "--heads and --rounds: 1 at least"),
        (["--head-dim", "18"], "--head-dim 18: 16 to 256 in multiples of 4"),
    ],
)
def test_what_cannot_be_measured(
    arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["cpu.py", *arguments])
    with pytest.raises(SystemExit) as end:
        load_script(SCRIPT).main()
    assert end.value.code == 2 and says in capsys.readouterr().err
