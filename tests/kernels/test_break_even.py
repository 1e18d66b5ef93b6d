"""Break-even tables: what they predict, where they come from, and what a damaged one does."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffsparse.entry import TAILS
from diffsparse.grid import TokenGrid
from diffsparse.kernels.backends import way_of
from diffsparse.kernels.break_even import (
    FORMAT,
    device_name,
    find_table,
    local_file,
    measure_break_even,
    save_local,
    work_of,
)
from diffsparse.kernels.break_even import _read as read
from diffsparse.kernels.costs import CostTable
from diffsparse.kernels.random_rows import random_rows
from diffsparse.layout import BlockLayout
from diffsparse.order import AxisOrder
from tests.kernels.cases import head

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]

TABLE = CostTable(
    device=device_name(CPU),
    backend="cpu",
    dtype="float32",
    heads=2,
    head_dim=64,
    block_size=64,
    tokens=(1000, 4000),
    densities=(0.1, 0.5, 1.0),
    ratio={tail: ((0.8 + i, 1.2 + i, 2.0 + i), (0.2 + i, 0.6 + i, 1.1 + i)) for i, tail in enumerate(TAILS)},
    gather=(0.3, 0.1),
    dense=("flash_sdpa", "flash_sdpa"),
    about={"date": "today"},
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIFFSPARSE_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("tokens", "density", "gathered", "expected"),
    [
        (1000, 0.1, False, 0.8),
        (4000, 0.75, False, 0.85),
        (2000, 0.5, False, 0.9),  # half way between the logarithms
        (2000, 0.5, True, 1.1),
        (100, 0.1, False, 0.8),  # what was not measured is as the nearest that was
        (100000, 1.0, True, 1.2),
        (4000, 0.001, False, 0.2),
    ],
)
def test_interpolation(tokens: int, density: float, gathered: bool, expected: float) -> None:
    assert TABLE.head_ratio(tokens, density, "none", gathered) == pytest.approx(expected)
    assert TABLE.head_ratio(tokens, density, "moments", gathered) == pytest.approx(expected + TAILS.index("moments"))


def over_dense(table: CostTable, layout: BlockLayout) -> float:
    return table.over_dense(work_of(layout), layout.seq_len)


def test_break_even_is_where_sparse_stops_being_faster() -> None:
    assert TABLE.break_even(1000) == pytest.approx(0.29)  # 0.3 itself takes as long
    assert TABLE.break_even(4000) == pytest.approx(0.89)
    assert TABLE.break_even(4000, "mean") == 0.0
    # An overhead at low densities is not overlooked for what is faster at higher ones.
    hump = replace(TABLE, ratio={**TABLE.ratio, "none": ((1.1, 0.5, 0.9), (1.1, 0.5, 0.9))})
    assert hump.break_even(1000) == 0.0


def test_a_layout_is_the_mean_of_its_heads() -> None:
    grid = TokenGrid(1, 40, 100)
    entries = [head(), head(tail="mean"), head(AxisOrder("WHF")), head(mode="skip")]
    layout = random_rows(grid, entries, 64, 0.5)
    kept = 32 / 63  # of 63 blocks
    table = replace(TABLE, heads=4)
    plain = table.head_ratio(4000, kept)
    assert over_dense(table, layout) == pytest.approx((plain + (plain + 1) + (plain + 0.1) + 0) / 4)


def test_few_heads_need_longer_sequences() -> None:
    """As many pairs of queries and keys take as long, whether there are few heads or few tokens."""
    grid = TokenGrid(1, 40, 100)
    one = random_rows(grid, [head()], 64, 0.5)
    assert TABLE.tokens_of(4000, 1) == pytest.approx(4000 / 2**0.5)
    assert over_dense(TABLE, one) == pytest.approx(TABLE.head_ratio(4000 / 2**0.5, 32 / 63))
    assert over_dense(TABLE, one) > over_dense(TABLE, random_rows(grid, [head()] * 2, 64, 0.5))


def test_the_shipped_tables_can_be_read(cache: Path) -> None:
    tables = read(ROOT / "kernels" / "src" / "break_even.json")
    assert {(t.device, t.backend, t.head_dim) for t in tables} == {("NVIDIA H200", "gluon_sm90", d) for d in (64, 128)}
    for table in tables:
        assert table.about["command"].startswith("diffsparse bench break-even") and table.about["date"]
        assert table.break_even(1024) == 0 and table.break_even(32768) > 0.9


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": (4000, 1000)},
        {"densities": (0.1, 0.5)},
        {"gather": (0.1,)},
        {"ratio": {"none": TABLE.ratio["none"]}},
        {"ratio": {**TABLE.ratio, "mean": ((0.1, 0.2, float("nan")),) * 2}},
        {"ratio": {**TABLE.ratio, "mean": ((0.1, 0.2, 0.0),) * 2}},
    ],
    ids=["order", "shape", "gather", "tails", "nan", "zero"],
)
def test_a_table_that_is_none(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"do not fit together|not ratios"):
        replace(TABLE, **change)  # type: ignore[arg-type]


def test_no_table_no_prediction(cache: Path) -> None:
    assert find_table(CPU, 64) is None


def test_a_table_of_this_machine(cache: Path) -> None:
    path = save_local(TABLE)
    assert path == local_file(TABLE.device, cache) and path.is_relative_to(cache)
    save_local(replace(TABLE, head_dim=128, gather=(0.5, 0.5)))
    save_local(replace(TABLE, gather=(0.4, 0.4)))  # in the place of the first
    assert len(json.loads(path.read_text())["tables"]) == 2
    assert find_table(CPU, 72) == replace(TABLE, gather=(0.4, 0.4))
    assert find_table(CPU, 128) == replace(TABLE, head_dim=128, gather=(0.5, 0.5))


def test_tables_of_other_kernels_and_devices_say_nothing(cache: Path) -> None:
    save_local(replace(TABLE, backend="reference"))
    local_file(TABLE.device, cache).rename(local_file(TABLE.device, cache).with_suffix(".kept"))
    save_local(replace(TABLE, device="another"))
    local_file("another", cache).rename(local_file(TABLE.device, cache))
    assert find_table(CPU, 64) is None


def test_tables_of_another_way_of_the_same_backend_say_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFSPARSE_COMPILE", "0")
    assert way_of("cpu") == "uncompiled"
    save_local(replace(TABLE, way="avx2"))
    assert find_table(CPU, 64) is None
    slower = replace(TABLE, way="uncompiled", gather=(0.4, 0.4))
    path = save_local(slower)  # beside the other
    assert len(json.loads(path.read_text())["tables"]) == 2
    assert find_table(CPU, 64) == slower


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 99, "tables": []}', '{"format": 1, "tables": [{}]}'])
def test_a_damaged_file_is_told_and_stops_nothing(cache: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    path = local_file(TABLE.device, cache)
    path.parent.mkdir()
    path.write_text(text)
    with caplog.at_level(logging.WARNING, "diffsparse"):
        assert find_table(CPU, 64) is None
    assert "cannot be read" in caplog.text and "diffsparse bench break-even" in caplog.text


def test_the_shipped_file_holds_tables() -> None:
    path = ROOT / "kernels" / "src" / "break_even.json"
    data = json.loads(path.read_text())
    assert data["format"] == FORMAT
    tables = read(path)
    assert len(tables) == len(data["tables"])  # none is damaged
    for table in tables:
        assert table.about["date"] and table.about["command"], "measured figures name their date and command"


def test_measure() -> None:
    lines: list[str] = []
    table = measure_break_even(
        CPU, heads=2, head_dim=16, dtype=torch.float32, block_size=64, tokens=(256, 500), densities=(0.25, 1.0),
        budget_ms=1, about={"date": "today"}, say=lines.append,
    )  # fmt: skip
    assert (table.backend, table.device, table.dense) == ("cpu", device_name(CPU), ("flash_sdpa", "flash_sdpa"))
    assert table.way == way_of("cpu") != ""
    assert all(r > 0 for rows in table.ratio.values() for row in rows for r in row)
    assert CostTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    assert [line.split(":")[0] for line in lines] == ["256 tokens", "500 tokens"]
