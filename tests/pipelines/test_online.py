"""A plan whose repair is fitted in every call, attached."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from diffsparse.kernels.backends.reference.forward import reference_attention
from diffsparse.online import OnlineRepair
from diffsparse.pipelines import sparse_attention, sparse_attention_summary, tap_attention
from diffsparse.plan import SparsityPlan
from diffsparse.preset_plans import preset
from tests.pipelines.models import CASES, mixed_plan, run, wan, wan_inputs
from tests.tolerance import Work, assert_near, near

SHAPE = (3, 7, 9)
ROWS = OnlineRepair(16)
#: As ``tolerance.MODEL``, where every call has a fit that magnifies what its inputs are off by.
FITTED = Work(length=256, sums=24, gain=17)


def by_tap(model: torch.nn.Module, plan: SparsityPlan, inputs: dict) -> torch.Tensor:  # type: ignore[type-arg]
    """The model's output with the plan, from the reference call by call."""
    grid = CASES["wan"].grid(SHAPE)

    def callback(call):  # type: ignore[no-untyped-def]
        layout = plan.layout(0, call.layer, call.q.shape[2], grid)
        assert layout is not None and layout.heads.repair == ROWS
        return reference_attention(call.q, call.k, call.v, layout, scale=call.scale)[0].to(call.q.dtype)

    with tap_attention(model, callback):
        return run(model, inputs)


@pytest.mark.parametrize("any_model", [False, True])
def test_an_enabled_model_repairs_and_a_disabled_one_is_as_before(any_model: bool) -> None:
    model, inputs = wan(), wan_inputs(*SHAPE)
    dense = run(model, inputs)
    plain = preset("window", size=(1, 0.3, 0.3), sparse_below=1.0) if any_model else mixed_plan(model)
    plan = replace(plain, repair=ROWS)
    with sparse_attention(model, plain):
        without = run(model, inputs)
        density = sparse_attention_summary(model).density
    with sparse_attention(model, plan):
        found = run(model, inputs)
        summary = sparse_attention_summary(model)
    assert_near(found, by_tap(model, plan, inputs), FITTED)
    assert not near(found, without, FITTED)
    assert torch.equal(run(model, inputs), dense)
    told = summary.transformers["transformer"]
    assert told.online_rows == 16 and told.repaired_heads == 0
    assert "repaired online, by 16 exact rows of each sparse call" in str(summary)
    assert json.loads(json.dumps(summary.to_dict()))["transformers"]["transformer"]["online_rows"] == 16
    grid = CASES["wan"].grid(SHAPE)
    layers, heads = told.layers, model.config.num_attention_heads
    names = [layer.name for layer in layers]
    assert summary.density == pytest.approx(plan.call_densities(grid, names, heads).mean())
    assert density is not None and summary.density is not None and summary.density > density


def test_where_it_is_as_much_work_as_dense_attention_a_layer_is_dense() -> None:
    """On a grid of few tokens the rows alone may be most of them."""
    model, inputs = wan(), wan_inputs(*SHAPE)
    dense = run(model, inputs)
    with sparse_attention(model, replace(mixed_plan(model), repair=OnlineRepair(256))):
        assert torch.equal(run(model, inputs), dense)
        layers = sparse_attention_summary(model).transformers["transformer"].layers
    assert all(layer.sparse_calls == 0 and "rows of the online repair" in str(layer.dense_reasons) for layer in layers)


def test_dense_heads_on_a_dense_kernel_stay_dense() -> None:
    """They are left out of the sparse call, whose repair must not reach what the dense kernel gives."""
    model, inputs = wan(), wan_inputs(*SHAPE)
    plan = replace(mixed_plan(model), repair=ROWS)
    with sparse_attention(model, plan):
        wanted = run(model, inputs)
    with sparse_attention(model, plan, dense_backend="fastest"):
        assert_near(run(model, inputs), wanted, FITTED)


def test_heads_of_any_size() -> None:
    """A plan with maps is refused where heads have another size; this one has none."""
    model = wan()
    plan = replace(mixed_plan(model), architecture=None, repair=ROWS)
    with sparse_attention(model, plan):
        assert torch.isfinite(run(model, wan_inputs(*SHAPE))).all()


@pytest.mark.slow(reason="compiles a model")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_layers_share_a_graph(backend: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model, inputs = wan(layers=4), wan_inputs(*SHAPE)
    plan = replace(mixed_plan(model), repair=ROWS)
    with sparse_attention(model, plan):
        wanted = run(model, inputs)
    counter = CompileCounterWithBackend(backend)
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    with sparse_attention(model, plan):
        assert_near(run(model, inputs), wanted, FITTED)
        assert counter.frame_count == 1
    torch._dynamo.reset()
