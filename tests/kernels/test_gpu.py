"""The GPU backends on a real GPU."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffsparse.entry import NUMERICS
from diffsparse.grid import TokenGrid
from diffsparse.kernels import reference_attention, sparse_attention
from diffsparse.kernels.call import make_call
from diffsparse.kernels.repair import mend_, no_fused_pass
from diffsparse.kernels.select import pick_blocks, select_blocks, selectors
from diffsparse.kernels.summaries import summarize, summarize_halves
from diffsparse.layout import build_layout
from diffsparse.online import OnlineRepair
from diffsparse.order import TileOrder
from diffsparse.selection import Budget, OnlineSelection
from tests.kernels import ranked, rows
from tests.kernels.cases import MIXED, assert_like_torch, head, inputs, one_key_layout, random_layout, with_wide_queries
from tests.kernels.mend import SHAPES, Shape, check, maps, maps_of, output
from tests.tolerance import Work, assert_near

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison_empty", "two_passes")]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GRIDS = (
    TokenGrid(3, 13, 11),
    TokenGrid(2, 16, 16),
    TokenGrid(2, 9, 16, text_before=5, text_after=77),
    TokenGrid(1, 16, 24, text_after=128),
)

#: Enough programs for each of them to take several tiles.
LARGE = Shape(128, before=7, visual=6500, after=3, batch=2, heads=20)

HOPPER = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
BACKENDS = ("triton", pytest.param("gluon_sm90", marks=HOPPER))


@pytest.fixture
def two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the Hopper kernel in bf16, however small a call is."""
    from diffsparse.kernels.backends.gluon_sm90 import host

    monkeypatch.setattr(host, "TWO_PASSES", 0)


def names(values: object) -> str:
    return str(values).removeprefix("torch.")


def fits(backend: str, dtype: torch.dtype, dim: int = 64) -> None:
    if backend == "gluon_sm90" and (dtype == torch.float32 or not 64 <= dim <= 128):
        pytest.skip("gluon_sm90 takes fp16 and bf16 with head_dim 64 to 128")


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("grid", GRIDS, ids=names)
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_is_within_twice_torchs(grid: TokenGrid, block_size: int, dtype: torch.dtype, backend: str) -> None:
    fits(backend, dtype)
    layout = random_layout(grid, MIXED, block_size, 0.3, diagonal=True)
    q, k, v = inputs(grid, len(MIXED), 64, batch=2, dtype=dtype, device="cuda")
    lengths = [grid.seq_len, grid.seq_len - grid.text_after]
    kv_len = torch.tensor(lengths, dtype=torch.int32, device="cuda") if grid.text_after else None
    out, lse = sparse_attention(q, k, v, layout.to("cuda"), kv_len=kv_len, backend=backend, return_lse=True)
    assert_like_torch(out, lse, q, k, v, layout.to("cuda"), kv_len)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("dim", [16, 32, 64, 72, 80, 88, 96, 128, 160, 256])
