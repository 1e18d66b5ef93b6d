"""Rules that score pairs of blocks, against their formulas in plain loops over blocks and tokens, in double."""

from __future__ import annotations

import math

import pytest
import torch

from diffsparse.entry import HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.kernels.select import blocked, rules, select_blocks, selectors
from diffsparse.kernels.select.clusters import k_means
from diffsparse.layout import build_layout
from diffsparse.order import AxisOrder, TileOrder
from diffsparse.patterns import Window
from diffsparse.selection import Budget, OnlineSelection
from tests.kernels.by_formula import (
    SCALE,
    antidiagonal_mass,
    cut,
    evenly,
    is_visual,
    low_bit,
    scores_by_hand,
    softmax_mass,
    sub_block,
    tail_error,
    tree,
)
from tests.kernels.cases import head, inputs
from tests.tolerance import Work, assert_near

GRIDS = (TokenGrid(3, 7, 11), TokenGrid(1, 5, 6), TokenGrid(2, 9, 13, text_before=5, text_after=77))
ORDERS = (head(), head(TileOrder(1, 8, 8)), head(AxisOrder("HWF")))
#: Logits, their softmax over the keys, its sums, and a logarithm.
SCORES = Work(length=512, sums=4)

#: Rules that do not score text at all.
ONLY_VIDEO = ("proxy", "tree", "clusters", "spatial_temporal")


def test_every_rule_has_a_formula_here() -> None:
    layout = build_layout(GRIDS[1], ORDERS[:1])
    q, k, v = inputs(GRIDS[1], 1, 8)
    for name in selectors():
        scores_by_hand(name, (q[0], k[0], v[0]), layout, 0)


@pytest.mark.parametrize("at_a_time", [1, 2**24])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", selectors())
def test_scores_are_those_of_the_formula(
    name: str, grid: TokenGrid, at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocked, "_AT_A_TIME", at_a_time)
    layout = build_layout(grid, ORDERS)
    q, k, v = inputs(grid, 3, 8, batch=2)
    found = rules.rule_scores(name, q, k, v, layout.tokens, SCALE, OnlineSelection(name).values)
    assert found.shape == (2, 3, layout.num_blocks, layout.num_blocks) and found.dtype == torch.float32
    for b in range(2):
        for h in range(3):
            by_hand = torch.tensor(scores_by_hand(name, (q[b], k[b], v[b]), layout, h))
            n = len(by_hand)
            own = found[b, h, :n, :n]
            if name in ONLY_VIDEO:
                visual = torch.tensor([is_visual(layout, h, j) for j in range(n)])
                own, by_hand = own[visual][:, visual], by_hand[visual][:, visual]
            by_hand = by_hand.nan_to_num(posinf=math.inf, neginf=-math.inf)  # a single block has no spread
            assert_near(own, by_hand.float(), SCORES)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("antidiagonal", {"stride": 5}), ("antidiagonal", {"stride": 64}), ("mass", {"rows": 64}), ("mass", {"rows": 7}),
     ("sampled_max", {"samples": 64}), ("sub_block", {"parts": 1}), ("sub_block", {"parts": 7})],
)  # fmt: skip
def test_parameters(name: str, parameters: dict[str, int]) -> None:
    grid = GRIDS[2]
    layout = build_layout(grid, ORDERS)
    q, k, _ = inputs(grid, 3, 8)
    found = rules._SIGNALS[name](q, k, layout.tokens, SCALE, **parameters)
    (value,) = parameters.values()
    for h in range(3):
        queries, keys = ([block for block in cut(x[0], layout, h) if len(block)] for x in (q, k))
        n = len(queries)
        if name == "antidiagonal":
            wanted = antidiagonal_mass(queries, keys, value)
        elif name == "sub_block":
            wanted = [[sub_block(queries, keys, i, j, value) for j in range(n)] for i in range(n)]
        elif name == "mass":
            rows = [evenly(block, value) for block in queries]
            wanted = [[float(w.sum().log()) for w in row] for row in softmax_mass(rows, keys)]
        else:
            wanted = [[float(w.max().log()) for w in row] for row in softmax_mass(queries, keys)]
        assert_near(found[0, h, :n, :n], torch.tensor(wanted), SCORES)


