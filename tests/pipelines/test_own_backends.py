"""A plan whose heads have a registered tail, beside a registered backend that alone knows it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from diffsparse import tails as vocabulary
from diffsparse.entry import Execution, HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.kernels import KernelBackend, break_even, register_backend, register_tail, tails
from diffsparse.kernels.backends import registry
from diffsparse.kernels.backends.reference.forward import run as run_reference
from diffsparse.kernels.break_even import save_local
from diffsparse.kernels.call import AttentionCall
from diffsparse.order import TileOrder
from diffsparse.patterns import Window
from diffsparse.pipelines import enable_sparse_attention, sparse_attention, sparse_attention_summary
from diffsparse.pipelines.hooks import is_attached
from diffsparse.pipelines.policy import SLOWER, machine_for
from diffsparse.pipelines.uniform import alike
from diffsparse.plan import SparsityPlan
from diffsparse.search.load import sparse_backend
from tests.helpers.break_even import table
from tests.pipelines.models import run, wan, wan_inputs, wan_pipeline
from tests.tolerance import MODEL, assert_near

CPU = torch.device("cpu")
GRID = TokenGrid(3, 7, 9)


class Same:
    """The mean key and value of a block, under another name."""

    name = "same"
    cost = 1.0

    def summaries(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return (queries @ keys.mean(0))[:, None] + torch.tensor(float(len(keys))).log(), values.mean(0)[None]


class Knows(KernelBackend):
    name = "knows"
    devices = ("cpu",)
    tails = ("none", "same")

    def run(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        return run_reference(call)


def entry(tail: str) -> HeadEntry:
    return HeadEntry(TileOrder(1, 4, 4), Window((1, 0.5, 0.5)), execution=Execution(tail=tail))


def plan_of(*by_layer: str) -> SparsityPlan:
    layers = tuple(f"blocks.{i}.attn1" for i in range(len(by_layer)))
    table = {name: [[entry(tail)] * 3] for name, tail in zip(layers, by_layer, strict=True)}
    return SparsityPlan.from_table(table, block_size=64)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("DIFFSPARSE_CACHE", str(tmp_path))
    monkeypatch.setattr(registry, "_BACKENDS", dict(registry._BACKENDS))
    monkeypatch.setattr(tails, "_TAILS", dict(tails._TAILS))
    costs = dict(vocabulary.TAIL_COST)
    register_tail(Same())
    register_backend(Knows())
    yield
    vocabulary.TAIL_COST.clear()
    vocabulary.TAIL_COST.update(costs)


def test_auto_names_a_backend_that_has_the_layers_tails() -> None:
    found = {tail: machine_for("auto", CPU, torch.float32, 16, (tail,)).kernel for tail in ("mean", "same")}
    assert found == {"mean": "cpu", "same": "knows"}
    assert machine_for("auto", CPU, torch.float32, 16, ("mean", "same")).without_kernel is not None


def test_each_layer_runs_on_the_backend_that_has_its_tail() -> None:
    model, inputs = wan(), wan_inputs(3, 7, 9)
    with sparse_attention(model, plan_of("mean", "same")):
        run(model, inputs)
        found = sparse_attention_summary(model).transformers["transformer"]
    assert [layer.backends for layer in found.layers] == [{"cpu": 1}, {"knows": 1}]


def test_a_backend_by_name_is_refused_where_it_lacks_a_tail() -> None:
    model = wan()
    with pytest.raises(ValueError, match="transformer cannot run: the cpu backend does not know the tail 'same'"):
        enable_sparse_attention(model, plan_of("mean", "same"), backend="cpu")
    assert not is_attached(model)
    enable_sparse_attention(model, plan_of("none", "same"), backend="knows")
    run(model, wan_inputs(3, 7, 9))
    assert sparse_attention_summary(model).transformers["transformer"].sparse_calls == 2


def test_a_table_of_another_backend_says_nothing_of_the_layer() -> None:
    save_local(table(9.0))  # of the backend cpu
    assert break_even.find_table(CPU, 16, ("mean",)) is not None
    assert break_even.find_table(CPU, 16, ("same",)) is None
    model = wan()
    with sparse_attention(model, plan_of("mean", "same")):
        run(model, wan_inputs(3, 7, 9))
        found = sparse_attention_summary(model).transformers["transformer"]
    assert [layer.dense_reasons for layer in found.layers] == [{SLOWER: 1}, {}]
    assert found.layers[1].backends == {"knows": 1}


def test_the_backend_for_a_whole_plan_has_all_of_its_tails() -> None:
    pipe = wan_pipeline()
    assert sparse_backend(pipe, plan_of("mean", "mean")) == "cpu"
    assert sparse_backend(pipe, plan_of("same", "none")) == "knows"
    assert sparse_backend(pipe, plan_of("same", "mean")) == "reference"


def test_compiled_layers_share_the_tails_that_every_kernel_has() -> None:
    plan = plan_of("mean", "same", "none")
    layouts = [plan.layout(0, layer, 3, GRID) for layer in plan.layers]
    assert [alike(layout, plan).heads.tails for layout in layouts if layout is not None] == [
        ("mean",), ("same",), ("mean",),
    ]  # fmt: skip


@pytest.mark.slow(reason="compiles a model")
def test_compiled_layers_run_on_the_backend_that_has_their_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, ...]] = []
    monkeypatch.setattr(Knows, "run", lambda self, call: ran.append(call.heads.tails) or run_reference(call))
    torch._dynamo.reset()
    model, inputs = wan(), wan_inputs(3, 7, 9)
    with sparse_attention(model, plan_of("mean", "same")):
        expected = run(model, inputs)
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    with sparse_attention(model, plan_of("mean", "same")):
        assert_near(run(model, inputs), expected, MODEL)
    assert ran == [("same",), ("same",)]
    torch._dynamo.reset()
