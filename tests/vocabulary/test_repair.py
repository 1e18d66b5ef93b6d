"""The repair of a plan: its arrays, its file, and what it does to an output."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diffsparse.entry import HeadEntry
from diffsparse.patterns import Window
from diffsparse.plan import Architecture, PlanError, SparsityPlan
from diffsparse.repair import HeadRepair, Repair, read_repair
from diffsparse.saving import ARRAYS_NAME, JSON_NAME
from tests.tolerance import Work, assert_near

HEADS, DIM = 3, 16


def repair(rank: int | None = None, phases: int = 1, layers: int = 2, seed: int = 0) -> Repair:
    rng = np.random.default_rng(seed)
    index = np.full((phases, layers, HEADS), -1, np.int32)
    index.reshape(-1)[1:] = np.arange(index.size - 1)
    n = index.size - 1
    bias = rng.normal(size=(n, DIM)).astype(np.float16)
    left = rng.normal(size=(n, DIM, rank or DIM)).astype(np.float16)
    right = None if rank is None else rng.normal(size=(n, rank, DIM)).astype(np.float16)
    return Repair(index, left, bias, right)


def plan(fix: Repair | None, dim: int = DIM) -> SparsityPlan:
    layers = ("a", "b")
    architecture = Architecture("Model", layers, HEADS, dim, (1, 1, 1), "none")
    entry = HeadEntry(pattern=Window(size=(1, 0.5, 0.5)))
    made = SparsityPlan.from_table({name: [[entry] * HEADS] for name in layers}, architecture=architecture)
    return replace(made, repair=fix)


@pytest.mark.parametrize("rank", [None, 4])
def test_it_comes_back_from_a_file_as_it_was(rank: int | None, tmp_path: Path) -> None:
    wanted = repair(rank)
    plan(wanted).save_pretrained(tmp_path)
    found = SparsityPlan.from_pretrained(tmp_path).repair
    assert found is not None and found.rank == rank
    for name, array in wanted.to_parts().items():
        assert np.array_equal(found.to_parts()[name], array), name
    assert plan(wanted).to_files() == SparsityPlan.from_pretrained(tmp_path).to_files()
    # A version that does not know repairs would run other numbers, so that it must refuse.
    data = json.loads((tmp_path / JSON_NAME).read_text())
    assert "repair" in data and "repair" not in data["ignorable"]


def test_a_plan_without_one_has_the_files_of_before(tmp_path: Path) -> None:
    assert list(plan(None).to_files()) == [JSON_NAME] and b"repair" not in plan(None).to_files()[JSON_NAME]


@pytest.mark.parametrize("rank", [None, 5])
def test_the_maps_of_a_layer(rank: int | None) -> None:
    found = repair(rank).of_layer(0, 0)
    assert found.weight.shape == (HEADS, DIM, DIM) and not found.weight[0].any() and not found.bias[0].any()
    whole = repair(rank)
    matrix = whole.left[0].astype(np.float32)
    if whole.right is not None:
        matrix = matrix @ whole.right[0].astype(np.float32)
    assert_near(found.weight[1].float(), torch.from_numpy(matrix), Work(DIM, dtype=torch.float16))
    assert torch.equal(found.bias[1], torch.from_numpy(whole.bias[0]))


def test_what_it_does_to_an_output() -> None:
    """Plainly, head by head and token by token; text is left alone."""
    maps = repair().of_layer(0, 1)
    torch.manual_seed(0)
    out = torch.randn(2, 9, HEADS, DIM, dtype=torch.float64)
    wanted = out.clone()
    for b, s, h in np.ndindex(2, 9, HEADS):
        if 2 <= s < 7:
            row = out[b, s, h]
            wanted[b, s, h] = row + row @ maps.weight[h].double() + maps.bias[h].double()
    found = maps.apply_(out.clone(), text_before=2, num_visual=5)
    assert_near(found, wanted, Work(DIM, dtype=torch.float64))
    assert torch.equal(found[:, :2], out[:, :2]) and torch.equal(found[:, 7:], out[:, 7:])


def test_some_of_the_heads() -> None:
    maps = repair().of_layer(0, 1)
    some = maps.heads([2, 0])
    assert torch.equal(some.weight, maps.weight[[2, 0]]) and torch.equal(some.bias, maps.bias[[2, 0]])
    assert isinstance(maps.heads(slice(0, 1)), HeadRepair)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": np.zeros((4, DIM), np.float16)}, r"left is float16 \[4, 16, 16\], got float16 \[5, 16, 16\]"),
        ({"bias": np.zeros(DIM, np.float16)}, r"bias is float16 \[maps, head_dim\]"),
        ({"left": np.zeros((5, DIM, DIM), np.float32)}, r"left is float16 .*got float32"),
        ({"left": np.full((5, DIM, DIM), np.nan, np.float16)}, "left has values that are not finite"),
        ({"right": np.zeros((5, 0, DIM), np.float16), "left": np.zeros((5, DIM, 0), np.float16)}, "index names one of"),
        ({"index": np.full((1, 2, HEADS), 5, np.int32)}, "names one of its 5 maps"),
        ({"index": np.full((1, 2, HEADS), -2, np.int32)}, "names one of its 5 maps"),
        ({"index": np.zeros((1, 2, HEADS), np.int64)}, "index is int32"),
    ],
)
def test_arrays_that_cannot_be(change: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Repair(**{**repair().to_parts(), **change})


def test_a_plan_that_it_does_not_fit() -> None:
    with pytest.raises(PlanError, match=r"repair is for \(2, 2, 3\) phases, layers, heads, not \(1, 2, 3\)"):
        plan(repair(phases=2))
    with pytest.raises(PlanError, match="repair is for heads of 16, the architecture has 32"):
        plan(repair(), dim=32)
    with pytest.raises(PlanError, match="any model has no repair"):
        replace(SparsityPlan.uniform(HeadEntry()), repair=repair())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "spline"}, "kind must be 'affine'"),
        ({"maps": 4}, "its arrays have"),
        ({"rank": 3}, "lack repair.right"),
        ({"more": 1}, "must have kind, maps and rank"),
    ],
)
def test_words_that_do_not_fit_the_arrays(change: dict[str, object], message: str) -> None:
    whole = repair()
    with pytest.raises(PlanError, match=message):
        read_repair(whole.to_dict() | change, whole.to_arrays())


def test_a_file_without_its_arrays(tmp_path: Path) -> None:
    plan(repair()).save_pretrained(tmp_path)
    (tmp_path / ARRAYS_NAME).unlink()
    with pytest.raises(PlanError, match=r"lack repair\.index; copy the whole folder"):
        SparsityPlan.from_pretrained(tmp_path)
