"""The online repair: its rows, its fit, and the operator with it against the reference."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffsparse.grid import TokenGrid
from diffsparse.kernels import reference_attention, sparse_attention
from diffsparse.kernels.break_even import work_of
from diffsparse.kernels.call import make_call
from diffsparse.kernels.operands import as_operands, from_operands
from diffsparse.kernels.ops import sparse_attention_op
from diffsparse.kernels.repair import exact_rows, mend_online_
from diffsparse.kernels.repair.online import ridge_map
from diffsparse.kernels.select import select_blocks
from diffsparse.layout import BlockLayout
from diffsparse.online import OnlineRepair
from diffsparse.work import head_work
from tests.kernels.cases import MIXED, head, inputs, random_layout
from tests.tolerance import ATTENTION, Work, assert_near

GRID = TokenGrid(2, 9, 15, text_before=5, text_after=20)
ROWS = OnlineRepair(64)


def repaired(rows: OnlineRepair = ROWS, grid: TokenGrid = GRID, seed: int = 0, entries: Any = MIXED) -> BlockLayout:
    return random_layout(grid, entries, 64, 0.4, seed).repaired(rows)


def visual(grid: TokenGrid = GRID) -> slice:
    return slice(grid.text_before, grid.text_before + grid.num_visual)


@pytest.mark.parametrize("grid", [GRID, TokenGrid(1, 3, 7), TokenGrid(1, 1, 1, text_after=9), TokenGrid(21, 45, 80)])
@pytest.mark.parametrize("rows", [16, 256, 1000])
def test_rows_are_spread_over_the_visual_tokens(grid: TokenGrid, rows: int) -> None:
    places = OnlineRepair(rows).places(grid.text_before, grid.num_visual) - grid.text_before
    count = min(rows, grid.num_visual)
    assert len(places) == count == OnlineRepair(rows).count(grid.num_visual)
    # One in each of as many equal parts, so that none comes twice.
    border = torch.arange(count + 1) * grid.num_visual // count
    assert bool((places >= border[:-1]).all()) and bool((places < border[1:]).all())


@pytest.mark.parametrize("width", [16, 20, 32, 40, 80])
def test_rows_meet_all_columns_of_a_grid(width: int) -> None:
    """Evenly spaced ones would meet four of 16 columns here."""
    grid = TokenGrid(5, 2 * width, width)
    places = OnlineRepair(256).places(0, grid.num_visual)
    found = torch.bincount(places % width, minlength=width)
    assert int(found.min()) > 0 and int(found.max()) <= 4 * 256 / width


@pytest.mark.parametrize("rows", [15, 4097, 2.0, True, "256", None])
def test_rows_that_cannot_be(rows: Any) -> None:
    with pytest.raises(ValueError, match=r"rows of an online repair must be an integer from 16 to 4,096, got "):
        OnlineRepair(rows)


@pytest.mark.parametrize(("rows", "dim"), [(16, 64), (64, 16), (256, 128), (300, 24), (16, 256)])
def test_the_fit_is_ridge_regression(rows: int, dim: int) -> None:
    x = torch.randn(2, 3, rows, dim) * torch.logspace(-3, 1, dim) + 5
    error = x @ torch.randn(2, 3, dim, dim) / dim + torch.randn(2, 3, rows, dim) - 2
    x[0, 1] = 0.0  # a head that is left out
    weight, bias = ridge_map(x, error)
    for b, h in ((0, 0), (1, 2), (0, 1)):
        # As a least-squares problem with rows for the ridge, the bias a column of its own: another way to the same.
        a = x[b, h].double()
        ridge = float((a - a.mean(0)).square().sum() / dim)
        top = torch.cat([a, torch.ones(rows, 1, dtype=a.dtype)], 1)
        foot = torch.cat([math.sqrt(ridge or 1.0) * torch.eye(dim, dtype=a.dtype), torch.zeros(dim, 1)], 1)
        right = torch.cat([error[b, h].double(), torch.zeros(dim, dim, dtype=a.dtype)])
        want = torch.linalg.lstsq(torch.cat([top, foot]), right, driver="gelsd").solution
        # The ridge bounds the condition number.
        assert_near(weight[b, h].double(), want[:-1], Work(rows, gain=dim + 1, dtype=torch.float32))
        scale = float(a.abs().max()) * dim**0.5
        assert_near(bias[b, h].double(), want[-1], Work(rows, gain=(dim + 1) * max(1.0, scale), dtype=torch.float32))
    assert not weight[0, 1].any()
    assert_near(bias[0, 1], error[0, 1].mean(0), Work(rows))


def test_the_fit_takes_values_of_any_size() -> None:
    x, error = torch.randn(2, 100, 32), torch.randn(2, 100, 32)
    want, _ = ridge_map(x, error)
    for size in (1e-12, 1e12):
        found, _ = ridge_map(size * x, size * error)
        assert_near(found, want, Work(100, gain=33))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_exact_rows(dtype: torch.dtype, masked: bool) -> None:
    q, k, v = inputs(GRID, 3, 24, batch=2, dtype=dtype)
    mask = None
    if masked:
        mask = torch.ones(2, GRID.seq_len, dtype=torch.bool)
        mask[0, -7:] = False
    rows = ROWS.places(GRID.text_before, GRID.num_visual)
    found = exact_rows(q, k, v, rows, 0.3, mask)
    wide = None if mask is None else mask[:, None, None]
    want = F.scaled_dot_product_attention(*(x.transpose(1, 2).double() for x in (q, k, v)), attn_mask=wide, scale=0.3)
    assert_near(found.double(), want.transpose(1, 2)[:, rows], Work(512, sums=2, dtype=dtype, gain=0.2))


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("grid", "rows"), [(GRID, ROWS), (TokenGrid(3, 7, 11), OnlineRepair(200)), (TokenGrid(1, 4, 5), ROWS)], ids=str
)
def test_backends_repair_alike(backend: str, grid: TokenGrid, rows: OnlineRepair) -> None:
    layout = repaired(rows, grid)
    q, k, v = inputs(grid, len(MIXED), 16, batch=2)
    kv_len = torch.tensor([grid.seq_len, grid.seq_len - grid.text_after // 2])
    out, lse = sparse_attention(q, k, v, layout, kv_len=kv_len, backend=backend, return_lse=True)
    want, want_lse = reference_attention(q, k, v, layout, kv_len=kv_len)
    # A fit magnifies what its inputs are off by, at most by the condition number.
    assert_near(out.double(), want, Work(512, sums=4, gain=17))
    assert_near(lse.double(), want_lse, ATTENTION)
    plain = replace(layout, heads=replace(layout.heads, repair=None))
    without = sparse_attention(q, k, v, plain, kv_len=kv_len, backend=backend)
    text = torch.ones(grid.seq_len, dtype=torch.bool)
    text[visual(grid)] = False
    assert torch.equal(out[:, text], without[:, text])
    # Rows that were attended exactly are exact, and the rest is nearer to dense than before.
    places = rows.places(grid.text_before, grid.num_visual)
    mask = (torch.arange(grid.seq_len) < kv_len[:, None])[:, None, None]
    dense = F.scaled_dot_product_attention(*(x.transpose(1, 2).double() for x in (q, k, v)), attn_mask=mask)
    dense = dense.transpose(1, 2)
    assert_near(out[:, places].double(), dense[:, places], ATTENTION)
    error, before = ((x[:, visual(grid)] - dense[:, visual(grid)]).square().mean() for x in (out, without))
    assert error < 0.9 * before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    layout = repaired()
    q, k, v = inputs(GRID, len(MIXED), 16, dtype=dtype)
    out = sparse_attention(q, k, v, layout, backend="cpu")
    want, _ = reference_attention(q, k, v, layout)
    assert out.dtype == dtype
    assert_near(out.double(), want, Work(512, sums=2, dtype=dtype))


def test_items_and_heads_do_not_depend_on_the_others() -> None:
    layout = repaired()
    q, k, v = inputs(GRID, len(MIXED), 16, batch=3)
    out = sparse_attention(q, k, v, layout)
    one = sparse_attention(*(x[1:2] for x in (q, k, v)), layout)
    assert_near(one, out[1:2], Work(512, sums=4, gain=17))
    part = sparse_attention(*(x[:, :, 2:5] for x in (q, k, v)), layout.of_heads(slice(2, 5)))
    assert_near(part, out[:, :, 2:5], Work(512, sums=4, gain=17))
    again = sparse_attention(q, k, v, layout)
    assert torch.equal(again, out)


def test_lists_of_each_item() -> None:
    q, k, v = inputs(GRID, len(MIXED), 16, batch=2)
    layout = select_blocks("pooled", q, k, repaired(), 0.3)
    assert layout.index.batch == 2 and layout.heads.repair == ROWS
    want, _ = reference_attention(q, k, v, layout)
    assert_near(sparse_attention(q, k, v, layout).double(), want, Work(512, sums=4, gain=17))


class OnOneDevice(TorchDispatchMode):
    """Nothing is made elsewhere, which would have to be copied to the device, and waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        assert all(x.device.type == "meta" for x in tree_leaves(out) if isinstance(x, torch.Tensor)), func
        return out


