"""``backend="auto"`` never makes a model slower: what a break-even table speaks against stays dense."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch

from diffsparse.entry import Execution, HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.kernels import KernelBackend, register_backend
from diffsparse.kernels.backends import registry
from diffsparse.kernels.backends.reference.forward import run as run_reference
from diffsparse.kernels.break_even import device_name, save_local
from diffsparse.kernels.call import AttentionCall
from diffsparse.patterns import Band
from diffsparse.pipelines import architecture_of, sparse_attention, sparse_attention_summary
from diffsparse.pipelines.policy import FULL, SLOWER
from diffsparse.plan import SparsityPlan
from diffsparse.preset_plans import preset
from tests.helpers.break_even import table
from tests.pipelines.models import run, wan, wan_inputs

CPU = torch.device("cpu")
PLAN = preset("window", tail="none")

pytestmark = pytest.mark.usefixtures("own_cache")


def summary(model: Any, plan: SparsityPlan = PLAN, backend: str = "auto") -> Any:
    with sparse_attention(model, plan, backend=backend):
        out = run(model, wan_inputs(3, 7, 9))
        return out, sparse_attention_summary(model).transformers["transformer"]


def test_below_break_even_layers_stay_dense_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    model = wan()
    torch.manual_seed(1)
    dense = run(model, wan_inputs(3, 7, 9))
    save_local(table(1.2))
    torch.manual_seed(1)
    with caplog.at_level(logging.WARNING, "diffsparse"):
        out, found = summary(model)
    assert torch.equal(out, dense)
    assert found.sparse_calls == 0 and found.dense_reasons == {SLOWER: found.dense_calls}
    lines = [r.getMessage() for r in caplog.records if "break-even" in r.getMessage()]
    assert len(lines) == 1 and "at 189 tokens stay dense" in lines[0] and device_name(CPU) in lines[0]


def test_a_backend_asked_for_by_name_runs() -> None:
    save_local(table(1.2))
    assert summary(wan(), backend="cpu")[1].dense_calls == 0


def test_above_break_even_and_without_a_table_layers_run_sparse() -> None:
    model = wan()
    assert summary(model)[1].dense_calls == 0
    save_local(table(0.9))
    assert summary(model)[1].dense_calls == 0
    save_local(replace(table(1.2), backend="triton"))  # of another kernel than runs here
    assert summary(model)[1].dense_calls == 0


def test_each_layer_by_its_own_density() -> None:
    model = wan()
    layers = architecture_of(model).layers
    thin, thick = HeadEntry(pattern=Band(0.0)), HeadEntry(pattern=Band(0.3))
    plan = SparsityPlan.from_table({n: [[thick if i == 0 else thin] * 3] for i, n in enumerate(layers)})
    densities = plan.call_densities(TokenGrid(3, 7, 9), layers, 3)[0]
    assert densities[0] > densities[1] + 0.2
    save_local(table(0.2, 1.5))
    found = summary(model, plan)[1]
    assert [layer.dense_calls for layer in found.layers] == [1] + [0] * (len(layers) - 1)
    assert found.layers[0].dense_reasons == {SLOWER: 1}


class Eight(KernelBackend):
    """Says that it has 8 bits."""

    name = "eight"
    devices = ("cpu",)
    numerics = {"int8": (16,)}

    def run(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        return run_reference(call)


def test_all_blocks_in_8_bits_are_more_than_dense_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are 8 bits; elsewhere it would be the same as dense attention, and slower."""
    entry = HeadEntry(pattern=Band(1.0), execution=Execution(numerics="int8"))
    plan = SparsityPlan.uniform(entry)
    assert summary(wan(), plan)[1].dense_reasons == {FULL: 2}
    monkeypatch.setattr(registry, "_BACKENDS", dict(registry._BACKENDS))
    register_backend(Eight())
    assert summary(wan(), plan)[1].sparse_calls == 2
    assert summary(wan(), plan, backend="eight")[1].sparse_calls == 2
    assert summary(wan(), plan, backend="cpu")[1].dense_reasons == {FULL: 2}
    assert summary(wan(), plan.with_numerics("auto"))[1].dense_reasons == {FULL: 2}


@pytest.mark.slow(reason="compiles a model with Inductor")
def test_compiled_layers_know_the_reason() -> None:
    torch._dynamo.reset()
    model = wan()
    model.compile_repeated_blocks(fullgraph=True)
    save_local(table(1.2))
    found = summary(model)[1]
    assert found.sparse_calls == 0 and set(found.dense_reasons) == {SLOWER}
    torch._dynamo.reset()
