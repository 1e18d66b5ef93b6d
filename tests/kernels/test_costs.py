"""One model of costs: a table of several lengths and the figures of one call are read by the same type."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffsparse.entry import TAILS, Execution, HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.kernels.break_even import work_of
from diffsparse.kernels.costs import CostTable, mean_of
from diffsparse.layout import build_layout
from diffsparse.order import TileOrder
from diffsparse.patterns import Band
from diffsparse.work import HeadWork, head_work

ROOT = Path(__file__).resolve().parents[2]
DENSITIES, TIMES = (0.02, 0.1, 0.3, 0.6), (0.1, 0.2, 0.4, 0.7)
CALL = CostTable.of_call("a device", 0.5, DENSITIES, dict.fromkeys(TAILS, TIMES))
RECORD: dict[str, Any] = {
    "device": "a device", "dense_seconds": 0.5, "densities": list(DENSITIES), "fill": 0.9,
    "share": {tail: list(TIMES) for tail in TAILS},
}  # fmt: skip


@pytest.mark.parametrize(
    ("density", "time"),
    [
        (0.2, 0.3),
        (0.01, 0.0875),  # on the line through the first two
        (0.0, 0.075),
        (0.8, 0.85),  # on the way to a dense head
        (1.0, 1.0),
    ],
)
def test_one_call_between_and_beyond_what_was_timed(density: float, time: float) -> None:
    for tokens in (1, 432, 100_000):  # of whatever length it is
        assert CALL.head_ratio(tokens, density, "mean") == pytest.approx(time)
        assert CALL.head_ratio(tokens, density, "mean", gathered=True) == pytest.approx(time)


def test_one_call_is_never_told_above_dense_nor_below_nothing() -> None:
    slow = CostTable.of_call("a device", 0.5, DENSITIES, dict.fromkeys(TAILS, (0.001, 0.8, 1.2, 1.5)))
    assert slow.head_ratio(432, 0.4) == slow.head_ratio(432, 1.0) == 1.0
    assert slow.head_ratio(432, 0.2) == pytest.approx(1.0)
    assert slow.head_ratio(432, 0.0) == 0.0
    assert slow.break_even(432) == pytest.approx(0.19)


def test_text_is_computed_at_every_density() -> None:
    """It was when the call was timed, so a head is looked up by its visual tokens alone."""
    entry = HeadEntry(TileOrder(1, 8, 8), Band(0.1))
    plain, text = TokenGrid(2, 16, 16), TokenGrid(2, 16, 16, text_after=512)
    works = [head_work(entry, grid, 64) for grid in (plain, text)]
    assert works[1].kept is not None and works[0].kept is not None and works[1].kept > works[0].kept + 0.3
    assert works[0].visual == works[1].visual == works[0].kept
    assert CALL.over_dense(works[:1], 512) == CALL.over_dense(works[1:], 1024)


def test_block_lists_do_not_tell_pairs_of_visual_tokens() -> None:
    layout = build_layout(TokenGrid(2, 16, 16), [HeadEntry(pattern=Band(0.1))], 64)
    with pytest.raises(ValueError, match="block lists do not tell"):
        CALL.over_dense(work_of(layout), layout.seq_len)
    assert CALL.over_dense([head_work(HeadEntry(execution=Execution("skip")), layout.grid, 64)], 512) == 0.0


def test_a_record_is_read_and_written_as_it_was() -> None:
    read = CostTable.from_dict(json.loads(json.dumps(RECORD)))
    assert read == replace(CALL, fill=0.9)
    assert json.loads(json.dumps(read.to_dict())) == RECORD
    old = {name: value for name, value in RECORD.items() if name != "fill"}  # of plans that do not say
    assert CostTable.from_dict(old) == CALL


def test_the_costs_of_the_plans_in_the_clone_can_be_read() -> None:
    plans = [json.loads(path.read_text()) for path in ROOT.glob("examples/*/**/sparse_plan.json")]
    costs = [plan["record"]["costs"] for plan in plans if "costs" in plan["record"]]
    assert costs
    for record in costs:
        table = CostTable.from_dict(record)
        for tail, times in record["share"].items():
            for density, time in zip(record["densities"], times, strict=True):
                assert table.head_ratio(1000, density, tail) == pytest.approx(min(1.0, time))


@pytest.mark.parametrize(
    "change",
    [{"densities": [0.1]}, {"densities": [-0.1, 0.1, 0.3, 0.6]}, {"share": {"none": TIMES}}, {"dense_seconds": "long"}],
)
def test_a_record_that_is_none(change: dict[str, Any]) -> None:
    with pytest.raises((ValueError, KeyError)):
        CostTable.from_dict(RECORD | change)


@pytest.mark.parametrize("name", ["backend", "heads", "about"])
def test_a_table_of_lengths_says_what_was_compared(name: str) -> None:
    shipped = json.loads((ROOT / "kernels" / "src" / "break_even.json").read_text())["tables"][0]
    assert CostTable.from_dict(shipped).to_dict().keys() == shipped.keys()
    del shipped[name]
    with pytest.raises((KeyError, TypeError), match=name):
        CostTable.from_dict(shipped)


def test_the_mean_of_equal_values_is_that_value() -> None:
    values = np.random.default_rng(0).random(1000).tolist()
    assert all(mean_of([value] * count) == value for value in values for count in (1, 3, 7, 40))
    assert mean_of([0.0, 0.5, 0.5, 1.0]) == pytest.approx(0.5)
    head = HeadWork(0.2, 0.2, "none", False, False, "auto", kept=0.2, visual=0.2)
    assert CALL.over_dense([head] * 7, 432) == CALL.head_ratio(432, 0.2)
