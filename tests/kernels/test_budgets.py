"""What a budget keeps of scored blocks, against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from diffsparse.kernels.select.budgets import keep, row_weights
from diffsparse.kernels.select.largest import SortedRows, count_largest
from diffsparse.selection import BUDGETS, Budget

BUDGET = st.one_of(
    st.builds(Budget, st.just("density"), st.floats(0.01, 1)),
    st.builds(Budget, st.just("top_k"), st.integers(1, 9)),
    st.builds(Budget, st.sampled_from(["top_p", "top_p_head", "quantile"]), st.floats(0.01, 1)),
    st.builds(Budget, st.sampled_from(["top_p_heads", "quantile_heads", "best_heads"]), st.floats(0.01, 1)),
    st.builds(Budget, st.just("recall_heads"), st.floats(0.01, 0.7)),
    st.builds(Budget, st.just("weight"), st.floats(0, 0.5, width=32)),
    st.builds(Budget, st.just("score"), st.floats(-3, 3, width=32)),
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


Row = dict[int, float]  # of one row the weights of the blocks that may be kept


def weights_of(scores: torch.Tensor, candidates: torch.Tensor, plain: bool = False) -> list[Row]:
    """Of one head, ``[N, N]``: the weights of what is not kept anyway, or its plain scores."""
    rows = []
    for score, inside in zip(scores.tolist(), candidates.tolist()):
        free = [j for j, may in enumerate(inside) if may and score[j] < math.inf]
        values = [score[j] for j in free]
        rows.append(dict(zip(free, values if plain or not free else shares(values))))
    return rows


def from_the_best(heads: list[list[Row]], forced: list[list[set[int]]], budget: Budget, blocks: int) -> list[list[int]]:
    """Of heads that share their pairs, how many each row keeps. ``heads``: weights, or scores of ``best_heads``."""
    pairs = [(w, h, i) for h, rows in enumerate(heads) for i, row in enumerate(rows) for w in row.values()]
    must = [(2.0, h, i) for h, rows in enumerate(forced) for i, row in enumerate(rows) for _ in row]
    pairs.sort(key=lambda pair: (-pair[0], pair[1], pair[2]))
    if budget.kind != "top_p_head" and budget.kind != "top_p_heads":
        rows = sum(bool(row or must) for head, of in zip(heads, forced) for row, must in zip(head, of))
        pairs = (must + pairs)[: math.ceil(budget.value * rows * blocks - 1e-9)]
    else:
        pairs = must + pairs[: prefix([w for w, _, _ in pairs], budget.value)]
    kept = [[0] * len(head) for head in forced]
    for _, h, i in pairs:
        kept[h][i] += 1
    return kept


def by_recall(heads: list[list[Row]], blocks: int, value: float, forced: list[list[set[int]]]) -> list[int]:
    """Of each head how many blocks a row keeps, by AdaSpa's rule."""
    count = max(1, math.ceil(value * blocks - 1e-9))
    recalls = []
    for head, of in zip(heads, forced):
        rows = [(row, must) for row, must in zip(head, of) if row or must]
        found = [sum(sorted(row.values(), reverse=True)[: max(0, count - len(must))]) for row, must in rows]
        recalls.append(sum(found) / max(1, len(rows)))
    ranked = sorted(range(len(heads)), key=lambda h: -recalls[h])
    givers = min(sum(recall > 0.8 for recall in recalls), len(heads) // 2)
    factors = {h: 0.5 for h in ranked[:givers]} | {h: 1.5 for h in ranked[len(ranked) - givers :]}
    return [math.ceil(value * factors.get(h, 1.0) * blocks - 1e-9) for h in range(len(heads))]


def by_hand(scores: torch.Tensor, candidates: torch.Tensor, blocks: int, budget: Budget) -> list[list[set[int]]]:
    """Of the heads of one item, ``[H, N, N]``: the kept blocks of each row."""
    value, heads, kept = budget.value, [weights_of(s, c) for s, c in zip(scores, candidates)], []
    plain = [weights_of(s, c, plain=True) for s, c in zip(scores, candidates)]
    forced = [
        [{j for j in range(len(c)) if c[j] and s[j] == math.inf} for s, c in zip(*x)] for x in zip(scores, candidates)
    ]
    if budget.over_heads and budget.kind != "recall_heads":
        best = from_the_best(plain if budget.kind == "best_heads" else heads, forced, budget, blocks)
    else:
        best = [from_the_best([head], [must], budget, blocks)[0] for head, must in zip(heads, forced)]
    recalled = by_recall(heads, blocks, value, forced)
    for h, head in enumerate(heads):
        rows = []
        for i, row in enumerate(head):
            inside = [j for j in range(len(scores[h])) if candidates[h, i, j]]
            ranked = sorted(inside, key=lambda j: (-float(scores[h, i, j]), j))
            must = len(forced[h][i])
            wanted = {
                "density": math.ceil(value * blocks - 1e-9),
                "top_k": int(value),
                "top_p": prefix(list(row.values()), value) + must,
                "weight": sum(w >= value for w in row.values()) + must,
                "score": sum(float(scores[h, i, j]) >= value for j in inside),
                "recall_heads": recalled[h],
            }.get(budget.kind, best[h][i])
            low, high = (max(1, math.ceil(share * blocks - 1e-9)) for share in (budget.least, budget.most))
            rows.append(set(ranked[: min(max(wanted, low), high)]))
        kept.append(rows)
    return kept


@given(
    budget=BUDGET,
    n=st.integers(1, 9),
    heads=st.integers(1, 4),
    seed=st.integers(0, 2**16),
    spread=st.sampled_from([0.0, 1.0, 2.0]),
    forced=st.sampled_from([0.0, 0.1, 0.5]),
)
def test_every_budget_keeps_what_loops_keep(
    budget: Budget, n: int, heads: int, seed: int, spread: float, forced: float
) -> None:
    assume(spread or budget.kind != "recall_heads")  # heads that are alike have the same recall but for rounding
    generator = torch.Generator().manual_seed(seed)
    scores = spread * torch.randn(2, heads, n, n, generator=generator)
    candidates = torch.rand(1, heads, n, n, generator=generator) < 0.8
    scores = scores.masked_fill(torch.rand(2, heads, n, n, generator=generator) < forced, math.inf)
    blocks = torch.full((heads,), n)
    mask = keep(scores, candidates, blocks, budget)
    assert not (mask & ~candidates).any()
    assert (mask.any(3) == candidates.any(3).expand_as(mask[..., 0])).all()  # a row that may keep any keeps one
    for b in range(2):
        wanted = by_hand(scores[b].double(), candidates[0], n, budget)
        for h in range(heads):
            found = [set(row.nonzero().flatten().tolist()) for row in mask[b, h]]
            assert found == wanted[h], (budget, b, h)


@pytest.mark.parametrize("budget", [Budget("quantile_heads", 0.3), Budget("recall_heads", 0.3)], ids=str)
def test_heads_share_what_one_alone_would_not_need(budget: Budget) -> None:
    """A head whose weights stand out keeps fewer than one whose weights are alike; together they keep a share."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.1, 6, 0.1, 6, 6, 0.1])[:, None, None]
    scores = torch.randn(1, 6, 20, 20, generator=generator) * spread
    mask = keep(scores, torch.ones(1, 1, 20, 20, dtype=torch.bool), torch.full((6,), 20), budget)
    of_head = mask.float().mean((2, 3))[0]
    assert abs(float(mask.float().mean()) - 0.3) <= 0.01
    peaked, flat = of_head[[1, 3, 4]], of_head[[0, 2, 5]]
    assert float(peaked.max()) < float(flat.min())
    kept = (row_weights(scores, torch.ones(1, 1, 1, 1, dtype=torch.bool)) * mask).sum()
    alone = keep(scores, torch.ones(1, 1, 20, 20, dtype=torch.bool), torch.full((6,), 20), Budget("density", 0.3))
    assert kept > (row_weights(scores, torch.ones(1, 1, 1, 1, dtype=torch.bool)) * alone).sum()


@given(seed=st.integers(0, 2**16), groups=st.integers(1, 3), rows=st.integers(1, 9), n=st.integers(1, 12))
def test_the_largest_of_several_rows_are_those_of_a_sort(seed: int, groups: int, rows: int, n: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(2, groups, rows, n, generator=generator).mul(8).round().div(8)  # many are equal
    values = values.sub(0.3) * 10.0 ** -torch.randint(0, 40, values.shape, generator=generator)
    ordered = values.sort(dim=-1, descending=True).values
    wanted = torch.randint(1, rows * n + 1, (2, groups), generator=generator)
    found = count_largest(SortedRows(ordered), wanted)
    assert torch.equal(found.sum(2), wanted)
    for b in range(2):
        for g in range(groups):
            count = int(wanted[b, g])
            least = ordered[b, g].flatten().sort(descending=True).values[count - 1]
            assert (found[b, g] >= (ordered[b, g] > least).sum(1)).all()
            assert (found[b, g] <= (ordered[b, g] >= least).sum(1)).all()


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