@pytest.mark.parametrize("masked", [False, True])
def test_it_reads_no_values_and_copies_none(masked: bool) -> None:
    """Tensors on ``meta`` stand for those on a GPU: whatever asks for a value of theirs fails."""
    q, k, v = (x.to("meta", torch.bfloat16) for x in inputs(GRID, len(MIXED), 16, batch=2))
    kv_len = torch.ones(2, GRID.seq_len, dtype=torch.bool, device="meta") if masked else None
    call = make_call(q, k, v, repaired().to("meta"), kv_len=kv_len)
    out = torch.empty_like(q)
    with OnOneDevice():
        assert mend_online_(out, call, ROWS) is out
    with OnOneDevice(), pytest.raises(AssertionError, match="arange"):
        ROWS.places(0, 100, "cpu")


def test_what_it_costs() -> None:
    plain, layout = random_layout(GRID, MIXED, 64, 0.4), repaired()
    share = 64 / GRID.seq_len
    assert layout.densities == pytest.approx([min(1.0, d + share) for d in plain.densities])
    for one, other in zip(work_of(layout), work_of(plain)):
        assert one == replace(other, density=min(1.0, other.density + share), extra=(64 + 128) / GRID.seq_len)
    for entry in MIXED:
        one, other = head_work(entry, GRID, 64, ROWS), head_work(entry, GRID, 64)
        assert one == replace(other, density=min(1.0, other.density + share), extra=(64 + 128) / GRID.seq_len)
    # No more rows than there are.
    small = TokenGrid(1, 4, 5, text_after=20)
    assert OnlineRepair(256).density(small) == 0.5


