"""The benchmark of rules, on the CPU."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from diffsparse.kernels.select.rules import selectors
from tests.helpers.scripts import load_script

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "online.py"
SMALL = ("--device", "cpu", "--grid", "2x16x16", "--heads", "2", "--head-dim", "32", "--block", "64", "--ms", "1")


def test_every_rule_has_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows.csv"
    budgets = ["--budgets", "density:0.25", "top_p:0.5"]
    monkeypatch.setattr(sys, "argv", ["online.py", *SMALL, *budgets, "--csv", str(out)])
    assert load_script(SCRIPT).main() == 0
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["rule"] for row in rows} >= set(selectors()) and {row["status"] for row in rows} == {"ok"}
    for row in rows:
        assert float(row["share"]) == pytest.approx(float(row["pick_ms"]) / float(row["attention_ms"]), rel=1e-3)
        if row["budget"].startswith("density"):
            assert 0.25 <= float(row["kept"]) < 0.5  # whole blocks of 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--grid", "2x8"), "frames, rows and columns of tokens"),
        (("--budgets", "density"), "a budget's kind and value, as density:0.25"),
        (("--rules", "fastest"), "unknown rules fastest; use pooled"),
    ],
)
def test_wrong_options_are_told(
    words: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["online.py", *words])
    with pytest.raises(SystemExit) as end:
        load_script(SCRIPT).main()
    assert end.value.code == 2 and message in capsys.readouterr().err