@pytest.mark.parametrize("backend", BACKENDS)
def test_head_dims(dim: int, dtype: torch.dtype, backend: str) -> None:
    fits(backend, dtype, dim)
    grid = TokenGrid(2, 12, 20, text_after=33)
    entries = [head(), head(tail="moments"), head(TileOrder(1, 8, 8), "moments")]
    for block_size in (64, 128):
        layout = random_layout(grid, entries, block_size, 0.4, diagonal=True).to("cuda")
        q, k, v = inputs(grid, len(entries), dim, dtype=dtype, device="cuda")
        out, lse = sparse_attention(q, k, v, layout, backend=backend, return_lse=True)
        assert_like_torch(out, lse, q, k, v, layout)


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_any_width(dim: int, block_size: int, backend: str) -> None:
    """Tiles whose exponentials go out of range, tiles in which they do not, and a head all of whose do."""
    grid = TokenGrid(4, 22, 26, text_after=140)
    entries = [head(), head(TileOrder(1, 8, 8)), head(tail="mean")]
    layout = random_layout(grid, entries, block_size, 0.4, diagonal=True).to("cuda")
    q, k, v = inputs(grid, len(entries), dim, batch=2, dtype=torch.bfloat16, device="cuda")
    q = with_wide_queries(q)
    q[1, :, 0] *= 100
    kv_len = torch.tensor([grid.seq_len, grid.seq_len - 100], dtype=torch.int32, device="cuda")
    first = sparse_attention(q, k, v, layout, kv_len=kv_len, backend=backend, return_lse=True)
    for _ in range(50):
        out, lse = sparse_attention(q, k, v, layout, kv_len=kv_len, backend=backend, return_lse=True)
        assert torch.equal(out, first[0]) and torch.equal(lse, first[1])
    want, want_lse = reference_attention(q, k, v, layout, kv_len=kv_len)
    assert float(want_lse.abs().max()) > 200
    # Wide queries take the rounding of summaries with them.
    assert bool(out.isfinite().all()) and bool(lse.isfinite().all())
    out, want = out[:, :, :2].double(), want[:, :, :2]
    assert float((out - want).norm() / want.norm()) < 6e-3
    torch.testing.assert_close(lse[:, :, :2].double(), want_lse[:, :, :2], atol=1e-2, rtol=1e-3)