def test_operands_carry_it() -> None:
    layout = repaired()
    found = from_operands(*as_operands(layout))[2]
    assert (found.repair, found.numerics, found.tails) == (ROWS, layout.heads.numerics, layout.heads.tails)


def test_opcheck() -> None:
    q, k, v = inputs(GRID, len(MIXED), 16, batch=2)
    kv_len = torch.tensor([GRID.seq_len, GRID.seq_len - 3])
    arguments = (q, k, v, *as_operands(repaired()), kv_len, 0.1, True, "auto", "auto")
    torch.library.opcheck(sparse_attention_op, arguments)


def test_compiled_code_sees_one_operator() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(module: torch.fx.GraphModule, example: list[Any]) -> Any:
        graphs.append(module)
        return module.forward

    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Any) -> torch.Tensor:
        return sparse_attention(q * 2, k, v, layout) + 1

    torch._dynamo.reset()
    traced = torch.compile(layer, backend=backend, fullgraph=True)
    q, k, v = inputs(GRID, 2, 16)
    for seed in range(3):
        layout = repaired(seed=seed, entries=[head(), head(tail="mean")])
        assert torch.equal(traced(q, k, v, layout), layer(q, k, v, layout))
    assert len(graphs) <= 2  # one more when the number of kept blocks turned out to vary
    torch._dynamo.reset()
