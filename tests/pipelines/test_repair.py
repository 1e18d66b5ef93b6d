"""A plan with a repair, attached: every backend and compiled code apply it, and nothing of it stays behind."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffsparse.grid import TokenGrid
from diffsparse.kernels import sparse_attention as attend
from diffsparse.kernels.backends.reference.forward import reference_attention
from diffsparse.layout import BlockLayout
from diffsparse.pipelines import sparse_attention, sparse_attention_summary, tap_attention
from diffsparse.plan import PlanError, SparsityPlan
from tests.pipelines.models import CASES, mixed_plan, run, wan, wan_inputs, with_repair
from tests.tolerance import ATTENTION, MODEL, Work, assert_near, near

SHAPE = (3, 7, 9)


def layout_of(plan: SparsityPlan, layer: int, grid: TokenGrid) -> BlockLayout:
    name = plan.layers[layer]
    found = plan.layout(0, name, plan.index.shape[2], grid)
    assert found is not None and found.heads.repair is not None
    return found


def by_tap(model: torch.nn.Module, plan: SparsityPlan, inputs: dict) -> torch.Tensor:  # type: ignore[type-arg]
    """The model's output with the plan, from the reference call by call."""
    layouts = [layout_of(plan, i, CASES["wan"].grid(SHAPE)) for i in range(len(plan.layers))]

    def callback(call):  # type: ignore[no-untyped-def]
        out, _ = reference_attention(call.q, call.k, call.v, layouts[call.layer_index], scale=call.scale)
        return out.to(call.q.dtype)

    with tap_attention(model, callback):
        return run(model, inputs)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_backends_repair_alike(backend: str) -> None:
    model, grid = wan(), TokenGrid(2, 6, 5, text_before=3, text_after=7)
    plan = with_repair(mixed_plan(model), 16)
    layout = layout_of(plan, 1, grid)
    torch.manual_seed(1)
    q, k, v = torch.randn(3, 2, grid.seq_len, 3, 16)
    out, lse = attend(q, k, v, layout, backend=backend, return_lse=True)
    want, want_lse = reference_attention(q, k, v, layout)
    assert_near(out.double(), want, ATTENTION)
    assert_near(lse.double(), want_lse, ATTENTION)
    plain = replace(layout, heads=replace(layout.heads, repair=None))
    without, _ = attend(q, k, v, plain, backend=backend, return_lse=True)
    assert torch.equal(out[:, :3], without[:, :3]) and torch.equal(out[:, -7:], without[:, -7:])
    assert torch.equal(out[:, :, 2], without[:, :, 2]) and not near(out, without, ATTENTION)
    # Some heads, as one of several GPUs has them.
    part = attend(*(x[:, :, 1:] for x in (q, k, v)), layout.of_heads(slice(1, 3)), backend=backend)
    assert_near(part, out[:, :, 1:], ATTENTION)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_logits_and_half_precision(dtype: torch.dtype) -> None:
    """Logits of up to about a hundred, as trained models have them."""
    model, grid = wan(), TokenGrid(2, 6, 5)
    layout = layout_of(with_repair(mixed_plan(model), 16), 0, grid)
    torch.manual_seed(2)
    q, k, v = torch.randn(3, 1, grid.seq_len, 3, 16)
    q, k, v = (5 * q).to(dtype), (5 * k).to(dtype), v.to(dtype)
    out = attend(q, k, v, layout, backend="cpu")
    want, _ = reference_attention(q, k, v, layout)
    # Logits are rounded before the exponential: their size is the gain.
    gain = float((q.float().transpose(1, 2) @ k.float().transpose(1, 2).mT).abs().max()) / 4
    assert gain > 50
    assert_near(out.double(), want, Work(16, sums=3, gain=gain if dtype == torch.float32 else 8, dtype=dtype))


def test_a_model_of_forty_layers() -> None:
    model, inputs = wan(layers=40), wan_inputs(*SHAPE)
    plan = with_repair(mixed_plan(model), 16, strength=0.1)
    with sparse_attention(model, plan):
        found = run(model, inputs)
    assert_near(found, by_tap(model, plan, inputs), Work(length=256, sums=8 * 40))


def test_heads_of_another_size_are_refused() -> None:
    model, grid = wan(), TokenGrid(2, 6, 5)
    layout = layout_of(with_repair(mixed_plan(model), 16), 0, grid)
    q = torch.randn(1, grid.seq_len, 3, 8)
    with pytest.raises(ValueError, match="q has heads of 8, the layout's repair is for heads of 16"):
        attend(q, q, q, layout)


def test_an_enabled_model_repairs_and_a_disabled_one_is_as_before() -> None:
    model, inputs = wan(), wan_inputs(*SHAPE)
    dense, weights = run(model, inputs), {k: v.clone() for k, v in model.state_dict().items()}
    plain = mixed_plan(model)
    plan = with_repair(plain, 16)
    with sparse_attention(model, plain):
        without = run(model, inputs)
    with sparse_attention(model, plan):
        found = run(model, inputs)
        assert sparse_attention_summary(model).transformers["transformer"].repaired_heads == 4
    assert_near(found, by_tap(model, plan, inputs), MODEL)
    assert not near(found, without, MODEL)
    assert torch.equal(run(model, inputs), dense)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in weights.items())


def test_layers_with_the_same_entries_have_repairs_of_their_own() -> None:
    model, inputs = wan(), wan_inputs(*SHAPE)
    plan = mixed_plan(model)
    same = replace(plan, index=np.repeat(plan.index[:, :1], plan.index.shape[1], 1))
    fixed = with_repair(same, 16)
    with sparse_attention(model, fixed):
        found = run(model, inputs)
    assert_near(found, by_tap(model, fixed, inputs), MODEL)


def test_a_model_with_heads_of_another_size_is_refused_before_anything_runs() -> None:
    model = wan()
    plan = with_repair(replace(mixed_plan(model), architecture=None), 32)
    with (
        pytest.raises(PlanError, match="head_dim: the plan's repair is for 32, the model has 16"),
        sparse_attention(model, plan),
    ):
        pass
    with sparse_attention(model, plan, strict=False):
        assert torch.isfinite(run(model, wan_inputs(*SHAPE))).all()
        layers = sparse_attention_summary(model).transformers["transformer"].layers
        assert all(layer.sparse_calls == 0 and "heads of 32" in str(layer.dense_reasons) for layer in layers)


@pytest.mark.slow(reason="compiles a model")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_layers_share_a_graph(backend: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model, inputs = wan(layers=4), wan_inputs(*SHAPE)
    plan = with_repair(mixed_plan(model), 16)
    with sparse_attention(model, plan):
        wanted = run(model, inputs)
    counter = CompileCounterWithBackend(backend)
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    with sparse_attention(model, plan):
        assert_near(run(model, inputs), wanted, MODEL)
        assert counter.frame_count == 1
    with sparse_attention(model, with_repair(mixed_plan(model), 16, seed=1)):
        other = run(model, inputs)
    assert counter.frame_count == 2 and not near(other, wanted, MODEL)  # one more for the other plan
    torch._dynamo.reset()
