"""Searches whose plans are repaired in every call: what the rows cost is a part of what is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffsparse.online import OnlineRepair
from diffsparse.plan import SparsityPlan
from diffsparse.search.errors import BadInput
from diffsparse.search.search import SearchConfig, search_plan
from diffsparse.work import head_work
from tests.search.made_up import GRID, LAYERS, LEVELS, composer, found
from tests.search.tiny import PROMPTS, Cli, build_pipeline, config

ROWS = 32


@pytest.mark.parametrize("changes", [{"density": 0.4}, {"density": None, "budget": 0.5}])
def test_the_rows_count_in_what_is_asked_for(changes: dict[str, Any]) -> None:
    (plain,), (online,) = (found(1, levels=LEVELS, repair_rows=rows, **changes)[1] for rows in (0, ROWS))
    assert plain.plan.repair is None and online.plan.repair == OnlineRepair(ROWS)
    about = online.plan.record["search"]
    spent = "trajectory_density" if changes["density"] else "predicted_attention_time"
    assert about[spent] <= (changes["density"] or changes["budget"]) * (1 + 1e-6)
    assert about["trajectory_density"] == pytest.approx(online.plan.trajectory_density(GRID, LEVELS, LAYERS))
    # Less is left for blocks.
    assert about["predicted_error"] > plain.plan.record["search"]["predicted_error"]


def test_an_option_costs_what_its_entry_does() -> None:
    from diffsparse.search.options import head_entry, head_options

    made = composer(levels=LEVELS, repair_rows=ROWS)
    scores = made.search.scores(LAYERS[0], 0, {0: 1.0})
    table = made.search.table(GRID, made.orders[LAYERS[0], 0])
    seen = set()
    for option in head_options(scores, table, bitmaps=True):
        work = made.pricing.work(option, LAYERS[0], table.order)
        value = made.search.value(LAYERS[0], 0, {0: 1.0})
        wanted = head_work(head_entry(option, value, table), GRID, 64, OnlineRepair(ROWS))
        seen.add(option.kind)
        if option.kind == "dense":
            assert (work.density, work.extra) == (1, 0)  # a layer of such heads runs dense, without any rows
            continue
        assert work.extra == wanted.extra > 0
        # A bitmap's density is the one asked for; the mask has whole blocks.
        assert work.density == pytest.approx(wanted.density, abs=0.02 if option.kind == "bitmap" else 1e-9)
    assert seen == {"dense", "skip", "family", "bitmap"}


def test_a_search_writes_it_and_fits_nothing(tmp_path: Path) -> None:
    stages: list[str] = []
    plan = search_plan(
        build_pipeline(), PROMPTS, config(repair=True, repair_rows=ROWS, density=0.7), tmp_path, progress=False,
        on_stage=lambda name, *_: stages.append(name),
    )  # fmt: skip
    assert plan.repair == SparsityPlan.from_pretrained(tmp_path).repair == OnlineRepair(ROWS)
    assert "repair" not in stages and "validate" in stages


@pytest.mark.parametrize("rows", [15, -1, 4097, True, 64.0])
def test_rows_that_are_none(rows: Any) -> None:
    with pytest.raises(
        BadInput, match=r"must be an integer from 16 to 4,096, got .*, or 0 for maps that the search fits"
    ):
        SearchConfig(repair_rows=rows)


def test_no_repair_and_rows_of_one() -> None:
    with pytest.raises(BadInput, match="repair_rows is 64, and repair is switched off; give one of the two"):
        SearchConfig(repair=False, repair_rows=64)


def test_the_command_refuses_too_few_rows(cli: Cli, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n")
    for rows in ("-1", "7"):
        code, _, error = cli("search", "nowhere", "--prompts", prompts, "--out", tmp_path / "p", "--repair-rows", rows)
        assert code == 2 and f"--repair-rows {rows}" in error and len(error.strip().splitlines()) == 1, error
