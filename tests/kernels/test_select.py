"""Rules that pick blocks from q and k: what they pick, and that every backend runs what they picked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from diffsparse.blocks import BlockIndex
from diffsparse.grid import TokenGrid
from diffsparse.heads import SKIP
from diffsparse.kernels import reference_attention, sparse_attention
from diffsparse.kernels.select import register_selector, select_blocks, selectors
from diffsparse.layout import build_layout
from diffsparse.order import AxisOrder, TileOrder
from tests.kernels.cases import MIXED, head, inputs
from tests.tolerance import ATTENTION, assert_near

GRIDS = (TokenGrid(3, 13, 11), TokenGrid(2, 16, 16), TokenGrid(2, 9, 16, text_before=5, text_after=77))


def pooled_by_hand(q: torch.Tensor, k: torch.Tensor, layout, h: int, budget: float) -> torch.Tensor:
    """The blocks of one head of one item that the rule keeps: plain loops over blocks."""
    tokens, order = layout.tokens, int(layout.tokens.head_order[h])
    border, gather = tokens.block_start[order].tolist(), tokens.gather[order].long()
    n = layout.num_blocks
    blocks = [gather[border[i] : border[i + 1]] for i in range(n)]
    first, end = tokens.text_before, tokens.text_before + tokens.num_visual
    visual = [j for j in range(n) if len(blocks[j]) and first <= border[j] < end]
    kept = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        if not len(blocks[i]):
            continue
        query = q[blocks[i], h].mean(0)
        scores = torch.tensor([float(query @ k[blocks[j], h].mean(0)) for j in visual])
        most = -(-int(1e9 * budget * len(visual)) // int(1e9))
        for j in scores.argsort(descending=True)[:most].tolist():
            kept[i, visual[j]] = True
        for j in range(n):
            if len(blocks[j]) and (i not in visual or j not in visual):
                kept[i, j] = True
    return kept


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("budget", [0.1, 0.5, 1.0])
def test_pooled_keeps_the_blocks_with_the_largest_mean_products(grid: TokenGrid, budget: float) -> None:
    torch.manual_seed(0)
    layout = build_layout(grid, [head(), head(TileOrder(1, 8, 8)), head(AxisOrder("HWF"), "mean")])
    q, k, _ = inputs(grid, 3, 16, batch=2)
    picked = select_blocks("pooled", q, k, layout, budget)
    assert picked.index.batch == 2 and picked.densities == ()
    mask = picked.index.mask()
    for b in range(2):
        for h in range(3):
            assert torch.equal(mask[b, h], pooled_by_hand(q[b], k[b], layout, h, budget)), (b, h)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_items_with_lists_of_their_own_are_attended_by_them(backend: str) -> None:
    torch.manual_seed(0)
    grid = GRIDS[2]
    layout = build_layout(grid, MIXED)
    q, k, v = inputs(grid, len(MIXED), 16, batch=2)
    picked = select_blocks("pooled", q, k, layout, 0.3)
    assert not picked.index.mask()[:, layout.heads.table[:, SKIP] != 0].any()
    want, want_lse = reference_attention(q, k, v, picked)
    for index in (picked.index, picked.index.unpacked(picked.tokens)):
        one = replace(picked, index=index)
        out, lse = sparse_attention(q, k, v, one, backend=backend, return_lse=True)
        assert_near(out.double(), want, ATTENTION)
        assert_near(lse.double(), want_lse, ATTENTION)
    for b in range(2):
        alone = replace(picked, index=picked.index.item(b))
        single = sparse_attention(*(x[b : b + 1] for x in (q, k, v)), alone, backend=backend)
        assert torch.equal(single[0], sparse_attention(q, k, v, picked, backend=backend)[b])


def test_heads_of_a_layout_give_the_same_heads_of_the_output() -> None:
    """What a GPU computes that has a part of the heads, lists and bits alike."""
    torch.manual_seed(0)
    grid = GRIDS[2]
    layout = build_layout(grid, MIXED)
    q, k, v = inputs(grid, len(MIXED), 16)
    for whole in (layout, select_blocks("pooled", q, k, layout, 0.4)):
        want = sparse_attention(q, k, v, whole)
        for part in (slice(0, 3), slice(3, 9)):
            mine = sparse_attention(q[:, :, part], k[:, :, part], v[:, :, part], whole.of_heads(part))
            assert_near(mine, want[:, :, part], ATTENTION)


def test_a_rule_of_the_users_own(no_more_rules: None) -> None:
    def everything(q, k, tokens, budget):  # type: ignore[no-untyped-def]
        n = tokens.num_blocks
        return BlockIndex.from_mask(torch.ones(tokens.num_heads, n, n, dtype=torch.bool, device=q.device), tokens)

    register_selector("everything", everything)
    assert {"pooled", "everything"} <= set(selectors())
    grid = GRIDS[0]
    layout = build_layout(grid, [head()] * 2)
    q, k, v = inputs(grid, 2, 16)
    picked = select_blocks("everything", q, k, layout, 0.5)
    dense = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    assert_near(sparse_attention(q, k, v, picked), dense, ATTENTION)


def test_what_does_not_fit_is_refused(no_more_rules: None) -> None:
    grid = GRIDS[0]
    layout = build_layout(grid, [head()] * 2)
    q, k, v = inputs(grid, 2, 16)
    with pytest.raises(ValueError, match="there is no selector 'poled'; there are pooled"):
        select_blocks("poled", q, k, layout, 0.5)
    for budget in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"a budget is a share of the key blocks in \(0, 1\]"):
            select_blocks("pooled", q, k, layout, budget)
    with pytest.raises(ValueError, match=r"\[batch, 429, 2, head_dim\] here, got \[1, 428, 2, 16\]"):
        select_blocks("pooled", q[:, 1:], k[:, 1:], layout, 0.5)
    with pytest.raises(ValueError, match="'pooled' already"):
        register_selector("pooled", lambda q, k, tokens, budget: layout.index)
    with pytest.raises(ValueError, match="identifier"):
        register_selector("no name", lambda q, k, tokens, budget: layout.index)
    register_selector("wrong", lambda q, k, tokens, budget: layout.index.heads([0]))
    with pytest.raises(ValueError, match="the selector 'wrong' gave an index of 7 blocks and 1 heads on cpu"):
        select_blocks("wrong", q, k, layout, 0.5)
    three = select_blocks("pooled", *(x.expand(3, -1, -1, -1) for x in (q, k)), layout, 0.5)
    with pytest.raises(ValueError, match="block lists for 3 items, q has a batch of 1"):
        sparse_attention(q, k, v, three)