@HOPPER
@pytest.mark.parametrize("block_size", [64, 128])
def test_one_pass_or_two(block_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffsparse.kernels.backends.gluon_sm90 import host

    grid = TokenGrid(3, 13, 11, text_after=20)
    layout = random_layout(grid, MIXED, block_size, 0.4, diagonal=True).to("cuda")
    q, k, v = inputs(grid, len(MIXED), 128, dtype=torch.bfloat16, device="cuda")
    found = []
    for least in (0, 1 << 62):
        monkeypatch.setattr(host, "TWO_PASSES", least)
        found.append(sparse_attention(q, k, v, layout, backend="gluon_sm90", return_lse=True))
        assert_like_torch(*found[-1], q, k, v, layout)
    assert not torch.equal(found[0][0], found[1][0])


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_key(block_size: int, backend: str) -> None:
    """Where one key is all there is, its value comes out, however probabilities are rounded."""
    grid = TokenGrid(4, 11, 13, text_after=140)
    layout = one_key_layout(grid, 2, block_size).to("cuda")
    q, k, v = inputs(grid, 2, 64, dtype=torch.bfloat16, device="cuda")
    q[:, ::7] *= 100
    kv_len = torch.tensor([grid.num_visual + 1], dtype=torch.int32, device="cuda")
    out, lse = sparse_attention(q, k, v, layout, kv_len=kv_len, backend=backend, return_lse=True)
    q, out, lse = (x[:, : grid.num_visual] for x in (q, out, lse))
    assert torch.equal(out, v[:, grid.num_visual, None].expand_as(out))
    want = torch.einsum("bshd,bhd->bsh", q.double(), k[:, grid.num_visual].double()) / 8
    torch.testing.assert_close(lse.double(), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_and_full_lists(density: float, backend: str) -> None:
    grid = TokenGrid(2, 13, 17)
    layout = random_layout(grid, MIXED, 64, density).to("cuda")
    dtype, tolerance = (torch.float32, 1e-5) if backend == "triton" else (torch.bfloat16, 2e-2)
    q, k, v = inputs(grid, len(MIXED), 128, dtype=dtype, device="cuda")
    out, lse = sparse_attention(q, k, v, layout, backend=backend, return_lse=True)
    want, want_lse = sparse_attention(q, k, v, layout, backend="reference", return_lse=True)
    torch.testing.assert_close(out, want, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, want_lse, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_as_models_have_them(backend: str) -> None:
    """One fused projection, heads before tokens, and slices: each with and without tensor descriptors' alignment."""
    grid = TokenGrid(2, 16, 16)
    layout = random_layout(grid, MIXED, 64, 0.3, diagonal=True).to("cuda")
    heads, dim, seq = len(MIXED), 64, grid.seq_len
    fused = torch.randn(2, seq, 3, heads, dim, device="cuda", dtype=torch.bfloat16)
    swapped = torch.randn(3, 2, heads, seq, dim, device="cuda", dtype=torch.bfloat16).transpose(2, 3)
    odd = torch.randn(3, 2, seq, heads * dim + 4, device="cuda", dtype=torch.bfloat16)[..., 1 : 1 + heads * dim]
    for q, k, v in (fused.unbind(2), swapped.unbind(0), odd.unflatten(-1, (heads, dim)).unbind(0)):
        out = sparse_attention(q, k, v, layout, backend=backend)
        want = sparse_attention(q.contiguous(), k.contiguous(), v.contiguous(), layout, backend=backend)
        torch.testing.assert_close(out, want, atol=1e-2, rtol=1e-2)


def test_tiles_fed_by_descriptors_and_by_pointers_agree() -> None:

    from diffsparse.kernels.backends.triton.host import _device_limits, choose_config, launch

    grid = TokenGrid(3, 16, 16, text_after=50)
    layout = random_layout(grid, MIXED, 128, 0.3, diagonal=True).to("cuda")
    q, k, v = inputs(grid, len(MIXED), 128, batch=2, dtype=torch.bfloat16, device="cuda")
    config = choose_config(128, 128, q.dtype, True, *_device_limits(q.device), partial=True)
    call = make_call(q, k, v, layout, return_lse=True)
    out, lse = launch(call, replace(config, tma=True) if torch.cuda.get_device_capability() >= (9, 0) else config)
    other, other_lse = launch(call, replace(config, tma=False))
    torch.testing.assert_close(out, other, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(lse, other_lse, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_are_bitwise_equal_and_items_independent(backend: str) -> None:
    grid = TokenGrid(4, 24, 30, text_before=3, text_after=70)
    layout = random_layout(grid, MIXED, 64, 0.3).to("cuda")
    q, k, v = inputs(grid, len(MIXED), 128, batch=3, dtype=torch.bfloat16, device="cuda")
    first = sparse_attention(q, k, v, layout, backend=backend, return_lse=True)
    for _ in range(1000):
        again = sparse_attention(q, k, v, layout, backend=backend, return_lse=True)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    for b in range(3):
        alone = sparse_attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], layout, backend=backend)
        assert torch.equal(alone[0], first[0][b])


def test_summaries_and_bits() -> None:
    from diffsparse.kernels.backends.triton.prepare import kept_bits, summaries

    grid = TokenGrid(3, 16, 16)
    entries = [head(tail="moments")] * 2
    layout = random_layout(grid, entries, 64, 0.4)
    q, k, v = inputs(grid, 2, 88, device="cuda")
    call = make_call(q, k, v, layout.to("cuda"))
    got = summaries(call)
    n = layout.num_blocks
    length = torch.full((n,), 64, device="cuda")
    for h in range(2):
        want = summarize(k[0, :, h].reshape(n, 64, 88), v[0, :, h].reshape(n, 64, 88), length, moments=True)
        for x, y in zip(got, want):
            assert y is not None
            got_one = x[0, h, 0] if x.ndim == 5 else x[0, h]
            torch.testing.assert_close(got_one, y, atol=1e-5, rtol=1e-5)
    halved = random_layout(grid, [head(tail="centroids")] * 2, 64, 0.4)
    got = summaries(make_call(q, k, v, halved.to("cuda")))
    for h in range(2):
        blocks = (x[0, :, h].reshape(n, 64, 88) for x in (k, v))
        for x, y in zip(got, summarize_halves(*blocks, length)):
            torch.testing.assert_close(x[0, h], y, atol=1e-5, rtol=1e-5)
    words = kept_bits(call).cpu().view(2, n, -1)
    j = torch.arange(n)
    for h in range(2):
        assert torch.equal((words[h][:, j // 32] >> (j % 32)) & 1 == 1, layout.mask(h))


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_2_to_the_31_elements(backend: str) -> None:
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB of GPU memory")
    grid, heads, dim, block = TokenGrid(64, 32, 64), 130, 128, 128
    n = grid.seq_len // block
    near = np.abs(np.subtract.outer(np.arange(n), np.arange(n))) <= 1
    q, k, v = (
        torch.randn(1, 512, heads, dim, device="cuda", dtype=torch.bfloat16).repeat(1, grid.seq_len // 512, 1, 1)
        for _ in range(3)
    )
    assert q.numel() > 2**31
    for entry in (head(), head(TileOrder(1, 8, 16))):
        # One head in another order is enough to send all of them through gathers.
        layout = build_layout(grid, [entry] * heads, block, masks=[near] * heads)
        out = sparse_attention(q, k, v, layout.to("cuda"), backend=backend)
        # The last block of the last head, worked out apart.
        gather = layout.tokens.gather[0].long()
        rows, cols = gather[-block:].cuda(), gather[-2 * block :].cuda()
        for h in (0, heads - 1):
            want = F.scaled_dot_product_attention(q[:, rows, h].float(), k[:, cols, h].float(), v[:, cols, h].float())
            torch.testing.assert_close(out[:, rows, h].float(), want, atol=1e-2, rtol=1e-2)
        del out


@pytest.mark.parametrize("backend", BACKENDS)
def test_poison_in_dropped_keys_stays_out(backend: str) -> None:
    """What a row does not keep it does not read, short blocks' neighbours included."""
    grid = TokenGrid(1, 8, 24, text_after=40)  # 192 visual tokens, then a short block of text
    n = 4
    mask = np.eye(n, dtype=bool)
    layout = build_layout(grid, [head()], 64, masks=[mask]).to("cuda")
    q, k, v = inputs(grid, 1, 64, device="cuda", dtype=torch.bfloat16)
    want = sparse_attention(q, k, v, layout, backend=backend)
    k, v = k.clone(), v.clone()
    k[:, 64:128] = float("nan")
    v[:, 64:128] = float("nan")
    out = sparse_attention(q, k, v, layout, backend=backend)
    assert torch.equal(out[:, :64], want[:, :64]) and torch.equal(out[:, 128:192], want[:, 128:192])


@HOPPER
@pytest.mark.parametrize("numerics", ["int8", "fp8"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("block_size", [64, 128])
def test_eight_bits(block_size: int, dim: int, numerics: str) -> None:
    """Against exact attention within what 8 bits allow."""
    grid = TokenGrid(3, 13, 17, text_before=5, text_after=77)
    entries = [head(), head(TileOrder(1, 8, 8)), head(mode="skip")]
    layout = random_layout(grid, entries, block_size, 0.5, diagonal=True).to("cuda")
    q, k, v = inputs(grid, len(entries), dim, batch=2, dtype=torch.bfloat16, device="cuda")
    k, v = k + 3 * torch.randn(dim, device="cuda").to(k), v + 1
    call = dict(numerics=numerics, backend="gluon_sm90", return_lse=True)
    out, lse = sparse_attention(q, k, v, layout, **call)
    want, want_lse = sparse_attention(q.float(), k.float(), v.float(), layout, backend="reference", return_lse=True)
    assert float((out - want).norm() / want.norm()) < 4e-2
    live = ~want_lse.isneginf()
    assert float((lse - want_lse)[live].abs().max()) < 0.5
    again, _ = sparse_attention(q, k, v, layout, **call)
    assert torch.equal(out, again)


@HOPPER
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("block_size", [64, 128])
def test_heads_of_a_plan_in_8_bits(block_size: int, dim: int) -> None:
    """Heads in 16 bits as in a call without others, bit for bit; those in 8 within what 8 bits allow; tails too."""
    grid = TokenGrid(3, 13, 17, text_before=5, text_after=77)
    orders = [None, TileOrder(1, 8, 8)]
    entries = [head(o, t, numerics=n) for o in orders for t in ("none", "mean", "centroids") for n in NUMERICS]
    entries += [head(tail="moments"), head(mode="skip")]
    plain = [replace(e, execution=replace(e.execution, numerics="auto")) for e in entries]
    layout, without = (random_layout(grid, e, block_size, 0.5, diagonal=True).to("cuda") for e in (entries, plain))
    q, k, v = inputs(grid, len(entries), dim, batch=2, dtype=torch.bfloat16, device="cuda")
    k, v = k + 3 * torch.randn(dim, device="cuda").to(k), v + 1
    k[..., 3::16] *= 4
    out, lse = sparse_attention(q, k, v, layout, backend="gluon_sm90", return_lse=True)
    want, want_lse = sparse_attention(q, k, v, without, backend="gluon_sm90", return_lse=True)
    for h, entry in enumerate(entries):
        if (kind := entry.execution.numerics) == "auto":
            assert torch.equal(out[:, :, h], want[:, :, h]) and torch.equal(lse[:, :, h], want_lse[:, :, h])
            continue
        error = (out[:, :, h] - want[:, :, h]).float().norm() / want[:, :, h].float().norm()
        assert float(error) < (1e-2 if kind == "int8" else 2e-2), (h, str(entry), float(error))
        assert float((lse - want_lse)[:, :, h].abs().max()) < (0.1 if kind == "int8" else 0.5)
    again, _ = sparse_attention(q, k, v, layout, backend="gluon_sm90", return_lse=True)
    assert torch.equal(out, again)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block_size", [64, 128])
def test_packed_layouts_give_the_same(block_size: int, backend: str) -> None:
    grid = TokenGrid(3, 13, 21, text_before=5, text_after=77)
    lists, packed = (random_layout(grid, MIXED, block_size, 0.3, packed=p).to("cuda") for p in (False, True))
    q, k, v = inputs(grid, len(MIXED), 64, batch=2, dtype=torch.bfloat16, device="cuda")
    want = sparse_attention(q, k, v, lists, backend=backend, return_lse=True)
    for _ in range(2):  # with and without what is kept of a layout
        found = sparse_attention(q, k, v, packed, backend=backend, return_lse=True)
        assert torch.equal(found[0], want[0])
        assert torch.equal(found[1], want[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_call_can_be_captured_in_a_graph(packed: bool, backend: str) -> None:
    grid = TokenGrid(3, 13, 21, text_after=77)
    layout = random_layout(grid, MIXED, 128, 0.3, packed=packed).to("cuda")
    q, k, v = inputs(grid, len(MIXED), 128, dtype=torch.bfloat16, device="cuda")
    other = [x.clone() for x in inputs(grid, len(MIXED), 128, dtype=torch.bfloat16, device="cuda")]
    want = [sparse_attention(*x, layout, backend=backend).clone() for x in ((q, k, v), other)]
    assert not torch.equal(*want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # an answer that the host waits for would make this fail
        out = sparse_attention(q, k, v, layout, backend=backend)
    for wanted, new in ((want[0], (q.clone(), k.clone(), v.clone())), (want[1], other)):
        for x, y in zip((q, k, v), new):
            x.copy_(y)
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rule_that_reads_q_and_k_never_waits_for_the_gpu(backend: str) -> None:
    """Blocks picked on the device reach the kernel without a copy to the host."""
    grid = TokenGrid(2, 16, 24, text_after=70)
    layout = build_layout(grid, MIXED).to("cuda")
    q, k, v = inputs(grid, len(MIXED), 64, batch=2, dtype=torch.bfloat16, device="cuda")
    sparse_attention(q, k, v, select_blocks("pooled", q, k, layout, 0.3), backend=backend)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        picked = select_blocks("pooled", q, k, layout, 0.3)
        out, lse = sparse_attention(q, k, v, picked, backend=backend, return_lse=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want, want_lse = reference_attention(q, k, v, picked)
    assert float((out.double() - want).norm() / want.norm()) < 8e-3
    finite = want_lse.isfinite()
    assert torch.equal(lse.isfinite(), finite)
    assert float((lse.double() - want_lse)[finite].abs().max()) < 2e-2
    assert picked.index.batch == 2 and not torch.equal(picked.index.mask()[0], picked.index.mask()[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", selectors())
def test_picked_blocks_never_wait_for_the_gpu_and_are_those_of_the_cpu(backend: str, rule: str) -> None:
    grid = TokenGrid(2, 16, 24, text_before=5, text_after=70)
    selection = OnlineSelection(rule, Budget("top_p", 0.6, most=0.5))
    layout = build_layout(grid, [replace(entry, selection=selection) for entry in MIXED], packed=True)
    there = layout.to("cuda")
    q, k, v = inputs(grid, len(MIXED), 64, batch=2, dtype=torch.bfloat16, device="cuda")
    sparse_attention(q, k, v, there, backend=backend)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = sparse_attention(q, k, v, there, backend=backend)
        index, density = pick_blocks(there, q, k, v)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # Sums in another order may let nearly equal scores change places. A product in 16 bits may also turn a choice that
    # much hangs on: a token's cluster, a head's mask, the largest of many products. Those rules are compared in fp32.
    in_full = [x.float() for x in (q, k, v)]
    compared = [(in_full, pick_blocks(there, *in_full))]
    if rule not in ("clusters", "spatial_temporal", "low_bit"):
        compared.append(([q, k, v], (index, density)))
    for tensors, (found, share) in compared:
        on_cpu, cpu_density = pick_blocks(layout, *(x.cpu() for x in tensors))
        differ = (found.mask().cpu() != on_cpu.mask()).float().mean()
        assert float(differ) < 5e-3 and float(share) == pytest.approx(float(cpu_density), abs=5e-3)
    picked = replace(there, index=index, heads=replace(there.heads, picks=None))
    want, _ = reference_attention(q, k, v, picked)
    assert float((out.double() - want).norm() / want.norm()) < 8e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_part_of_the_heads_is_a_part_of_the_output(backend: str) -> None:
    grid = TokenGrid(2, 16, 24, text_after=70)
    layout = random_layout(grid, MIXED, 64, 0.4).to("cuda")
    q, k, v = inputs(grid, len(MIXED), 64, dtype=torch.bfloat16, device="cuda")
    whole = sparse_attention(q, k, v, layout, backend=backend)
    for part in (slice(0, 4), slice(4, 9)):
        mine = sparse_attention(*(x[:, :, part] for x in (q, k, v)), layout.of_heads(part), backend=backend)
        assert torch.equal(mine, whole[:, :, part])


# -- the repair --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("shape", [*SHAPES, LARGE], ids=names)
def test_repair_in_one_pass(shape: Shape, dtype: torch.dtype) -> None:
    """As the plain product has it in fp64: odd sizes, text around, rows with room between them, several tiles a
    program; poison outside of what is repaired stays where it is."""
    out, repair = output(shape, dtype, "cuda"), maps_of(shape, "cuda")
    assert no_fused_pass(out) is None
    found = torch.empty(0, dtype=dtype, device="cuda").set_(out.untyped_storage().clone(), 0, out.shape, out.stride())
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = mend_(found, repair, shape.before, shape.visual)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert again is found
    check(out, found, repair, shape)


def test_repair_of_more_than_2_to_the_31_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GB of GPU memory")
    tokens, heads, dim = 131_072, 130, 128
    out = torch.randn(1, 512, heads, dim, device="cuda").bfloat16().repeat(1, tokens // 512, 1, 1)
    assert out.numel() > 2**31
    repair = maps(heads, dim, "cuda")
    want = repair.apply_(out[:, -512:].clone(), 0, 512)
    mend_(out, repair, 512, tokens - 512)
    assert_near(out[:, -512:], want, Work(dim, sums=2))
    assert_near(out[:, 512:1024], want, Work(dim, sums=2))
    assert not torch.equal(out[:, :512], out[:, 512:1024])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_repaired_call_in_a_graph_and_compiled(backend: str) -> None:
    grid = TokenGrid(3, 13, 21, text_before=5, text_after=77)
    layout = random_layout(grid, MIXED, 128, 0.3, diagonal=True)
    layout = replace(layout, heads=replace(layout.heads, repair=maps(len(MIXED), 128))).to("cuda")
    plain = replace(layout, heads=replace(layout.heads, repair=None))
    q, k, v = inputs(grid, len(MIXED), 128, batch=2, dtype=torch.bfloat16, device="cuda")
    want = sparse_attention(q, k, v, layout, backend=backend)
    without = sparse_attention(q, k, v, plain, backend=backend)
    assert layout.heads.repair is not None
    plainly = layout.heads.repair.apply_(without.clone(), 5, grid.num_visual)
    assert_near(want, plainly, Work(128, sums=2))
    assert torch.equal(want[:, :5], without[:, :5]) and torch.equal(want[:, -77:], without[:, -77:])
    assert torch.equal(want[:, :, 1], without[:, :, 1]) and not torch.equal(want, without)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sparse_attention(q, k, v, layout, backend=backend)
    for _ in range(2):  # a graph that repaired what is repaired already would differ
        graph.replay()
        assert torch.equal(out, want)

    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sparse_attention(q, k, v, layout, backend=backend) + 0

    traced = torch.compile(layer, fullgraph=True)
    assert torch.equal(traced(q, k, v), want) and torch.equal(traced(q, k, v), want)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_online_repair_never_waits_for_the_gpu(backend: str, masked: bool) -> None:
    grid = TokenGrid(3, 13, 21, text_before=5, text_after=77)
    layout = random_layout(grid, MIXED, 128, 0.3, diagonal=True).repaired(OnlineRepair(128)).to("cuda")
    q, k, v = inputs(grid, len(MIXED), 64, batch=2, dtype=torch.bfloat16, device="cuda")
    kv_len = torch.tensor([grid.seq_len, grid.seq_len - 40], dtype=torch.int32, device="cuda") if masked else None
    sparse_attention(q, k, v, layout, kv_len=kv_len, backend=backend)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = sparse_attention(q, k, v, layout, kv_len=kv_len, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want, _ = reference_attention(q, k, v, layout, kv_len=kv_len)
    assert float((out.double() - want).norm() / want.norm()) < 2e-2
    # Rows that were attended exactly have torch's own error.
    places = OnlineRepair(128).places(5, grid.num_visual, "cuda")
    assert float((out.double() - want)[:, places].norm() / want[:, places].norm()) < 8e-3
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = sparse_attention(q, k, v, layout, kv_len=kv_len, backend=backend)
    for _ in range(2):
        again.fill_(float("nan"))
        graph.replay()
        assert_near(again, out, Work(16))


# -- other processes on the same GPU -----------------------------------------------------------------------------------


@HOPPER
@pytest.mark.parametrize("block", [64, 128])
def test_processes_that_take_turns_on_a_gpu(block: int, repo_root: Path) -> None:
    """A GPU stops a kernel anywhere to let another process have its turn: no call may come back otherwise.

    Barriers whose memory held other values did come back as NaN, one call in 2,000.
    """
    command = [sys.executable, "-m", "tests.kernels.side_by_side", str(block)]
    running = [subprocess.Popen(command, cwd=repo_root, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    said = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0] * 6, said


# -- a few queries -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=names)
@pytest.mark.parametrize("shape", rows.SHAPES, ids=names)
def test_a_few_queries(shape: rows.Shape, dtype: torch.dtype) -> None:
    rows.check_attend(shape, dtype, "cuda")
    rows.check_errors(shape, dtype, "cuda")


@pytest.mark.parametrize("budget", ranked.all_budgets(), ids=str)
def test_a_budget_keeps_by_kernels_what_it_keeps_by_a_sort(budget: Budget) -> None:
    for n in (1, 70, 600, 1100):
        ranked.check_budget(budget, n, n, "cuda")


@pytest.mark.parametrize(("dim", "dtype"), [(64, torch.bfloat16), (128, torch.bfloat16), (72, torch.float32)])
def test_statistics_of_blocks(dim: int, dtype: torch.dtype) -> None:
    for grid in ranked.GRIDS:
        ranked.check_blocks(grid, dim, dtype, "cuda")
        for factor in (1.0, 40.0):
            ranked.check_tail_error(grid, dim, dtype, "cuda", factor)
