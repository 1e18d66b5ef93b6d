"""A plan whose repair is fitted in every call: its file, its density, its words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffsparse import Execution, HeadEntry, OnlineRepair, SparsityPlan, TileOrder, TokenGrid, Window, preset
from diffsparse.card import plan_card
from diffsparse.plan import PlanError
from diffsparse.saving import JSON_NAME
from diffsparse.work import head_work

GRID = TokenGrid(3, 16, 16, text_after=32)
ENTRIES = (
    HeadEntry(TileOrder(1, 8, 8), Window((1, 0.5, 0.5)), execution=Execution(tail="mean")),
    HeadEntry(execution=Execution("skip")),
    HeadEntry(),
)


def plan(rows: int | None = 256) -> SparsityPlan:
    made = SparsityPlan.from_table({"a": [list(ENTRIES)], "b": [list(ENTRIES[::-1])]})
    return made if rows is None else replace(made, repair=OnlineRepair(rows))


@pytest.mark.parametrize(
    "made", [plan(), plan(16), preset("window", repair_rows=128), preset("radial", repair_rows=64)]
)
def test_it_comes_back_from_a_file_as_it_was(made: SparsityPlan, tmp_path: Path) -> None:
    made.save_pretrained(tmp_path)
    found = SparsityPlan.from_pretrained(tmp_path)
    assert found.repair == made.repair == found.online_repair and found.fitted_repair is None
    assert found.to_files() == made.to_files() and list(made.to_files()) == [JSON_NAME]
    data = json.loads((tmp_path / JSON_NAME).read_text())
    assert data["repair"] == {"kind": "online", "rows": made.online_repair.rows}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"kind": "online"}, "must have rows and nothing else"),
        ({"kind": "online", "rows": 256, "rank": 4}, "must have rows and nothing else"),
        ({"kind": "online", "rows": 8}, "must be an integer from 16 to 4,096, got 8"),
        ({"kind": "online", "rows": 1e3}, "must be an integer from 16 to 4,096, got 1000.0"),
        ({"kind": "online", "rows": "many"}, "must be an integer from 16 to 4,096, got 'many'"),
        ({"kind": "online", "rows": True}, "must be an integer from 16 to 4,096, got True"),
        ({"kind": ["online"], "rows": 256}, "must have kind, maps and rank"),
        ({"rows": 256}, "must have kind, maps and rank"),
        ("online", "must have kind, maps and rank"),
    ],
)
def test_words_that_cannot_be(said: Any, message: str, tmp_path: Path) -> None:
    plan().save_pretrained(tmp_path)
    data = json.loads((tmp_path / JSON_NAME).read_text())
    (tmp_path / JSON_NAME).write_text(json.dumps(data | {"repair": said}))
    with pytest.raises(PlanError, match=message) as found:
        SparsityPlan.from_pretrained(tmp_path)
    assert "\n" not in str(found.value)


def test_what_is_no_repair_is_refused() -> None:
    with pytest.raises(PlanError, match="repair must be a Repair, an OnlineRepair or None, got 256"):
        replace(plan(), repair=256)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"preset\('dense'\) takes no repair_rows"):
        preset("dense", repair_rows=256)
    with pytest.raises(PlanError, match="an integer from 16 to 4,096, got 3"):
        preset("window", repair_rows=3)


def test_its_rows_count_in_every_density() -> None:
    share = 256 / GRID.seq_len
    plain, online = plan(None), plan()
    for layer in ("a", "b"):
        found, before = online.layout(0, layer, 3, GRID), plain.layout(0, layer, 3, GRID)
        assert found is not None and before is not None and found.heads.repair == OnlineRepair(256)
        assert found.densities == pytest.approx([min(1.0, d + share) for d in before.densities])
        entries = online.layer_entries(0, layer, 3)
        assert entries is not None
        works = [head_work(entry, GRID, 64, online.online_repair) for entry in entries]
        assert found.densities == pytest.approx([work.density for work in works])
    assert (online.call_densities(GRID) - plain.call_densities(GRID)).ravel() == pytest.approx([2 * share / 3] * 2)
    levels = [0.99, 0.5, 0.1]
    assert online.trajectory_density(GRID, levels) > plain.trajectory_density(GRID, levels)


def test_the_card_says_so() -> None:
    assert "repaired online, by 256 exact rows of each" in plan_card(plan())
    assert "repaired" not in plan_card(plan(None))


def test_other_numerics_keep_it() -> None:
    assert plan().with_numerics("int8").repair == OnlineRepair(256)
