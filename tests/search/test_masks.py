"""What makes composing fast gives what the plain rules give: masks, what heads may choose, and their fallbacks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.library.made_up_record import make_up
from diffsparse.grid import TokenGrid
from diffsparse.order import RasterOrder, TileOrder
from diffsparse.search.candidates import BITMAP_DENSITIES
from diffsparse.search.choices import choices_of, pruned_rows
from diffsparse.search.drift import holds_for
from diffsparse.search.masks import mask_at
from diffsparse.search.options import FamilyTable, Option, head_entry
from diffsparse.search.recompose import compose_plan


def sorted_mask(value: np.ndarray, weight: np.ndarray, density: float) -> np.ndarray:
    """All pairs in the order of their value per work, of equals the first, as long as they fit."""
    order = np.argsort(-(value / weight.astype(np.float32)).reshape(-1), kind="stable")
    used = np.cumsum(weight.reshape(-1)[order])
    mask = np.zeros(value.size, bool)
    mask[order[: int(np.searchsorted(used - 1e-9, density, side="right"))]] = True
    return mask.reshape(value.shape)


@given(st.integers(1, 40), st.sampled_from([1, 3, 1000]), st.booleans(), st.integers(0, 2**32), st.floats(0, 1))
def test_a_mask_has_the_pairs_that_sorting_all_of_them_gives(
    blocks: int, distinct: int, ragged: bool, seed: int, density: float
) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.choice([1.0, 5.0, 8.0, 64.0], blocks) if ragged else np.ones(blocks)
    weight = np.outer(lengths, lengths) / lengths.sum() ** 2
    value = rng.integers(0, distinct, (blocks, blocks)).astype(np.float32)
    for each in (*BITMAP_DENSITIES, 1.0, density):
        assert np.array_equal(mask_at(value, weight, each), sorted_mask(value, weight, each))


@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 2**32))
def test_what_no_other_option_beats_is_kept(rows: int, options: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    errors, prices = rng.integers(0, 6, (rows, options)).astype(float), rng.integers(0, 6, options).astype(float)
    errors[rng.random(errors.shape) < 0.2] = np.inf
    for row, kept in zip(errors, pruned_rows(errors, prices), strict=True):
        wanted = set()
        for error, price in zip(row, prices, strict=True):
            better = (row <= error) & (prices <= price) & ((row < error) | (prices < price))
            if np.isfinite(error) and not better.any():
                wanted.add((error, price))
        assert {(row[i], prices[i]) for i in kept} == wanted and len(kept) == len(wanted)
        assert (np.diff(prices[kept]) > 0).all()


@pytest.mark.parametrize("roomy", [True, False])
def test_outputs_that_are_used_again_add_their_error_and_save_their_share(roomy: bool) -> None:
    table = FamilyTable(TokenGrid(1, 32, 32), TileOrder(1, 8, 8), 64)
    rng, count = np.random.default_rng(0), len(table.options)
    errors, prices = rng.random((3, count)), rng.random(count)
    holds, calls = holds_for([1.0, 0.8, 0.5, 0.2]), np.array([2, 1, 1, 2])
    late = rng.random((3, 4)) * 0.1
    late[2, 1] = np.inf
    plain = choices_of(table, errors, prices)
    for head, (choices, spent) in enumerate(choices_of(table, errors, prices, holds, calls, late, roomy)):
        for option, place, error, price in zip(choices, choices.places, choices.errors, spent, strict=True):
            hold = next((hold for hold in holds if hold.reuse == option.reuse), None)
            assert option.error == error and (hold is None) == (option.reuse == 0)
            assert hold is None or option.kind != "skip"
            share = 1.0 if hold is None else calls[list(hold.computed)].sum() / calls.sum()
            rate = np.nan_to_num(late[head], posinf=1e300)
            stale = 0.0 if hold is None else float((rate * hold.since**2).sum())
            assert error == pytest.approx(errors[head, place] + stale) and price == pytest.approx(prices[place] * share)
        assert (np.diff(spent) >= 0).all()
        computed = set(choices.places[choices.reuses == 0])
        assert computed <= set(plain[head][0].places) and (roomy or computed == set(plain[head][0].places))
        if roomy:
            assert (np.diff(choices.errors) < 0).all()


@pytest.mark.parametrize("order", [TileOrder(1, 8, 8), RasterOrder()], ids=str)
def test_a_fallback_is_the_same_where_sums_are_known(order: TileOrder | RasterOrder) -> None:
    table = FamilyTable(TokenGrid(3, 18, 20), order, 64)
    rng = np.random.default_rng(0)
    values = rng.random((6, *table.weight.shape)).astype(np.float32) ** 6
    values[5] = 0.0  # all are as good
    kept = table.kept_by_families(values)
    for value, sums in zip(values, kept, strict=True):
        wanted = [float(value[mask].sum()) for mask in table.masks]
        assert sums == pytest.approx(wanted, rel=1e-4, abs=1e-4 * float(value.sum()))
        for density in (0.02, 0.12, 0.5):
            option = Option(0.0, density, "mean", "bitmap")
            assert head_entry(option, value, table, sums) == head_entry(option, value, table)


def test_a_plan_of_a_made_up_record(tmp_path: Path) -> None:
    make_up(tmp_path, TokenGrid(3, 16, 16), layers=2, heads=2)
    for asked in ({"budget": 0.4}, {"density": 0.3}):
        plan = compose_plan(tmp_path, out=tmp_path / "plan", progress=False, **asked)
        about = plan.record["search"]
        assert 0 < about["trajectory_density"] < 1 and len(plan.entries) > 1
        assert about["predicted_attention_time"] <= asked.get("budget", 1.0) * (1 + 1e-9)
        assert about["trajectory_density"] <= asked.get("density", 1.0)
