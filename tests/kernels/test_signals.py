"""Rules that score pairs of blocks, against their formulas in plain loops over blocks and tokens, in double."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from diffsparse.grid import TokenGrid
from diffsparse.kernels.select import blocked, rules, select_blocks, selectors
from diffsparse.layout import BlockLayout, build_layout
from diffsparse.order import AxisOrder, TileOrder
from diffsparse.selection import Budget, OnlineSelection
from tests.kernels.cases import head, inputs
from tests.tolerance import Work, assert_near

GRIDS = (TokenGrid(3, 7, 11), TokenGrid(1, 5, 6), TokenGrid(2, 9, 13, text_before=5, text_after=77))
ORDERS = (head(), head(TileOrder(1, 8, 8)), head(AxisOrder("HWF")))
SCALE = 0.3
#: Logits, their softmax over the keys, its sums, and a logarithm.
SCORES = Work(length=512, sums=4)

Blocks = list[torch.Tensor]  # of one head and item: the rows of each block, double [n, D]; none of an empty block


def cut(x: torch.Tensor, layout: BlockLayout, h: int) -> Blocks:
    """One item's rows ``[S, H, D]`` by the blocks of a head's order."""
    order = int(layout.tokens.head_order[h])
    border, gather = layout.tokens.block_start[order].tolist(), layout.tokens.gather[order].long()
    return [x[gather[a:b], h].double() for a, b in zip(border, border[1:])]


def evenly(block: torch.Tensor, count: int) -> torch.Tensor:
    """``count`` rows of a block, the middles of as many equal parts; all of a block that has no more."""
    n = len(block)
    if n <= count:
        return block
    return block[[math.floor((i + 0.5) * n / count) for i in range(count)]]


def softmax_mass(q: Blocks, k: Blocks, scale: float = SCALE) -> list[list[torch.Tensor]]:
    """For each query block and key block the weights of its rows, ``[queries, keys]``; the softmax is over all keys."""
    keys, sizes = torch.cat(k), [len(block) for block in k]
    return [list((scale * rows @ keys.T).softmax(1).split(sizes, 1)) for rows in q]


def pooled(q: Blocks, k: Blocks, i: int, j: int) -> float:
    return SCALE * float(q[i].mean(0) @ k[j].mean(0))


def pooled_max(q: Blocks, k: Blocks, i: int, j: int) -> float:
    mean = q[i].mean(0)
    return SCALE * sum(max(float(m * k[j][:, c].max()), float(m * k[j][:, c].min())) for c, m in enumerate(mean))


def sub_block(q: Blocks, k: Blocks, i: int, j: int, parts: int = 4) -> float:
    def means(block: torch.Tensor) -> list[torch.Tensor]:
        of = [math.floor(t * parts / len(block)) for t in range(len(block))]
        runs = [[t for t in range(len(block)) if of[t] == p] for p in range(parts)]
        return [block[run].mean(0) for run in runs if run]

    return math.log(sum(math.exp(SCALE * float(a @ b)) for a in means(q[i]) for b in means(k[j])))


def antidiagonal_mass(q: Blocks, k: Blocks, stride: int) -> list[list[float]]:
    """The logarithm of ``sum_r sum_c softmax(mean of antidiagonals)``, group by group, product by product."""

    def groups(block: torch.Tensor) -> list[torch.Tensor]:
        return list(block.split(stride))

    logits = []
    for query in q:
        for a in groups(query):
            row = []
            for key in k:
                for b in groups(key):
                    pairs = [(stride - 1 - t, t) for t in range(stride)]
                    row.append(sum(float(a[s] @ b[t]) for s, t in pairs if s < len(a) and t < len(b)) / stride)
            logits.append(row)
    weights = (SCALE * torch.tensor(logits, dtype=torch.float64)).softmax(1)
    sizes = [[len(groups(block)) for block in side] for side in (q, k)]
    rows = weights.split(sizes[0], 0)
    return [[float(part.sum().log()) for part in row.split(sizes[1], 1)] for row in rows]


def scores_by_hand(name: str, q: Blocks, k: Blocks, layout: BlockLayout, h: int) -> list[list[float]]:
    there = [n for n, block in enumerate(k) if len(block)]
    q, k = ([side[n] for n in there] for side in (q, k))
    n = len(there)
    each: dict[str, Callable[..., float]] = {"pooled": pooled, "pooled_max": pooled_max, "sub_block": sub_block}
    if name in each:
        return [[each[name](q, k, i, j) for j in range(n)] for i in range(n)]
    if name == "key_means":
        return [[float((SCALE * q[i] @ k[j].mean(0)).max()) for j in range(n)] for i in range(n)]
    if name == "antidiagonal":
        return antidiagonal_mass(q, k, 8)
    if name == "mass":
        return [[float(w.sum().log()) for w in row] for row in softmax_mass([evenly(b, 4) for b in q], k)]
    if name == "sampled_max":
        few = [[evenly(b, 16) for b in side] for side in (q, k)]
        return [[float(w.max().log()) for w in row] for row in softmax_mass(*few)]
    if name == "spread":
        visual = layout.tokens.visual_blocks(int(layout.tokens.head_order[h]))[there]
        means = torch.stack([b.mean(0) for b in k])
        centre, variance = means[visual].mean(0), means[visual].var(0, correction=0)
        queries = torch.stack([b.mean(0) for b in q])
        return ((queries @ (means - centre).T) / (queries.square() @ variance).sqrt()[:, None]).tolist()  # type: ignore
    assert name == "vertical_slash"
    first, count = layout.tokens.text_before, layout.tokens.num_visual
    rows = min(64, count)
    places = [first + math.floor((r + 0.5) * count / rows) for r in range(rows)]
    ends = torch.tensor([len(b) for b in q]).cumsum(0)
    own = [int((ends <= p).sum()) for p in places]
    mass = softmax_mass([torch.cat(q)[[p]] for p in places], k)
    share = [[float(w.sum()) for w in row] for row in mass]  # [R][n]
    column = [sum(row[j] for row in share) / rows for j in range(n)]
    lines: dict[int, list[float]] = {}
    for r, row in enumerate(share):
        for j, s in enumerate(row):
            lines.setdefault(j - own[r], []).append(s)
    slash = {d: sum(found) / len(found) for d, found in lines.items()}
    return [[math.log(column[j] + slash.get(j - i, 0.0)) for j in range(n)] for i in range(n)]


def test_every_rule_has_a_formula_here() -> None:
    layout = build_layout(GRIDS[1], ORDERS[:1])
    q, k, _ = inputs(GRIDS[1], 1, 8)
    for name in selectors():
        scores_by_hand(name, cut(q[0], layout, 0), cut(k[0], layout, 0), layout, 0)


@pytest.mark.parametrize("at_a_time", [1, 2**24])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", selectors())
def test_scores_are_those_of_the_formula(
    name: str, grid: TokenGrid, at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocked, "_AT_A_TIME", at_a_time)
    layout = build_layout(grid, ORDERS)
    q, k, _ = inputs(grid, 3, 8, batch=2)
    found = rules._SIGNALS[name](q, k, layout.tokens, SCALE, **OnlineSelection(name).values)
    assert found.shape == (2, 3, layout.num_blocks, layout.num_blocks) and found.dtype == torch.float32
    for b in range(2):
        for h in range(3):
            by_hand = torch.tensor(scores_by_hand(name, cut(q[b], layout, h), cut(k[b], layout, h), layout, h))
            n = len(by_hand)
            by_hand = by_hand.nan_to_num()  # a single block has no spread
            assert_near(found[b, h, :n, :n], by_hand.float(), SCORES)


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
    q, k, _ = inputs(grid, 3, 16)
    q, k = ((x * math.sqrt(spread)).to(dtype) for x in (q, k))
    scores = rules._SIGNALS[name](q, k, layout.tokens, 0.25, **OnlineSelection(name).values)
    order = layout.tokens.head_order.long()
    visual = torch.stack([layout.tokens.visual_blocks(o) for o in range(3)])[order]
    inside = visual[:, :, None] & visual[:, None, :]
    assert not scores[0][inside].isnan().any()
    for budget in (Budget("density", 0.4), Budget("top_p", 0.9), Budget("top_p_head", 0.9), Budget("quantile", 0.3)):
        mask = select_blocks(name, q, k, layout, budget, scale=0.25).index.mask()[0] & inside
        counts = mask.sum(2)[visual]
        assert (counts >= 1).all()
        if budget.kind == "density":
            wanted = (0.4 * visual.sum(1)).ceil().long()[:, None].expand_as(visual)[visual]
            assert torch.equal(counts, wanted)
