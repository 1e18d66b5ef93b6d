"""The benchmark of a search, on stand-ins of models that a CPU can search."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks import search as benchmark

STAGES = {"probe", "costs", "trace", "sensitivity", "schedule", "reuse", "assign", "repair", "all"}


@pytest.mark.slow(reason="two whole searches of small models")
@pytest.mark.parametrize("name", ["wan-1.3b-480p", "hunyuan-720p"])
def test_rows_of_every_stage(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.csv"
    words = ["search.py", "--tiny", "--models", name, "--device", "cpu", "--steps", "12", "--csv", str(file), "--raise"]
    monkeypatch.setattr("sys.argv", words)
    assert benchmark.main() == 0
    with file.open() as lines:
        rows = {row["stage"]: row for row in csv.DictReader(lines)}
    assert set(rows) >= STAGES - {"reuse", "assign"}
    whole = rows["all"]
    assert whole["status"] == "ok" and float(whole["disk_gb"]) > 0 and float(whole["step_seconds"]) > 0
    parts = sum(float(row["seconds"]) for stage, row in rows.items() if stage != "all")
    assert 0.8 * float(whole["seconds"]) < parts <= 1.01 * float(whole["seconds"])
    assert 0 < float(whole["estimate_after_seconds"]) < float(whole["seconds"])
    assert "estimate" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--models", "wan-9b"], "unknown models wan-9b"), (["--layers", "0"], "--layers is at least 1")],
)
def test_what_cannot_work(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["search.py", *words])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert message in capsys.readouterr().err
