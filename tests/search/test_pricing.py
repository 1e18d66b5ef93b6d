"""What a search prices is what runs: where the policy has a layer dense, no entry in it wins any time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffsparse.entry import TAILS
from diffsparse.grid import TokenGrid
from diffsparse.kernels.break_even import save_local
from diffsparse.order import RasterOrder, TileOrder, TokenOrder
from diffsparse.pipelines import sparse_attention, sparse_attention_summary
from diffsparse.pipelines.policy import ANY_MACHINE, SLOWER, Machine, judge_layer
from diffsparse.plan import SparsityPlan
from diffsparse.search.config import SearchConfig
from diffsparse.search.errors import BadInput
from diffsparse.search.generate import GenerationSettings, generate_clip
from diffsparse.search.options import FamilyTable, head_entry, head_options
from diffsparse.search.pricing import Pricing
from diffsparse.search.search import search_plan
from diffsparse.search.store import SearchStore
from diffsparse.work import head_work
from tests.helpers.break_even import table
from tests.search.made_up import GRID, LAYERS, LEVELS, TILE, Scores, found, head_scores
from tests.search.tiny import COSTS, PROMPTS, SHAPE, fix_costs


def machine(**ratio: tuple[float, float]) -> Machine:
    """One whose kernels take these shares of dense attention with each tail: of few blocks, and of all of them."""
    rows = {tail: (ratio.get(tail, ratio["others"]),) for tail in TAILS}
    known = replace(table(1.0), heads=2, densities=(0.9, 1.0), ratio=rows)
    return Machine("cpu", None, known)


def pricing(where: Machine, grid: TokenGrid = GRID, **config: Any) -> Pricing:
    asked = SearchConfig(**{"budget": 0.5, "steps": 6, "validation_prompts": 0} | config)
    return Pricing(asked, dict.fromkeys(LAYERS, grid), {grid: COSTS}, {grid: 8}, 2, where)


def run_dense(plan: SparsityPlan, where: Machine) -> list[tuple[int, str]]:
    """Layers that have sparse heads in the plan, and run dense for the machine's reasons."""
    wrong = []
    for phase in range(plan.schedule.num_phases):
        for layer in LAYERS:
            entries = plan.layer_entries(phase, layer, 2)
            if entries is None or all(entry.is_dense for entry in entries):
                continue
            if judge_layer([head_work(entry, GRID, 64) for entry in entries], GRID.seq_len, where).reason is not None:
                wrong.append((phase, layer))
    return wrong


@pytest.mark.parametrize("order", [TILE, RasterOrder(), TileOrder(2, 4, 8)], ids=str)
@pytest.mark.parametrize("grid", [GRID, TokenGrid(2, 13, 21, text_before=70, text_after=5)], ids=str)
def test_an_options_work_is_that_of_its_entry(grid: TokenGrid, order: TokenOrder) -> None:
    known = FamilyTable(grid.visual_only(), order, 64)
    n = len(known.weight)
    # As measured errors are: the more tokens two blocks have, the larger.
    error = np.random.default_rng(0).random((len(TAILS), n, n)) * known.weight
    known_errors = np.zeros((len(TAILS), 1))
    scores = head_scores(error, known, 1.0, known_errors, known_errors)
    options = head_options(scores, known, bitmaps=True)
    assert {option.kind for option in options} == {"dense", "skip", "family", "bitmap"}
    ask = pricing(ANY_MACHINE, grid)
    for option in options:
        told, real = (
            ask.work(option, LAYERS[0], order),
            head_work(head_entry(option, error[1], known), grid, 64),
        )
        # Where blocks have different lengths, a mask of as much work may have a few pairs more.
        ragged = len(set(known.weight.ravel().tolist())) > 1
        off = 0.06 if option.kind == "bitmap" and ragged else 1e-12
        assert told.blocks == pytest.approx(real.blocks, abs=off) or option.kind == "skip"
        assert (told.tail, told.skipped, told.numerics) == (real.tail, real.skipped, real.numerics)
        assert told.gathered == real.gathered or option.kind == "skip"
        if option.kind == "bitmap":  # in steps of whole blocks
            assert real.visual is not None and option.density - 2 / n < real.visual <= option.density + 1e-9
        else:
            assert told.visual == pytest.approx(real.visual)


