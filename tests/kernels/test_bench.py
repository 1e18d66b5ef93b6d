"""The kernel benchmark: what it checks before it times, what it says of kernels that it does not time."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks.library.cases import CASES, cases, uniform_case, with_outliers
from benchmarks.library.measure import OK, Row, bench_case, executed
from benchmarks.library.peers import PEERS, BlockLists, Inputs, Peer, Prepared, block_lists, cannot_express
from benchmarks.library.sampled import sampled_error
from diffsparse.entry import Execution, HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.kernels import reference_attention, sparse_attention
from diffsparse.kernels.clock import samples_ms, timing
from diffsparse.kernels.random_rows import random_rows
from diffsparse.layout import BlockLayout
from diffsparse.order import CurveOrder, TileOrder
from tests.kernels.cases import MIXED, head, inputs, random_layout
from tests.kernels.mend import maps
from tests.tolerance import ATTENTION, assert_near

ROOT = Path(__file__).resolve().parents[2]
GRID = TokenGrid(3, 9, 16, text_before=5, text_after=40)
CPU = torch.device("cpu")


def by_name(rows: list[Row], setting: str) -> dict[str, Row]:
    return {r.name: r for r in rows if r.setting == setting}


# -- inputs ----------------------------------------------------------------------------------------------------------


def test_outliers_are_a_few_wide_channels_off_zero() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 500, 2, 64)
    wide = with_outliers(x)
    assert (wide != x).any(dim=(0, 1, 2)).sum() == 4
    assert wide[..., 3].mean() == pytest.approx(8, abs=1) and wide[..., 3].std() == pytest.approx(8, abs=1)


# -- the check of sampled rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True], ids=["all-keys", "kv_len"])
def test_sampled_rows_agree_with_the_oracle(masked: bool) -> None:
    entries = [e for e in MIXED if e.execution.tail != "centroids"]
    layout = random_layout(GRID, entries, 64, 0.4)
    q, k, v = inputs(GRID, len(entries), 32)
    kv_len = torch.tensor([GRID.seq_len - 21]) if masked else None
    want, _ = reference_attention(q, k, v, layout, kv_len=kv_len)
    assert sampled_error(want, q, k, v, layout, kv_len=kv_len, rows=GRID.seq_len) < 1e-12


def test_a_repair_is_a_part_of_what_is_checked_and_timed() -> None:
    (case,) = cases(["repair"], tiny=True)
    plain, *repaired = (case.layout(s) for s in case.settings)
    q, k, v = inputs(case.grid, case.heads, case.head_dim)
    kv_len = torch.tensor([case.grid.seq_len - 21])
    for layout in repaired:
        want, _ = reference_attention(q, k, v, layout, kv_len=kv_len)
        assert sampled_error(want, q, k, v, layout, kv_len=kv_len, rows=case.grid.seq_len) < 1e-12
        assert sampled_error(want, q, k, v, plain, kv_len=kv_len, rows=case.grid.seq_len) > 0.1
    rows = bench_case(case, device="cpu", dtype=torch.float32, backends=("cpu",), dense=(), budget_ms=1)
    found = {r.setting: r for r in rows}
    assert found["repaired"].status == OK and found["repaired"].error < 1e-5  # type: ignore[operator]
    assert found["repaired"].over_baseline == pytest.approx(found["repaired"].ms / found["no repair"].ms)  # type: ignore[operator]


def test_a_repair_leaves_text_and_heads_without_a_map_alone() -> None:
    layout = random_layout(GRID, [head(), head()], 64, 0.4)
    q, k, v = inputs(GRID, 2, 32)
    layout = replace(layout, heads=replace(layout.heads, repair=maps(2, 32)))
    want, _ = reference_attention(q, k, v, layout)
    assert sampled_error(want, q, k, v, layout, rows=GRID.seq_len) < 1e-12


def test_one_wrong_block_shows() -> None:
    layout = random_layout(GRID, [head(tail="moments")], 64, 0.4)
    q, k, v = inputs(GRID, 1, 32)
    out, _ = reference_attention(q, k, v, layout)
    out[0, -GRID.text_after :] *= 1.1
    assert 0.01 < sampled_error(out, q, k, v, layout, rows=200) < 0.1


def test_a_skipped_head_has_to_be_zero() -> None:
    layout = random_layout(GRID, [head(), head(mode="skip")], 64, 0.4)
    q, k, v = inputs(GRID, 2, 16)
    out, _ = reference_attention(q, k, v, layout)
    assert sampled_error(out, q, k, v, layout) < 1e-12
    out[0, 7, 1] = 0.1
    assert sampled_error(out, q, k, v, layout) == float("inf")


def test_centroids_are_for_the_oracle() -> None:
    layout = random_layout(GRID, [head(tail="centroids")], 64, 0.4)
    q, k, v = inputs(GRID, 1, 16)
    with pytest.raises(ValueError, match="reference_attention on a small case"):
        sampled_error(q, q, k, v, layout)


# -- what is counted ---------------------------------------------------------------------------------------------------


def test_executed_pairs_are_those_of_the_token_masks() -> None:
    entries = [e for e in MIXED if e.execution.mode == "exact"]
    layout = random_layout(GRID, entries, 64, 0.4)
    done = executed(layout)
    assert done.pairs == sum(int(layout.token_mask(h).sum()) for h in range(len(entries)))
    assert done.blocks == sum(int(layout.mask(h).sum()) for h in range(len(entries)))


@pytest.mark.parametrize("shared", [False, True])
def test_random_rows_have_one_length(shared: bool) -> None:
    grid = TokenGrid(1, 1, 1000)
    layout = random_rows(grid, [head()] * 3, 64, 0.25, shared=shared)
    assert set(layout.index.row_ptr[0].diff().tolist()) == {4}
    same = bool((layout.mask(0) == layout.mask(1)).all())
    assert same == shared
    assert executed(layout).share == pytest.approx(0.25)


def test_median_and_percentiles() -> None:
    found = timing([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (found.ms, found.samples) == (3.0, 5) and found.ms_p20 < 3.0 < found.ms_p80
    calls = []
    assert len(samples_ms(lambda: calls.append(1), CPU, 0.0, least=7)) == 7 and len(calls) == 9


# -- peers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "grid", "reason"),
    [
        ([head(CurveOrder())], TokenGrid(3, 9, 16), "heads with an order of their own"),
        ([head(tail="mean")], TokenGrid(3, 9, 16), "tails"),
        ([head(), head(mode="skip")], TokenGrid(3, 9, 16), "skipped heads"),
        ([head()], GRID, "short blocks inside the sequence"),
    ],
)
def test_layouts_that_peers_cannot_express(entries: list[HeadEntry], grid: TokenGrid, reason: str) -> None:
    layout = random_layout(grid, entries, 64, 0.5)
    assert reason in str(cannot_express(layout))
    with pytest.raises(ValueError, match=reason.split(" (")[0]):
        block_lists(layout)


@pytest.mark.parametrize("shared", [False, True])
def test_block_lists_say_what_the_layout_says(shared: bool) -> None:
    layout = random_rows(TokenGrid(1, 1, 410), [head()] * 3, 64, 0.4, shared=shared)
    lists = block_lists(layout)
    assert lists.count.shape[0] == (1 if shared else 3) and lists.sizes.tolist() == [64] * 6 + [26]
    count, index = lists.each_head(3)
    for h in range(3):
        for row, kept in enumerate(layout.mask(h)):
            assert index[h, row, : count[h, row]].tolist() == kept.nonzero().flatten().tolist()


def _from_lists(q: Any, k: Any, v: Any, count: Any, index: Any, size: int, valid: int, scale: float) -> torch.Tensor:
    """Attention by lists ``[B, H, N]`` and ``[B, H, N, W]`` on ``[B, H, S, D]``, as the peers define them."""
    n = count.shape[2]
    place = torch.arange(index.shape[3])
    keep = torch.zeros(*count.shape, n, dtype=torch.bool)
    for b, h, i in torch.cartesian_prod(*(torch.arange(s) for s in count.shape)).tolist():
        keep[b, h, i, index[b, h, i][place < count[b, h, i]].long()] = True
    tokens = keep.repeat_interleave(size, 2).repeat_interleave(size, 3)[:, :, : q.shape[2], : k.shape[2]]
    tokens = tokens & (torch.arange(k.shape[2]) < valid)
    logits = (q @ k.transpose(2, 3) * scale).masked_fill(~tokens, float("-inf"))
    return logits.softmax(3) @ v


def _fake_fastvideo(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(q: Any, k: Any, v: Any, index: Any, count: Any, sizes: Any) -> tuple[torch.Tensor, None]:
        assert q.shape[2] % 64 == 0 and all(x.is_contiguous() for x in (q, k, v, index, count))
        assert index.dtype == count.dtype == sizes.dtype == torch.int32 and index.shape[:2] == q.shape[:2]
        return _from_lists(q, k, v, count, index, 64, int(sizes.sum()), q.shape[3] ** -0.5), None

    package, module = ModuleType("fastvideo_kernel"), ModuleType("fastvideo_kernel.block_sparse_attn")
    module.block_sparse_attn_sm90 = module.block_sparse_attn_triton = attend  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fastvideo_kernel", package)
    monkeypatch.setitem(sys.modules, "fastvideo_kernel.block_sparse_attn", module)


def _fake_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import namedtuple

    names = "mask_block_cnt mask_block_idx full_block_cnt full_block_idx block_size"
    sparsity, interface = ModuleType("block_sparsity"), ModuleType("interface")
    sparsity.BlockSparseTensorsTorch = namedtuple("BlockSparseTensorsTorch", names)  # type: ignore[attr-defined]

    def forward(
        q: Any, k: Any, v: Any, *, softmax_scale: float, block_sparse_tensors: Any
    ) -> tuple[torch.Tensor, None]:
        t = block_sparse_tensors
        assert not t.mask_block_cnt.any() and t.full_block_cnt.dtype == t.full_block_idx.dtype == torch.int32
        heads = q.shape[2]
        count, index = (x.expand(1, heads, *x.shape[2:]) for x in (t.full_block_cnt, t.full_block_idx))
        qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
        out = _from_lists(qt, kt, vt, count, index, t.block_size[0], q.shape[1], softmax_scale)
        return out.transpose(1, 2), None

    interface._flash_attn_fwd = forward  # type: ignore[attr-defined]
    for name, module in (
        ("flash_attn", ModuleType("flash_attn")),
        ("flash_attn.cute", ModuleType("flash_attn.cute")),
        ("flash_attn.cute.block_sparsity", sparsity),
        ("flash_attn.cute.interface", interface),
    ):
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("name", "fake"),
    [
        ("fastvideo_vsa", _fake_fastvideo),
        ("fastvideo_triton", _fake_fastvideo),
        ("flash_attention_4", _fake_flash_attention),
    ],
)
def test_a_layout_in_a_peers_form_is_the_same_attention(
    name: str, fake: Callable[[pytest.MonkeyPatch], None], shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their kernels need a GPU; what is tried here is the layout's way into their lists, on stand-ins."""
    fake(monkeypatch)
    grid = TokenGrid(1, 1, 410)
    layout = random_rows(grid, [head()] * 3, PEERS[name].block_sizes[0], 0.4, shared=shared)
    q, k, v = inputs(grid, 3, 16)
    prepared = PEERS[name].prepare(Inputs(q, k, v), block_lists(layout))
    out = prepared.finish(prepared.run())
    want, _ = reference_attention(q, k, v, layout)
    assert_near(out.double(), want, ATTENTION)


