"""Attention that several processes share: each computes its heads, and together they give what one process gives."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffsparse.grid import TokenGrid
from diffsparse.pipelines import enable_sparse_attention, sparse_attention_summary
from diffsparse.pipelines.parallel import take_part
from diffsparse.pipelines.shares import Share, deal_heads, imbalance, share_of
from tests.docs.pages import blocks
from tests.pipelines.models import CASES, mixed_plan, run, wan, wan_inputs
from tests.tolerance import Work

ROOT = Path(__file__).resolve().parents[2]
EVEN, UNEVEN = {"ulysses_degree": 2}, {"ulysses_degree": 2, "ulysses_anything": True}


def together(folder: Path, ranks: int, **job: Any) -> list[dict[str, dict[str, Any]]]:
    """What each of ``ranks`` processes found of the job's cases."""
    words = [sys.executable, "-m", "tests.pipelines.ranks"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    members = [
        subprocess.Popen(
            [*words, str(rank), str(ranks), str(folder / "store"), json.dumps(job)],
            cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        outputs = [member.communicate(timeout=600)[0] for member in members]
    finally:
        for member in members:
            member.kill()
    found = []
    for member, output in zip(members, outputs, strict=True):
        assert member.returncode == 0, output[-4000:]
        found.append(json.loads(next(line for line in output.splitlines() if line.startswith("RESULT"))[6:]))
    return found


def check(found: list[dict[str, dict[str, Any]]], heads: int) -> None:
    for name in found[0]:
        for one in (member[name] for member in found):
            assert one["same"] == [True, True], (name, one)
            assert one["sparse"] > 0 and not one["reasons"] and one["calls"] > 0
        # Every block of every head is counted by one process alone.
        counts = Share(0, len(found)).counts(heads)
        whole = sum(member[name]["density"] * n for member, n in zip(found, counts, strict=True))
        assert whole / heads == pytest.approx(found[0][name]["alone"])


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    check(together(tmp_path, 2, cases=["wan", "flux", "hunyuan", "cogvideox"], heads=6, config=EVEN), 6)


def test_a_generation_that_reuses_repairs_and_picks(tmp_path: Path) -> None:
    found = [member["pipeline"] for member in together(tmp_path, 2, cases=["pipeline"], heads=6, config=EVEN)]
    for one in found:
        assert one["same"] == [True, True] and one["sparse"] > 0
        assert set(one["reasons"]) == {"noise level outside the plan's sparse range"}
    # The second of two generations counts as the first: together the processes reuse what one does.
    assert sum(one["reused"][1] for one in found) == 2 * found[0]["reused"][0] > 0


@pytest.mark.slow(reason="starts processes that each load diffusers")
def test_three_processes(tmp_path: Path) -> None:
    cases = ["wan", "flux", "hunyuan", "cogvideox"]
    check(together(tmp_path, 3, cases=cases, heads=6, config={"ulysses_degree": 3}), 6)


@pytest.mark.slow(reason="starts processes that each load diffusers")
def test_thirty_layers_with_large_logits_and_an_image(tmp_path: Path) -> None:
    check(together(tmp_path, 2, cases=["wan_deep", "wan_i2v"], heads=6, config=EVEN), 6)


@pytest.mark.slow(reason="starts processes that each load diffusers")
def test_heads_and_tokens_that_do_not_divide(tmp_path: Path) -> None:
    cases = ["wan", "hunyuan", "cogvideox", "qwenimage"]
    check(together(tmp_path, 2, cases=cases, heads=5, text=7, config=UNEVEN), 5)


@pytest.mark.slow(reason="starts processes that each load diffusers")
def test_compiled_models_keep_one_graph(tmp_path: Path) -> None:
    cases = ["wan", "flux", "hunyuan"]  # fullgraph=True, and a change of batch from model to model
    check(together(tmp_path, 2, cases=cases, heads=6, config=EVEN, compile=True), 6)


@pytest.mark.slow(reason="starts processes that each load diffusers")
def test_blocks_that_are_picked(tmp_path: Path) -> None:
    for one in together(tmp_path, 2, cases=["wan", "flux"], heads=6, config=EVEN, plan="online"):
        assert all(case["same"] == [True, True] and case["sparse"] > 0 for case in one.values())


@pytest.mark.slow(reason="starts processes that each load diffusers")
def test_tensor_parallel(tmp_path: Path) -> None:
    found = together(tmp_path, 2, cases=["flux", "qwenimage"], heads=6, config={"tp_degree": 2})
    for name in found[0]:
        for case in (one[name] for one in found):
            # The output projection is added up over processes, in another order than by one.
            near = Work(length=256, sums=8).tolerance(torch.ones(1), torch.full((1,), case["largest"]))
            assert case["apart"] <= near < case["sparse"] and not case["reasons"] and case["calls"] > 0
        whole = sum(one[name]["density"] for one in found) / 2
        assert whole == pytest.approx(found[0][name]["alone"])


@pytest.mark.slow(reason="starts processes that each load diffusers")
def test_tails_and_an_online_repair(tmp_path: Path) -> None:
    # Linear algebra takes heads together, and adds up in another order for another number of them.
    for one in together(tmp_path, 2, cases=["wan", "flux", "hunyuan"], heads=6, config=EVEN, plan="tails"):
        for case in one.values():
            near = Work(length=256, sums=8).tolerance(torch.ones(1), torch.full((1,), case["largest"]))
            assert case["apart"] <= near < case["sparse"]


@pytest.mark.slow(reason="starts processes that each load diffusers")
def test_the_page_on_several_gpus(tmp_path: Path) -> None:
    code = blocks(ROOT / "docs" / "gpus.md", "python")
    found = [one["page"] for one in together(tmp_path, 2, cases=["page"], heads=6, blocks=code)]
    assert code and all(one["same"] and one["calls"] > 0 for one in found)
    for rank, one in enumerate(found):
        told = f"2 processes share the heads of each layer: this one, number {rank}, computes 3 of 6"
        assert one["shared"].startswith(told) and told in one["text"]


# -- which heads, and in which order -----------------------------------------------------------------------------------


@given(
    ranks=st.integers(2, 5),
    video=st.integers(5, 40),
    before=st.integers(0, 12),
    after=st.integers(0, 12),
    text_before=st.booleans(),
)
def test_the_models_own_order_is_found_again(
    ranks: int, video: int, before: int, after: int, text_before: bool
) -> None:
    grid = TokenGrid(1, 1, video, text_before=before, text_after=after)
    whole = list(range(grid.seq_len))
    cut = before if text_before else before + video
    share = Share(0, ranks, uneven=True, text_apart=True)
    order = share.canonical(grid, text_before)
    parts = [torch.tensor(part).tensor_split(ranks) for part in (whole[:cut], whole[cut:])]
    received = torch.cat([x for pair in zip(*parts, strict=True) for x in pair]).long()
    if order is None:
        assert received.tolist() == whole or not (before or after)
    else:
        assert received[torch.tensor(order)].tolist() == whole
    assert Share(0, ranks).canonical(grid, text_before) is None


@given(st.lists(st.sampled_from([0.0, 0.05, 0.1, 0.25, 0.5, 1.0]), min_size=4, max_size=8), st.integers(2, 3))
def test_heads_are_dealt_evenly(costs: list[float], ranks: int) -> None:
    counts = Share(0, ranks).counts(len(costs))
    dealt = deal_heads(costs, counts)
    assert [len(heads) for heads in dealt] == counts
    assert sorted(h for heads in dealt for h in heads) == list(range(len(costs)))
    best = min(
        max(sum(costs[h] for h in part) for part in _cut(order, counts))
        for order in itertools.permutations(range(len(costs)))
    )
    load = max(sum(costs[h] for h in heads) for heads in dealt)
    lying = max(sum(costs[h] for h in part) for part in _cut(tuple(range(len(costs))), counts))
    assert best - 1e-9 <= load <= min(lying, max(best * 4 / 3, best + max(costs) / 2)) + 1e-9


def _cut(order: tuple[int, ...], counts: list[int]) -> list[tuple[int, ...]]:
    ends = list(itertools.accumulate(counts))
    return [order[end - count : end] for end, count in zip(ends, counts, strict=True)]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_mixed_plan_is_within_a_tenth(ranks: int) -> None:
    # A few of 40 heads are dense, most are sparse, some are left out. In each layer all wait for the fullest.
    torch.manual_seed(0)
    fullest = mean = 0.0
    for _ in range(40):
        kinds = torch.multinomial(torch.tensor([0.1, 0.2, 0.4, 0.2, 0.1]), 40, replacement=True)
        costs = (torch.tensor([1.0, 0.4, 0.15, 0.05, 0.0])[kinds] * (1 + 0.2 * torch.rand(40))).tolist()
        dealt = deal_heads(costs, Share(0, ranks).counts(40))
        fullest += max(sum(costs[h] for h in heads) for heads in dealt)
        mean += sum(costs) / ranks
    assert fullest / mean <= 1.10


def test_equal_heads_stay_where_they_are() -> None:
    assert deal_heads([0.3] * 5, [3, 2]) == [(0, 1, 2), (3, 4)]
    assert imbalance([0.0, 0.0], [(0,), (1,)]) == 1.0


def test_how_a_model_is_shared() -> None:
    def model(**context: Any) -> Any:
        settings = {"ring_degree": 1, "ulysses_degree": 2, "ulysses_anything": False, "_ulysses_local_rank": 1}
        found = SimpleNamespace(context_parallel_config=SimpleNamespace(**settings | context))
        return SimpleNamespace(_parallel_config=found, modules=lambda: [])

    assert share_of(SimpleNamespace()) is None  # type: ignore[arg-type]
    assert share_of(model()) == Share(1, 2)
    found = share_of(model(ring_degree=2, ulysses_degree=1))
    assert isinstance(found, str) and found.startswith("ring attention")
    split = SimpleNamespace(_mesh=SimpleNamespace(get_local_rank=lambda: 1, size=lambda: 3))
    one = SimpleNamespace(_parallel_config=SimpleNamespace(tensor_parallel_config=split))
    assert share_of(one) == Share(1, 3, exchanges=False)  # type: ignore[arg-type]
    both = model()
    both._parallel_config.tensor_parallel_config = split
    assert share_of(both) == "tensor parallelism beside it is not known here"


def test_a_model_that_is_shared_no_more_computes_all_heads() -> None:
    model = wan()
    plan = mixed_plan(model)
    inputs = wan_inputs(3, 7, 9)
    enable_sparse_attention(model, plan, backend="cpu")
    want = run(model, inputs)
    state = model._diffsparse_root
    state.take_share(Share(1, 3))
    assert state.heads == 1 and [len(part) for part in state.dealt(TokenGrid(3, 7, 9), 0, 0)] == [1, 1, 1]
    assert torch.equal(run(model, inputs), want)  # the next forward finds no other process
    assert state.share is None and sparse_attention_summary(model).transformers["transformer"].dense_calls == 0


def test_orders_are_made_once() -> None:
    model = CASES["flux"].build()
    enable_sparse_attention(model, mixed_plan(model), backend="cpu")
    state = model._diffsparse_root
    state.take_share(Share(0, 2, uneven=True, text_apart=True))
    grid = CASES["flux"].grid((1, 4, 5))
    call: Any = SimpleNamespace(state=state, device=torch.device("cpu"), problem=None, phase=0, grid_of=lambda i: grid)
    first, second = state.layers[:2]
    take_part(model, call, first)
    order, deal = first.order, first.deal
    assert order is not None and deal is not None
    take_part(model, call, first)
    take_part(model, call, second)
    assert first.order is order and second.order is order and first.deal is deal
    assert torch.equal(order[first.order_back], torch.arange(grid.seq_len))
    call.problem = "an unknown grid"
    take_part(model, call, first)
    assert first.share is None and first.order is None and first.deal is None
