"""Layouts whose blocks are picked from q and k: which they are, what they cost, and that no device is waited for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffsparse.entry import Execution, HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.heads import SKIP
from diffsparse.kernels import reference_attention, select_blocks, sparse_attention
from diffsparse.kernels.select import pick
from diffsparse.kernels.select.pick import pick_blocks
from diffsparse.layout import BlockLayout, build_layout
from diffsparse.order import AxisOrder, RasterOrder, TileOrder
from diffsparse.patterns import Full, Window
from diffsparse.selection import BUDGETS, RULES, Budget, OnlineSelection
from tests.kernels.cases import inputs
from tests.tolerance import ATTENTION, assert_near

GRIDS = (TokenGrid(3, 13, 11), TokenGrid(2, 9, 16, text_before=5, text_after=77))
ENTRIES = (
    HeadEntry(TileOrder(1, 8, 8), Full(), OnlineSelection("pooled", Budget("density", 0.3))),
    HeadEntry(RasterOrder(), Window((1, 0.5, 0.5)), OnlineSelection("pooled", Budget("top_k", 2))),
    HeadEntry(AxisOrder("HWF"), Window((1, 0.5, 0.5))),
    HeadEntry(TileOrder(1, 8, 8), Full(), OnlineSelection("pooled", Budget("density", 0.3))),
    HeadEntry(execution=Execution("skip"), selection=OnlineSelection("pooled")),
    HeadEntry(TileOrder(1, 8, 8), Full(), OnlineSelection("pooled", Budget("top_p", 0.7)), Execution(tail="mean")),
)


def by_hand(layout: BlockLayout, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    mask = layout.index.mask().repeat(q.shape[0], 1, 1, 1)
    for h, entry in enumerate(ENTRIES):
        if (rule := entry.online) is not None:
            mask[:, h] = select_blocks(rule.rule, q, k, layout, rule.budget, v=v, within=True).index.mask()[:, h]
    return mask


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("at_a_time", [1, 2**25])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_head_has_the_blocks_of_its_rule(
    grid: TokenGrid, at_a_time: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pick, "_AT_A_TIME", at_a_time)
    layout = build_layout(grid, ENTRIES, packed=packed)
    q, k, v = inputs(grid, len(ENTRIES), 16, batch=2)
    wanted = by_hand(layout, q, k, v)
    index, density = pick_blocks(layout, q, k, v)
    assert torch.equal(index.mask(), wanted) and index.batch == 2 and index.is_packed
    assert torch.equal(index.row_ptr.diff().view(2, len(ENTRIES), -1), wanted.sum(3))
    assert not (wanted & ~layout.index.mask()).any()  # within the family
    done = 0.0
    for h, entry in enumerate(ENTRIES):
        lengths = layout.tokens.lengths()[layout.tokens.head_order[h]].double()
        kept = float((lengths @ wanted[:, h].double() @ lengths).mean()) / grid.seq_len**2
        done += min(1.0, kept + (layout.num_blocks / grid.seq_len if entry.execution.tail == "mean" else 0.0))
    assert float(density) == pytest.approx(done / len(ENTRIES), abs=1e-6)
    assert float(density) <= layout.density + 1e-6
    # A call of such a layout runs those blocks, whoever makes it.
    final = replace(layout, index=index, heads=replace(layout.heads, picks=None))
    want = sparse_attention(q, k, v, final)
    assert torch.equal(sparse_attention(q, k, v, layout), want)
    assert_near(reference_attention(q, k, v, layout)[0].float(), want, ATTENTION)
    part = sparse_attention(*(x[:, :, 1:4] for x in (q, k, v)), layout.of_heads(slice(1, 4)))
    assert_near(part, want[:, :, 1:4], ATTENTION)
    assert not wanted[:, layout.heads.table[:, SKIP] != 0].any()


class OnOneDevice(TorchDispatchMode):
    """Nothing is made elsewhere, which would have to be copied to the device, and waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        assert all(x.device.type == "meta" for x in tree_leaves(out) if isinstance(x, torch.Tensor)), func
        return out


@pytest.mark.parametrize(("rule", "kind"), [*(("pooled", kind) for kind in BUDGETS), *((r, "top_p") for r in RULES)])
def test_no_value_is_read_and_none_is_copied(rule: str, kind: str) -> None:
    """Tensors on ``meta`` stand for those on a GPU: whatever asks for a value of theirs fails."""
    budget = Budget(kind, 3 if kind == "top_k" else 0.4)  # type: ignore[arg-type]
    entries = [replace(ENTRIES[1], selection=OnlineSelection(rule, budget)), *ENTRIES]
    layout = build_layout(GRIDS[1], entries, packed=True).to("meta")
    q, k, v = (x.to("meta", torch.bfloat16) for x in inputs(GRIDS[1], len(entries), 16, batch=2))
    with OnOneDevice():
        index, density = pick_blocks(layout, q, k, v)
    assert index.batch == 2 and density.shape == ()