@pytest.mark.slow(reason="compiles flex attention")
def test_flex_attention_compiled_on_the_cpu() -> None:
    case = uniform_case("own", "", 410, 2, 16, (0.5,))
    rows = bench_case(case, device="cpu", dtype=torch.float32, backends=("cpu",), dense=(), peers=("flex_attention",))
    assert [r.status for r in rows] == [OK, OK], rows
    assert rows[0].vs_peer == pytest.approx(rows[1].ms / rows[0].ms)  # type: ignore[operator]


# -- the rows ----------------------------------------------------------------------------------------------------------


def _peer(run: Callable[[Inputs, BlockLists], torch.Tensor]) -> Peer:
    def prepare(given: Inputs, lists: BlockLists) -> Prepared:
        return Prepared(lambda: run(given, lists), lambda out: out)

    return Peer("torch", "torch", (128,), prepare, devices=("cpu",))


def test_what_is_wrong_or_fails_is_named_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(given: Inputs, lists: BlockLists) -> torch.Tensor:
        raise RuntimeError("no kernel image\nfor this device")

    def writes_nothing(given: Inputs, lists: BlockLists) -> torch.Tensor:
        return torch.full_like(given.q, float("nan"))

    monkeypatch.setitem(
        PEERS, "ignores the lists", _peer(lambda given, lists: given.v.mean(1, True).expand_as(given.v))
    )
    monkeypatch.setitem(PEERS, "writes nothing", _peer(writes_nothing))
    monkeypatch.setitem(PEERS, "fails", _peer(fails))
    names = ("ignores the lists", "writes nothing", "fails", "nobody")
    case = uniform_case("own", "", 410, 2, 16, (0.3,))
    rows = bench_case(case, device="cpu", dtype=torch.float32, backends=("cpu", "triton"), peers=names, budget_ms=1)
    found = by_name(rows, "d=0.3")
    assert list(found) == ["cpu", "triton", *names]
    assert found["cpu"].status == OK and found["cpu"].error < 1e-5  # type: ignore[operator]
    assert found["ignores the lists"].status.startswith("wrong: off by")
    assert found["writes nothing"].status.startswith("wrong: off by nan")
    assert found["fails"].status == "RuntimeError: no kernel image"
    assert found["nobody"].status.startswith("unknown peer 'nobody'")
    assert "runs tensors on a GPU" in found["triton"].status
    assert all((row.ms is None) == (row.status != OK) for row in rows)
    assert found["cpu"].vs_peer is None