def test_an_entry_that_would_run_dense_costs_as_much() -> None:
    where = machine(none=(0.4, 1.1), others=(1.2, 1.3))
    search = Scores(SearchConfig(steps=6))
    options = head_options(search.head(LAYERS[0], 0, 0), search.table(GRID, TILE), bitmaps=True)
    ask = pricing(where)
    for option in options:
        head = ask.work(option, LAYERS[0], TILE)
        verdict = judge_layer([head] * 2, GRID.seq_len, where)
        time = COSTS.over_dense([head], GRID.seq_len) if verdict.reason is None else 1.0
        assert ask.cost(option, LAYERS[0], TILE) == time
        if option.kind in ("family", "bitmap") and option.density < 0.9:
            assert (time < 1) == (option.tail == "none")
            assert pricing(ANY_MACHINE).cost(option, LAYERS[0], TILE) < 1, "what was priced before"
    assert ask.reasons == {SLOWER}


def test_no_time_is_won_with_entries_that_run_dense() -> None:
    """Beside heads that compute everything, for which the kernel is slower than dense attention, some cheap heads do
    not make a layer faster. Head by head no price differs from those of a machine that runs all of it."""
    where = machine(others=(0.3, 1.9))
    disagreed = 0
    for budget in (0.3, 0.5, 0.7):
        for dense in (0, 1):
            asked: dict[str, Any] = {"density": None, "budget": budget, "dense_steps": dense}
            (blind,), (plan,) = (
                [candidate.plan for candidate in found(machine=which, **asked)[1]] for which in (ANY_MACHINE, where)
            )
            disagreed += len(run_dense(blind, where))
            assert not run_dense(plan, where)
            time = [
                1.0
                if (phase := plan.schedule.phase(level)) is None
                else judge_layer(
                    [head_work(e, GRID, 64) for e in plan.layer_entries(phase, layer, 2) or ()],
                    GRID.seq_len, where, COSTS,
                ).time
                for level in LEVELS
                for layer in LAYERS
            ]  # fmt: skip
            told = plan.record["search"]["predicted_attention_time"]
            assert told <= budget + 1e-9
            # A mask has as many whole blocks as fit into its share.
            assert told - 0.05 < np.mean(np.array(time, np.float64)) <= told + 1e-9
    assert disagreed, "there was nothing to tell"


def test_what_never_runs_sparse_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scores, "silent", None)  # a head that is left out at no loss makes its layer faster
    with pytest.raises(BadInput, match=rf"no cheaper than dense attention \({SLOWER}\); ask for"):
        found(machine=machine(others=(1.1, 1.2)), density=None, budget=0.5)
    without = Machine("reference", "no kernel for these tensors", None)
    with pytest.raises(BadInput, match=r"no cheaper than dense attention \(no kernel for these tensors\); ask for"):
        found(machine=without, density=None, budget=0.5)


def test_a_density_is_the_plans_whatever_the_machine() -> None:
    slow = machine(others=(4.0, 4.0))
    (anywhere,), (here,) = (found(machine=where, density=0.5)[1] for where in (ANY_MACHINE, slow))
    assert here.plan.entries == anywhere.plan.entries and here.plan.schedule == anywhere.plan.schedule
    assert anywhere.plan.record["search"]["predicted_attention_time"] < 0.7
    assert here.plan.record["search"]["predicted_attention_time"] == 1.0, "of what runs here"


@pytest.mark.slow(reason="two whole searches, and a clip of each plan")
def test_a_searched_plan_runs_as_it_was_priced(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tails are slow on this machine: what has one stays dense here, and wins no time."""
    monkeypatch.setenv("DIFFSPARSE_CACHE", str(tmp_path / "cache"))
    fix_costs(monkeypatch)
    config = SearchConfig(
        budget=0.7, steps=2, trace_steps=2, trace_prompts=1, samples=1, validation_prompts=0, dense_steps=0, **SHAPE
    )

    def search(name: str) -> SparsityPlan:
        return search_plan(pipe, PROMPTS, config, tmp_path / name, progress=False, say=lambda line: None)

    def reasons(plan: SparsityPlan) -> set[str]:
        with sparse_attention(pipe, plan):
            generate_clip(pipe, PROMPTS[0], 0, GenerationSettings(2, 5.0, **SHAPE))
            told = sparse_attention_summary(pipe).transformers["transformer"]
        assert told.sparse_calls or plan is blind
        return set(told.dense_reasons)

    blind = search("blind")
    rows = {tail: ((0.3, 0.3),) if tail == "none" else ((4.0, 4.0),) for tail in TAILS}
    save_local(replace(table(1.0), ratio=rows))
    assert SLOWER in reasons(blind), "there was nothing to tell"
    plan = search("plan")
    assert SLOWER not in reasons(plan)
    assert plan.record["search"]["predicted_attention_time"] <= 0.7 + 1e-9
    # What it went by is kept: the same search ends in the same plan whatever was measured since.
    with SearchStore(tmp_path / "plan" / "search.sqlite") as store:
        assert Machine.from_dict(store.get_json("machine")).table == replace(table(1.0), ratio=rows)
    save_local(table(9.0))
    assert search("plan").entries == plan.entries