def test_exact_mass_is_all_of_the_attention() -> None:
    """With every row the masses of a block's rows sum to its tokens, however keys are parted."""
    layout = build_layout(GRIDS[2], ORDERS)
    q, k, _ = inputs(GRIDS[2], 3, 8)
    mass = rules._SIGNALS["mass"](q, k, layout.tokens, SCALE, rows=64).exp().sum(3)
    wanted = layout.tokens.lengths()[layout.tokens.head_order.long()].float()
    assert_near(mass[0], wanted, SCORES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [0.0, 4.0, 40.0, 120.0])
@pytest.mark.parametrize("name", selectors())
def test_logits_as_large_as_those_of_trained_models(name: str, spread: float, dtype: torch.dtype) -> None:
    """``spread``: the standard deviation of the logits. No score is NaN, every row keeps what its budget says."""
    grid = GRIDS[2]
    layout = build_layout(grid, ORDERS)
    q, k, v = inputs(grid, 3, 16)
    q, k, v = ((x * math.sqrt(spread)).to(dtype) for x in (q, k, v))
    scores = rules.rule_scores(name, q, k, v, layout.tokens, 0.25, OnlineSelection(name).values)
    order = layout.tokens.head_order.long()
    visual = torch.stack([layout.tokens.visual_blocks(o) for o in range(3)])[order]
    inside = visual[:, :, None] & visual[:, None, :]
    assert not scores[0][inside].isnan().any()
    for budget in (Budget("density", 0.4), Budget("top_p", 0.9), Budget("top_p_head", 0.9), Budget("quantile", 0.3)):
        mask = select_blocks(name, q, k, layout, budget, v=v, scale=0.25).index.mask()[0] & inside
        counts = mask.sum(2)[visual]
        assert (counts >= 1).all()
        if budget.kind == "density":
            wanted = (0.4 * visual.sum(1)).ceil().long()[:, None].expand_as(visual)[visual]
            assert torch.equal(counts, wanted)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("tail_error", {"parts": 5}), ("tail_error", {"parts": 64}), ("tree", {"share": 0.3}), ("tree", {"share": 0.04}),
     ("tree", {"share": 0.1, "samples": 64}), ("low_bit", {"samples": 3})],
)  # fmt: skip
def test_parameters_of_rules_that_look_further(name: str, parameters: dict[str, float]) -> None:
    grid = TokenGrid(2, 17, 35, text_before=5)
    layout = build_layout(grid, ORDERS)
    q, k, v = inputs(grid, 3, 8)
    found = rules.rule_scores(name, q, k, v, layout.tokens, SCALE, parameters)
    for h in range(3):
        queries, keys, values = ([block for block in cut(x[0], layout, h) if len(block)] for x in (q, k, v))
        n = len(queries)
        visual = torch.tensor([is_visual(layout, h, j) for j in range(n)])
        if name == "tail_error":
            wanted = tail_error(queries, keys, values, parameters["parts"])
        elif name == "tree":
            wanted = tree(queries, keys, layout, h, **parameters)
        else:
            wanted = low_bit(queries, keys, layout.tokens.text_blocks[0], **parameters)
        own, by_hand = (x[visual][:, visual] for x in (found[0, h, :n, :n], torch.tensor(wanted)))
        assert_near(own, by_hand, SCORES)


@pytest.mark.parametrize(
    ("name", "parameters"), [("key_means", {"beside": 2}), ("spread", {"beside": 1}), ("spread", {"first": 2})]
)
def test_blocks_that_are_kept_for_where_they_are(name: str, parameters: dict[str, int]) -> None:
    grid = GRIDS[2]
    layout = build_layout(grid, ORDERS)
    q, k, v = inputs(grid, 3, 8)
    plain, found = (rules.rule_scores(name, q, k, v, layout.tokens, SCALE, p) for p in ({}, parameters))
    begin = layout.tokens.text_blocks[0]
    for i in range(layout.num_blocks):
        for j in range(layout.num_blocks):
            kept = abs(i - j) < parameters.get("beside", 0) or begin <= j < begin + parameters.get("first", 0)
            wanted = torch.full((3,), math.inf) if kept else plain[0, :, i, j]
            assert torch.equal(found[0, :, i, j], wanted), (i, j)