def test_ratios_are_to_the_same_kernel_and_the_best_dense() -> None:
    (case,) = cases(["tail"], tiny=True)
    rows = bench_case(case, device="cpu", dtype=torch.float32, backends=("cpu",), budget_ms=1, rounds=2)
    dense = min(r.ms for r in rows if r.kind == "dense" and r.ms is not None)
    plain, tail = by_name(rows, "no tail")["cpu"], by_name(rows, "moments")["cpu"]
    assert plain.ms and tail.ms and plain.samples >= 10
    assert plain.vs_dense == pytest.approx(dense / plain.ms) and plain.over_baseline is None
    assert tail.over_baseline == pytest.approx(tail.ms / plain.ms)
    assert plain.tflops == pytest.approx(
        4 * 16 * executed(case.settings[0].layout(case.grid, case.block_size)).pairs / plain.ms / 1e9
    )


def test_every_case_has_a_layout_at_its_tiny_size() -> None:
    found = cases(tiny=True)
    assert [case.name for case in found] == list(CASES)
    for case in found:
        labels = [s.label for s in case.settings]
        for setting in case.settings:
            assert setting.baseline is None or labels.index(setting.baseline) < labels.index(setting.label)
            assert setting.like is None or setting.like in labels
            layout: BlockLayout = setting.layout(case.grid, case.block_size, 0.5 if setting.like else None)
            assert layout.num_heads == case.heads and executed(layout).blocks
    assert {e.execution.mode for e in found[CASES.index("mixed")].settings[1].entries} == {"exact", "skip"}
    with pytest.raises(ValueError, match="no case called 'radiant'; there are uniform-32k"):
        cases(["radiant"])


