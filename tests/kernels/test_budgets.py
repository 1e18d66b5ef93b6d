"""What a budget keeps of scored blocks, against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffsparse.kernels.select.budgets import keep, row_weights
from diffsparse.selection import BUDGETS, Budget

BUDGET = st.one_of(
    st.builds(Budget, st.just("density"), st.floats(0.01, 1)),
    st.builds(Budget, st.just("top_k"), st.integers(1, 9)),
    st.builds(Budget, st.sampled_from(["top_p", "top_p_head", "quantile"]), st.floats(0.01, 1)),
    st.builds(Budget, st.just("weight"), st.floats(0, 0.5)),
    st.builds(Budget, st.just("score"), st.floats(-3, 3)),
    st.builds(Budget, st.sampled_from(["top_p", "density"]), st.just(0.5), st.just(0.3), st.just(0.6)),
    st.builds(Budget, st.sampled_from(["top_p_head", "weight"]), st.just(0.2), st.just(0.2), st.just(0.7)),
)


def shares(values: list[float]) -> list[float]:
    top = max(values)
    weights = [math.exp(v - top) for v in values]
    return [w / sum(weights) for w in weights]


def prefix(values: list[float], value: float) -> int:
    """The fewest of the largest values that sum to a share of them all."""
    total, reached = sum(values), 0.0
    for count, one in enumerate(sorted(values, reverse=True)):
        if reached >= (value - 1e-6) * total:
            return count
        reached += one
    return len(values)


def by_hand(scores: torch.Tensor, candidates: torch.Tensor, blocks: int, budget: Budget) -> list[set[int]]:
    """Of one head, ``[N, N]``: the kept blocks of each row."""
    n, value = len(scores), budget.value
    inside = [[j for j in range(n) if candidates[i, j]] for i in range(n)]
    ranked = [sorted(row, key=lambda j: (-float(scores[i, j]), j)) for i, row in enumerate(inside)]
    weight = [dict(zip(row, shares([float(scores[i, j]) for j in row]))) if row else {} for i, row in enumerate(inside)]
    pairs = sorted(
        ((w, i, j) for i, row in enumerate(weight) for j, w in row.items()), key=lambda p: (-p[0], p[1], p[2])
    )
    if budget.kind == "top_p_head":
        pairs = pairs[: prefix([w for w, _, _ in pairs], value)]
    elif budget.kind == "quantile":
        pairs = pairs[: math.ceil(value * sum(map(bool, inside)) * blocks - 1e-9)]
    kept = []
    for i in range(n):
        wanted = {
            "density": math.ceil(value * blocks - 1e-9),
            "top_k": int(value),
            "top_p": prefix(list(weight[i].values()), value),
            "weight": sum(w >= value for w in weight[i].values()),
            "score": sum(float(scores[i, j]) >= value for j in inside[i]),
        }.get(budget.kind, sum(row == i for _, row, _ in pairs))
        low, high = (max(1, math.ceil(share * blocks - 1e-9)) for share in (budget.least, budget.most))
        kept.append(set(ranked[i][: min(max(wanted, low), high)]))
    return kept


@given(budget=BUDGET, n=st.integers(1, 9), heads=st.integers(1, 3), seed=st.integers(0, 2**16))
def test_every_budget_keeps_what_loops_keep(budget: Budget, n: int, heads: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(2, heads, n, n, generator=generator)
    candidates = torch.rand(1, heads, n, n, generator=generator) < 0.8
    blocks = torch.full((heads,), n)
    mask = keep(scores, candidates, blocks, budget)
    assert not (mask & ~candidates).any()
    assert (mask.any(3) == candidates.any(3).expand_as(mask[..., 0])).all()  # a row that may keep any keeps one
    for b in range(2):
        for h in range(heads):
            wanted = by_hand(scores[b, h].double(), candidates[0, h], n, budget)
            found = [set(row.nonzero().flatten().tolist()) for row in mask[b, h]]
            assert found == wanted, (budget, b, h)


@pytest.mark.parametrize("kind", BUDGETS)
def test_scores_that_are_no_numbers(kind: str) -> None:
    budget = Budget(kind, 2 if kind == "top_k" else 0.5)  # type: ignore[arg-type]
    scores = torch.tensor([[float("nan")] * 4, [-math.inf] * 4, [math.inf, 0, -math.inf, float("nan")], [3.0, 2, 1, 0]])
    candidates = torch.ones(4, 4, dtype=torch.bool)
    candidates[0, 0] = False
    mask = keep(scores[None, None], candidates[None, None], torch.tensor([4]), budget)[0, 0]
    assert (mask.sum(1) >= 1).all() and not mask[0, 0]
    assert mask[2, 0] and mask[3, 0]
    assert torch.equal(row_weights(scores[1:2], torch.zeros(1, 4, dtype=torch.bool)), torch.zeros(1, 4))


def test_a_prefix_is_minimal_and_no_first_block_is_added() -> None:
    """Published code for XAttention switches block 0 on where it overwrites places that are not selected."""
    weights = torch.tensor([0.01, 0.2, 0.5, 0.29])
    scores = weights.log().expand(1, 1, 4, 4)
    everything = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    for value, wanted in (
        (0.4, [2]),
        (0.5, [2]),
        (0.51, [2, 3]),
        (0.79, [2, 3]),
        (0.8, [1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ):
        mask = keep(scores, everything, torch.tensor([4]), Budget("top_p", value))
        assert mask[0, 0, 0].nonzero().flatten().tolist() == wanted, value


def test_equal_scores_keep_the_first() -> None:
    mask = keep(
        torch.zeros(1, 1, 5, 5), torch.ones(1, 1, 5, 5, dtype=torch.bool), torch.tensor([5]), Budget("top_k", 2)
    )
    assert mask[0, 0].nonzero()[:, 1].view(5, 2).tolist() == [[0, 1]] * 5