def test_k_means_is_lloyds_algorithm() -> None:
    rows = torch.randn(2, 3, 40, 5)
    there = torch.rand(3, 40) < 0.8
    start = torch.cat([rows[:, :, :4], torch.full((2, 3, 1, 5), 99.0)], dim=2)  # no row is near the last centre
    which, centres = k_means(rows, there, start, 3)
    for b in range(2):
        for h in range(3):
            mine, at = rows[b, h].double(), start[b, h].double()
            real = there[h].nonzero().flatten().tolist()
            for _ in range(3):
                found = dict(zip(real, torch.cdist(mine[real], at).argmin(1).tolist()))
                at = torch.stack(
                    [
                        mine[[i for i in real if found[i] == c]].mean(0) if c in found.values() else at[c]
                        for c in range(5)
                    ]
                )
            assert_near(centres[b, h].double(), at, Work(length=40, sums=3))
            assert torch.equal(centres[b, h, 4], start[b, h, 4])
            assert not which[b, h, ~there[h]].any()
            assert torch.equal(which[b, h, real].argmax(1), torch.cdist(mine[real], at).argmin(1))
            assert torch.equal(which[b, h, real].sum(1), torch.ones(len(real)))


@pytest.mark.parametrize("order", range(3))
@pytest.mark.parametrize("name", selectors())
def test_heads_with_one_order_are_scored_as_beside_others(name: str, order: int) -> None:
    grid = GRIDS[0]
    q, k, v = inputs(grid, 4, 8, batch=2)
    one, mixed = (build_layout(grid, [ORDERS[order]] * 3 + rest) for rest in ([], [ORDERS[(order + 1) % 3]]))
    values = OnlineSelection(name).values | ({"together": 3} if name == "proxy" else {})
    few = [x[:, :, :3] for x in (q, k, v)]
    alone = rules.rule_scores(name, *few, one.tokens, SCALE, values)
    n = one.num_blocks
    found = rules.rule_scores(name, q, k, v, mixed.tokens, SCALE, values)[:, :3, :n, :n]
    assert_near(found, alone, SCORES)


@pytest.mark.parametrize("name", selectors())
def test_half_precision_picks_nearly_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where products are taken in the precision of q and k."""
    grid = GRIDS[2]
    layout = build_layout(grid, [*ORDERS, ORDERS[1]])
    q, k, v = (2 * x.bfloat16() for x in inputs(grid, 4, 16))
    budget, parameters = Budget("density", 0.4), {"similarity": -1.0} if name == "self_similar" else {}
    wanted = select_blocks(name, q, k, layout, budget, v=v, **parameters).index.mask()
    monkeypatch.setattr(blocked, "precision", lambda x: x.dtype)
    found = select_blocks(name, q, k, layout, budget, v=v, **parameters).index.mask()
    assert torch.equal(found.sum(3), wanted.sum(3))
    assert (found & wanted).sum() >= 0.9 * wanted.sum()


@pytest.mark.parametrize("budget", [Budget("density", 0.3), Budget("top_p", 0.5, most=0.4), Budget("best_heads", 0.2)])
@pytest.mark.parametrize("name", selectors())
def test_rules_keep_to_the_family_and_to_the_budget(name: str, budget: Budget) -> None:
    grid = GRIDS[2]
    entries = [HeadEntry(order.order, Window((1, 0.6, 0.6))) for order in ORDERS]
    layout = build_layout(grid, entries)
    q, k, v = inputs(grid, 3, 16, batch=2)
    family = layout.index.mask()
    mask = select_blocks(name, q, k, layout, budget, v=v, within=True).index.mask()
    assert not (mask & ~family).any()
    order = layout.tokens.head_order.long()
    visual = torch.stack([layout.tokens.visual_blocks(o) for o in range(3)])[order]
    inside = visual[:, :, None] & visual[:, None, :]
    counts, may = (mask & inside).sum(3), (family & inside).sum(3)
    assert (counts[may.expand_as(counts) > 0] >= 1).all()
    if budget.kind == "best_heads":
        assert counts.sum((1, 2)).max() <= (0.2 * visual.sum(1).square()).sum() + visual.sum() + 1
    else:
        share = budget.value if budget.kind == "density" else budget.most
        assert (counts <= (share * visual.sum(1)).ceil().long()[:, None]).all()