def test_full_sizes_are_the_models_own() -> None:
    """Tokens and heads of the models that the cases stand for."""
    sizes = {case.name: (case.grid.seq_len, case.heads, case.head_dim) for case in cases()}
    assert sizes["uniform-118k"] == (33 * 45 * 80, 24, 128) and sizes["orders"] == (75600, 40, 128)
    assert sizes["head-dim-64"] == (45106, 30, 64) and sizes["mixed-text"] == (118800 + 256, 24, 128)


def test_tiles_and_text_have_random_rows() -> None:
    layout = random_rows(GRID, [head(TileOrder(1, 8, 8)), head()], 64, 0.3)
    q, k, v = inputs(GRID, 2, 16)
    out = sparse_attention(q, k, v, layout, backend="cpu")
    assert sampled_error(out, q, k, v, layout) < 1e-5


def test_settings_are_named_by_density_and_tail() -> None:
    case = uniform_case("own", "", 300, 1, 16, (0.5,), tails=("none", "mean"))
    assert [s.label for s in case.settings] == ["d=0.5", "d=0.5 mean"]
    assert case.settings[1].entries == (replace(HeadEntry(), execution=Execution(tail="mean")),)


def test_the_script_runs_as_it_stands(tmp_path: Path) -> None:
    out, plot = tmp_path / "rows.csv", tmp_path / "plot.png"
    command = [sys.executable, str(ROOT / "benchmarks" / "kernels.py"), "--device", "cpu", "--cases", "radial,tail"]
    command += ["--seconds", "0.001", "--peers", "", "--csv", str(out), "--plot", str(plot)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(out.open()))
    assert {row["case"] for row in rows} == {"radial", "tail"}
    timed = [row for row in rows if row["status"] == OK]
    assert all(float(row["ms"]) > 0 and row["gpu"] and row["date"] and row["torch"] for row in timed)
    assert {row["name"] for row in timed} >= {"cpu", "flash_sdpa"}
    assert {row["name"] for row in rows} - {row["name"] for row in timed} >= {"triton", "cudnn_sdpa", "xformers"}
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "not timed: it runs on a GPU" in done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["uniform-32k", "mixed", "mixed-text", "orders", "tail", "repair"])
def test_cases_on_a_gpu(name: str) -> None:
    """Every kernel and peer that is there is right, or says why it was not timed; ours that run are right."""
    (case,) = cases([name], tiny=True)
    case = replace(case, head_dim=64, block_size=128)
    rows = bench_case(case, device="cuda", dtype=torch.bfloat16, budget_ms=5)
    ours = [r for r in rows if r.kind == "own" and r.numerics == "auto" and r.error is not None]
    assert ours and all(r.status == OK for r in ours), [r.status for r in ours]
    assert any(r.kind == "dense" and r.status == OK for r in rows)
    assert all(r.ms is not None or r.status != OK for r in rows)


@pytest.mark.gpu
def test_a_call_that_is_long_is_timed_by_events() -> None:
    calls: list[int] = []

    def long() -> None:
        calls.append(1)
        torch.cuda._sleep(200_000_000)  # about a tenth of a second

    samples = samples_ms(long, torch.device("cuda"), 0.0, least=3)
    assert len(samples) == 3 and len(calls) == 5 and min(samples) > 20
