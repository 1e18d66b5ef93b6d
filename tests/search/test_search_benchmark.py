"""The benchmark of a search, on stand-ins of models that a CPU can search."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks import search as benchmark
from benchmarks.library.search_rows import Row, extrapolated, groups, read, write

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


def test_more_layers_than_there_are(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["search.py", "--tiny", "--models", "hunyuan-720p", "--layers", "2,3"])
    assert benchmark.main() == 2
    assert "hunyuan-720p has 2 layers, got --layers 2,3" in capsys.readouterr().err


def rows_of(layers: int, step: float) -> list[Row]:
    """A search whose stages take 3 s and 2 s a layer, and in ``sensitivity`` 0.5 s a layer for each group."""
    runs = 0.5 * layers * groups(layers, step)
    seconds = {"trace": 3 + 2.0 * layers, "sensitivity": runs}
    own = {"step_seconds": step * layers / 40, "disk_gb": 0.1 * layers, "gpu_gb": 1 + 0.5 * layers}
    about = {"model": "m", "layers": layers, "tokens": 9} | own
    found = [Row(**about, stage=stage, seconds=each) for stage, each in seconds.items()]
    return [*found, Row(**about, stage="all", seconds=sum(seconds.values()), estimate_seconds=5 + 2.0 * layers)]


@pytest.mark.parametrize("step", [1.0, 30.0])  # ten groups of layers, and five
def test_a_whole_model_follows_from_two_with_fewer_layers(step: float) -> None:
    found, wanted = extrapolated(rows_of(2, step), rows_of(4, step), 40), rows_of(40, step)
    for row, true in zip(found, wanted, strict=True):
        assert row.status == "extrapolated from 2 and 4 layers" and not row.failed
        for name in ("seconds", "step_seconds", "disk_gb", "gpu_gb"):
            assert getattr(row, name) == pytest.approx(getattr(true, name)), (row.stage, name)


def test_nothing_follows_from_a_search_that_failed() -> None:
    few = rows_of(2, 1.0)
    few[-1].status = "OutOfMemoryError: of 80 GB"
    assert {row.status for row in extrapolated(few, rows_of(4, 1.0), 40)} == {"failed with 2 layers"}


def test_rows_survive_their_file(tmp_path: Path) -> None:
    rows = rows_of(4, 1.0)
    write(tmp_path / "rows.csv", rows)
    assert read(tmp_path / "rows.csv") == rows


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models", "wan-9b"], "unknown models wan-9b"),
        (["--layers", "0"], "got '0'"),
        (["--layers", "4,2"], "two rising ones, as 2,4; got '4,2'"),
    ],
)
def test_what_cannot_work(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["search.py", *words])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert message in capsys.readouterr().err
