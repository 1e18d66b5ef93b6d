"""Who picks a head's blocks: budgets, selections, their words, their files, and what they cost at most."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffsparse import Budget, Execution, HeadEntry, OnlineSelection, SparsityPlan, TileOrder, TokenGrid, Window
from diffsparse.codec import decode_entry, encode_entry
from diffsparse.kernels.break_even import work_of
from diffsparse.kernels.select import selectors
from diffsparse.layout import build_layout
from diffsparse.plan import PlanError
from diffsparse.saving import JSON_NAME
from diffsparse.selection import is_due, rule_names
from diffsparse.work import head_work

GRID = TokenGrid(3, 13, 11, text_before=5, text_after=70)
BUDGETS = (
    Budget(),
    Budget("top_k", 3),
    Budget("top_p", 0.9, least=0.1, most=0.6),
    Budget("top_p_head", 0.5),
    Budget("quantile", 0.2),
    Budget("weight", 0.01, most=0.5),
    Budget("score", -3.5),
    Budget("top_p_heads", 0.5, most=0.8),
    Budget("quantile_heads", 0.2),
    Budget("recall_heads", 0.2),
)
SELECTIONS = tuple(OnlineSelection("pooled", budget) for budget in BUDGETS) + (
    OnlineSelection("pooled", Budget(), cadence="once"),
    OnlineSelection("pooled", Budget(), cadence="shrink"),
    OnlineSelection("antidiagonal", Budget(), (("stride", 16),)),
    OnlineSelection("pooled", Budget(), cadence=(0.8, 0.4)),
)


def test_the_vocabulary_and_the_kernels_know_the_same_rules() -> None:
    assert set(rule_names()) == set(selectors())


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_a_plan_comes_back_from_its_file(selection: OnlineSelection, tmp_path: Path) -> None:
    entry = HeadEntry(TileOrder(1, 8, 8), Window((1, 0.5, 0.5)), selection, Execution(tail="mean"))
    plan = SparsityPlan.from_table({"a": [[entry, HeadEntry()]]})
    plan.save_pretrained(tmp_path)
    found = SparsityPlan.from_pretrained(tmp_path)
    assert found.entries == plan.entries and found.to_files() == plan.to_files()
    written = json.loads((tmp_path / JSON_NAME).read_text())["entries"][0]["selection"]
    assert list(written) == ["rule", "budget", "parameters", "cadence"]
    assert hash(found.entries[0]) == hash(entry) and not entry.is_whole and entry.online == selection
    assert str(selection) in str(entry) and str(entry.pattern) in str(entry)


GOOD: dict[str, Any] = {"rule": "pooled", "budget": {"kind": "density", "value": 0.3}}


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("online", "selection must be one of static, or an OnlineSelection; got 'online'"),
        (7, "selection must be a string or an object, got 7"),
        ({}, "selection lacks budget"),
        ({"budget": {}}, "a selection lacks rule"),
        (GOOD | {"rule": "best"}, "there is no selector 'best'; there are pooled"),
        (GOOD | {"often": 1}, "a selection has keys this version does not know: often; update diffsparse"),
        (GOOD | {"budget": 0.3}, "selection.budget must be an object, got 0.3"),
        (GOOD | {"budget": {"kind": "some"}}, "selection.budget.kind must be one of density, top_k, .*; got 'some'"),
        (GOOD | {"budget": {"value": 0}}, "kind 'density' must be a number above 0, got 0"),
        (GOOD | {"budget": {"value": 1.5}}, "kind 'density' must be a number from 0 to 1, got 1.5"),
        (GOOD | {"budget": {"kind": "top_k", "value": 2.5}}, "kind 'top_k' must be an integer from 1 to 2,147,483,647"),
        (GOOD | {"budget": {"least": 0.5, "most": 0.2}}, "least share must not be above its most"),
        (GOOD | {"budget": {"most": 0}}, "above 0; got 0.0 and 0"),
        (GOOD | {"budget": {"least": -1}}, "a budget's least is a share of a row's blocks: it must be a number from 0"),
        (GOOD | {"parameters": [1]}, r"selection.parameters must be an object, got \[1\]"),
        (GOOD | {"parameters": {"stride": 8}}, "'pooled' has no parameter 'stride'; it takes none"),
        (
            GOOD | {"rule": "antidiagonal", "parameters": {"stride": 0}},
            "stride of the selector 'antidiagonal' must be an integer from 1 to 64, got 0",
        ),
        (
            GOOD | {"rule": "mass", "parameters": {"rows": 4.0}},
            "rows of the selector 'mass' must be an integer from 1 to 128, got 4.0",
        ),
        (
            GOOD | {"cadence": "often"},
            "cadence must be one of call, once, shrink, or a list of noise levels; got 'often'",
        ),
        (GOOD | {"cadence": []}, "cadence must be one of call, once, shrink, or a list of noise levels"),
        (GOOD | {"cadence": [0.5, 2]}, "a noise level of a cadence must be a number from 0 to 1, got 2"),
    ],
)
def test_words_that_cannot_be(said: Any, message: str, tmp_path: Path) -> None:
    SparsityPlan.from_table({"a": [[HeadEntry(selection=SELECTIONS[0])]]}).save_pretrained(tmp_path)
    data = json.loads((tmp_path / JSON_NAME).read_text())
    data["entries"][0]["selection"] = said
    (tmp_path / JSON_NAME).write_text(json.dumps(data))
    with pytest.raises(PlanError, match=message) as found:
        SparsityPlan.from_pretrained(tmp_path)
    assert "\n" not in str(found.value)


def test_an_entry_of_before_is_written_as_before() -> None:
    data = encode_entry(HeadEntry(), {})
    assert data["selection"] == "static"
    assert decode_entry(data, {}) == HeadEntry() and HeadEntry().online is None


def test_a_skipped_head_has_nothing_to_pick() -> None:
    entry = HeadEntry(selection=SELECTIONS[0], execution=Execution("skip"))
    assert entry.online is None and str(entry) == "skip"
    assert build_layout(GRID, [entry]).heads.picks is None


@pytest.mark.parametrize("pattern", [None, Window((1, 0.4, 0.4))])
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_density_is_the_most_that_a_budget_allows(budget: Budget, pattern: Window | None) -> None:
    selection = OnlineSelection("pooled", budget)
    static = HeadEntry(TileOrder(1, 8, 8)) if pattern is None else HeadEntry(TileOrder(1, 8, 8), pattern)
    entry = HeadEntry(static.order, static.pattern, selection, Execution(tail="mean"))
    layout, family = build_layout(GRID, [entry, static]), build_layout(GRID, [static])
    assert (layout.mask(0) == family.mask(0)).all()  # the lists hold what may be picked
    work = head_work(entry, GRID, 64)
    assert layout.densities[0] == pytest.approx(work.density)
    of_layout = work_of(layout)
    assert of_layout[0].blocks == pytest.approx(work.blocks) and of_layout[0].varies == work.varies
    assert not of_layout[1].varies and work.varies == (budget.kind not in ("density", "top_k"))
    # By hand: rows of the video keep the longest of their blocks.
    tokens = layout.tokens
    lengths, visual = tokens.lengths()[0].numpy(), tokens.visual_blocks(0).numpy()
    n, kept = int(visual.sum()), 0
    for i, row in enumerate(family.mask(0).numpy()):
        inside = np.sort(lengths[row & visual])[::-1]
        most = inside if not visual[i] else inside[: budget.most_blocks(n)]
        kept += int(lengths[i]) * int(most.sum() + lengths[row & ~visual].sum())
    every = kept == GRID.seq_len**2
    tail = 0.0 if every else len(lengths) / GRID.seq_len
    assert layout.densities[0] == pytest.approx(min(1.0, kept / GRID.seq_len**2 + tail))
    plan = SparsityPlan.uniform(entry)
    assert plan.call_densities(GRID, ["a"], 2)[0, 0] == pytest.approx(layout.densities[0])


@given(
    budget=st.sampled_from(BUDGETS),
    rows=st.integers(1, 9),
    seed=st.integers(0, 2**16),
)
def test_the_most_is_inside_the_mask_and_within_the_number(budget: Budget, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask, lengths = rng.random((rows, rows)) < 0.6, rng.integers(1, 64, rows).astype(float)
    most = budget.fullest(mask, lengths)
    assert not (most & ~mask).any()
    assert (most.sum(1) == np.minimum(mask.sum(1), budget.most_blocks(rows))).all()
    for kept, row in zip(most, mask):
        if kept.any() and (row & ~kept).any():
            assert lengths[kept].min() >= lengths[row & ~kept].max()


def test_when_blocks_are_due() -> None:
    assert is_due("call", 0.5, 0.5) and is_due("shrink", 0.9, 0.1) and not is_due("once", 0.9, 0.1)
    levels = (0.8, 0.4)
    assert not is_due(levels, 0.95, 0.81) and is_due(levels, 0.95, 0.8) and is_due(levels, 0.95, 0.1)
    assert not is_due(levels, 0.8, 0.8) and not is_due(levels, 0.8, 0.41)  # picked at the level itself
    assert is_due(levels, 0.8, 0.4) and not is_due(levels, 0.39, 0.0)


def test_heads_of_a_layout_take_their_rules_with_them() -> None:
    entries = [HeadEntry(selection=SELECTIONS[0]), HeadEntry(), HeadEntry(selection=SELECTIONS[1]), HeadEntry()]
    layout = build_layout(GRID, entries)
    picks = layout.heads.picks
    assert picks is not None and [g.numbers for g in picks.groups] == [(0,), (2,)]
    part = layout.of_heads(slice(1, 4)).heads.picks
    assert part is not None and [g.numbers for g in part.groups] == [(1,)] and part.groups[0].places.tolist() == [1]
    assert part.varies == (False, False, False) and part.shares[0] is None and part.shares[1] == picks.shares[2]
    assert layout.of_heads([3, 1]).heads.picks is None
