"""Tails by their plain formulas, and tails that a user's code adds."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from diffsparse import Execution, HeadEntry, SparsityPlan, TokenGrid, build_layout, register_tail
from diffsparse.entry import TAILS
from diffsparse.kernels import BACKENDS, Tail, available_backends, check, checks, sparse_attention, tails
from diffsparse.kernels.backends import find_backend
from diffsparse.kernels.tails import find_tail
from diffsparse.tails import TAIL_COST, measured_as, tail_code, tail_name
from tests.kernels.cases import head, inputs, random_layout
from tests.tolerance import Work, assert_near

GRID = TokenGrid(2, 9, 15, text_after=20)
#: Means over at most seven tokens, products over eight channels, and a softmax of them.
BLOCK = Work(length=8, sums=4)


class Same:
    """The tail ``mean`` under another name."""

    name = "same"
    cost = 1.25

    def summaries(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return (queries @ keys.mean(0) + math.log(len(keys)))[:, None], values.mean(0, keepdim=True)


@pytest.fixture(autouse=True)
def _nothing_stays_registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tails, "_TAILS", dict(tails._TAILS))
    checks._log_once.cache_clear()
    before = dict(TAIL_COST)
    yield
    TAIL_COST.clear()
    TAIL_COST.update(before)


def test_every_tail_of_the_vocabulary_has_a_formula() -> None:
    for name in TAILS[1:]:
        tail = find_tail(name)
        assert isinstance(tail, Tail) and (tail.name, tail.cost) == (name, TAIL_COST[name])
    assert find_tail("none") is None


@pytest.mark.parametrize("name", TAILS[1:])
def test_a_block_of_equal_keys_and_values_is_attended_exactly(name: str) -> None:
    queries, key, value = torch.randn(5, 8), torch.randn(8), torch.randn(8)
    tail = find_tail(name)
    assert tail is not None
    for tokens in (1, 2, 7):
        logits, means = tail.summaries(queries, key.expand(tokens, 8), value.expand(tokens, 8))
        assert logits.shape[1] == len(means)
        assert_near(logits.logsumexp(1), queries @ key + math.log(tokens), BLOCK)
        assert_near(logits.softmax(1) @ means, value.expand(5, 8), BLOCK)


def test_a_registered_tail_runs_on_the_reference(caplog: pytest.LogCaptureFixture) -> None:
    register_tail(Same())
    q, k, v = inputs(GRID, 2, 16)
    layout = random_layout(GRID, [head(tail="same"), head()], 64, 0.4)
    want = sparse_attention(q, k, v, random_layout(GRID, [head(tail="mean"), head()], 64, 0.4), backend="reference")
    assert torch.equal(sparse_attention(q, k, v, layout, backend="reference"), want)
    with caplog.at_level(logging.INFO, logger="diffsparse"):
        assert torch.equal(sparse_attention(q, k, v, layout), want)
    assert "the cpu backend does not know the tail 'same'; it has mean, moments, centroids" in caplog.text
    assert layout.densities[0] > random_layout(GRID, [head(tail="mean")], 64, 0.4).densities[0], "its cost counts"


def test_backends_that_do_not_know_a_tail_say_so() -> None:
    register_tail(Same())
    q, k, v = inputs(GRID, 1, 64)
    layout = random_layout(GRID, [head(tail="same")], 64, 0.4)
    for name in (n for n in BACKENDS if n != "reference"):
        backend = find_backend(name)
        assert backend is not None and backend.tails is not None and "same" not in backend.tails
        if available_backends()[name] is None:
            with pytest.raises(ValueError, match=f"the {name} backend does not know the tail 'same'"):
                sparse_attention(q, k, v, layout, backend=name)
    assert check(q, k, v, layout, backend="cpu") == (
        "the cpu backend does not know the tail 'same'; it has mean, moments, centroids"
    )


def test_a_plan_carries_a_registered_tail_by_name(tmp_path: Path) -> None:
    register_tail(Same())
    entry = HeadEntry(execution=Execution(tail="same"))
    SparsityPlan.uniform(entry).save_pretrained(tmp_path)
    assert SparsityPlan.from_pretrained(tmp_path).entries == (entry,)
    TAIL_COST.pop("same")
    with pytest.raises(ValueError, match="tail must be one of none, mean, moments, centroids"):
        SparsityPlan.from_pretrained(tmp_path)


def test_numbers_of_tails_stay() -> None:
    assert [tail_code(name) for name in TAILS] == [0, 1, 2, 3]
    register_tail(Same())
    assert tail_code("same") == 4 and tail_name(4) == "same"
    register_tail(Same(), replace=True)
    assert tail_code("same") == 4
    layout = build_layout(GRID, [head(tail="same"), head(tail="mean")])
    assert layout.heads.tails == ("mean", "same")


def test_what_was_not_measured_counts_as_the_next_costlier() -> None:
    register_tail(Same())
    assert measured_as("same", TAILS) == "moments"
    assert measured_as("mean", TAILS) == "mean"
    TAIL_COST["same"] = 9.0
    assert measured_as("same", TAILS) == "centroids"


def test_what_is_no_tail_is_refused() -> None:
    class NoCost:
        name = "none_at_all"

    with pytest.raises(TypeError, match="NoCost is not a tail: it lacks cost, summaries"):
        register_tail(NoCost())  # type: ignore[arg-type]
    register_tail(Same())
    with pytest.raises(ValueError, match="there is a tail 'same' already"):
        register_tail(Same())
    for name, cost, message in (
        ("mean", 1.0, "the tail 'mean' is the library's own"),
        ("none", 1.0, "the tail 'none' is the library's own"),
        ("two words", 1.0, "a tail's name is a word"),
        ("a,b", 1.0, "a tail's name is a word"),
        ("other", 0.0, "the cost of a tail is a positive number of rows; got 0.0"),
        ("other", math.nan, "the cost of a tail is a positive number"),
    ):
        wrong = Same()
        wrong.name, wrong.cost = name, cost
        with pytest.raises(ValueError, match=message):
            register_tail(wrong)
    assert set(TAIL_COST) == {*TAILS, "same"}
