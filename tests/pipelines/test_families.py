"""Every family: which layers, which grid, and that a plan does what it says."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

from diffsparse.entry import Execution, HeadEntry
from diffsparse.pipelines import (
    AttentionCall,
    architecture_of,
    disable_sparse_attention,
    enable_sparse_attention,
    patch,
    sparse_attention,
    sparse_attention_summary,
    tap_attention,
)
from diffsparse.pipelines.context import CTX
from diffsparse.pipelines.state import LayerState
from diffsparse.plan import SparsityPlan
from diffsparse.preset_plans import preset
from tests.pipelines.models import CASES, Case, dense_plan, masked_attention, mixed_plan, run
from tests.tolerance import MODEL, assert_near

every_family = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@every_family
def test_layers_and_grid(case: Case) -> None:
    model = case.build()
    architecture = architecture_of(model)
    assert architecture.layers == case.layers
    assert (architecture.heads, architecture.head_dim) == (case.heads, case.head_dim)
    calls: list[AttentionCall] = []
    dense = run(model, inputs := case.inputs(*case.shapes[0], timestep=250))
    with tap_attention(model, calls.append):
        assert torch.equal(run(model, inputs), dense)
    assert sorted(call.layer for call in calls) == sorted(case.layers * case.calls)
    for call in calls:
        assert architecture.layers[call.layer_index] == call.layer
        assert call.grid == case.grid(case.shapes[0], call.layer)
        assert call.q.shape == call.k.shape == call.v.shape
        assert call.q.shape[1:] == (call.grid.seq_len, case.heads, case.head_dim)
        assert call.noise_level == pytest.approx(0.25)
        assert (call.kv_len is not None) == case.masked


@every_family
@pytest.mark.parametrize("named", [True, False])
def test_all_dense_plan_is_bitwise_dense(case: Case, named: bool) -> None:
    model = case.build()
    inputs = case.inputs(*case.shapes[0])
    dense = run(model, inputs)
    with sparse_attention(model, dense_plan(model) if named else preset("dense")):
        assert torch.equal(run(model, inputs), dense)
        summary = sparse_attention_summary(model).transformers["transformer"]
    assert summary.density == 1.0 and summary.sparse_calls == 0 and summary.dense_calls == len(case.layers) * case.calls


@every_family
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_plan_equals_masked_attention(case: Case, backend: str) -> None:
    """Two resolutions with as many tokens, in turn: a layout found by its token count would be the wrong one."""
    model = case.build()
    plan = mixed_plan(model)
    batches = [case.inputs(*shape) for shape in case.shapes]
    dense = [run(model, inputs) for inputs in batches]
    with tap_attention(model, masked_attention(plan)):
        expected = [run(model, inputs) for inputs in batches]
    enable_sparse_attention(model, plan, backend=backend)
    for i in (0, 1, 0, 1):
        assert_near(run(model, batches[i]), expected[i], MODEL)
        assert (expected[i] - dense[i]).abs().max() > 1e-3
    summary = sparse_attention_summary(model).transformers["transformer"]
    assert summary.sparse_calls == 4 * len(case.layers) * case.calls and summary.dense_calls == 0
    assert summary.grids == {str(case.grid(shape)): 2 for shape in case.shapes}
    disable_sparse_attention(model)
    for inputs, output in zip(batches, dense):
        assert torch.equal(run(model, inputs), output)


@every_family
def test_density_is_what_the_plan_says(case: Case) -> None:
    model = case.build()
    plan = mixed_plan(model)
    # A layer without text has the densities of a plan on the grid without text.
    expected = plan.call_densities(case.grid(case.shapes[0]))
    bare = plan.call_densities(case.grid(case.shapes[0]).visual_only())
    for i, layer in enumerate(case.layers):
        if layer in case.visual_only:
            expected[:, i] = bare[:, i]
    with sparse_attention(model, plan):
        run(model, case.inputs(*case.shapes[0]))
        summary = sparse_attention_summary(model)
    layers = summary.transformers["transformer"].layers
    assert [layer.density for layer in layers] == pytest.approx(expected[0].tolist())
    work = [case.grid(case.shapes[0], layer).seq_len ** 2 for layer in case.layers]
    assert summary.density == pytest.approx((expected[0] * work).sum() / sum(work))
    assert 0 < summary.density < 1


@every_family
def test_disable_leaves_nothing(case: Case) -> None:
    model = case.build()
    before = _traces(model)
    keys = list(model.state_dict())
    enable_sparse_attention(model, mixed_plan(model))
    assert _traces(model) != before
    assert list(model.state_dict()) == keys
    disable_sparse_attention(model)
    assert _traces(model) == before


def _traces(model: torch.nn.Module) -> list[tuple[str, list[str], int, int, str]]:
    return [
        (
            name,
            sorted(m.__dict__),
            len(m._forward_hooks) + len(m._forward_hooks_with_kwargs) + len(m._forward_hooks_always_called),
            len(m._forward_pre_hooks) + len(m._forward_pre_hooks_with_kwargs),
            str(type(getattr(m, "processor", None))),
        )
        for name, m in model.named_modules()
    ]


@every_family
def test_deepcopy_is_independent(case: Case) -> None:
    model = case.build()
    inputs = case.inputs(*case.shapes[0])
    dense = run(model, inputs)
    enable_sparse_attention(model, mixed_plan(model))
    sparse = run(model, inputs)
    twin = copy.deepcopy(model)
    disable_sparse_attention(model)
    assert torch.equal(run(model, inputs), dense)
    assert torch.equal(run(twin, inputs), sparse)
    assert sparse_attention_summary(twin).transformers["transformer"].forwards == 2
    assert not sparse_attention_summary(model).enabled
    disable_sparse_attention(twin)
    assert torch.equal(run(twin, inputs), dense)


@every_family
def test_only_the_familys_layers_are_touched(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all modules with an attention processor (cross-attention, text refiners, sound), and of all calls."""
    model = case.build()
    inputs = case.inputs(*case.shapes[0])
    others = {n: m for n, m in model.named_modules() if hasattr(m, "processor") and n not in case.layers}

    def calls_of_others() -> dict[str, int]:
        """How often each ran; none of them may be taken for a layer of the plan."""
        seen: dict[str, int] = {}

        def count(module: torch.nn.Module, args: object, name: str) -> None:
            assert CTX.layer is None, f"{name} runs inside {CTX.layer.name}"
            seen[name] = seen.get(name, 0) + 1

        handles = [m.register_forward_pre_hook(partial(count, name=n)) for n, m in others.items()]
        run(model, inputs)
        for handle in handles:
            handle.remove()
        return seen

    routed: list[str] = []

    def route(layer: LayerState, *args: object) -> torch.Tensor:
        routed.append(layer.name)
        return original(layer, *args)

    original = patch.attend
    monkeypatch.setattr(patch, "attend", route)
    before = calls_of_others()
    assert not routed
    with sparse_attention(model, mixed_plan(model)):
        assert calls_of_others() == before
        summary = sparse_attention_summary(model).transformers["transformer"]
    assert sorted(routed) == sorted(case.layers * case.calls)
    assert summary.sparse_calls == len(routed)
    if case is CASES["wan"]:
        assert before == {"blocks.0.attn2": 1, "blocks.1.attn2": 1}


def test_a_plan_that_skips_every_head_zeroes_self_attention_alone() -> None:
    """Cross-attention gives what it gave, to queries that have no self-attention in them."""
    model, inputs = CASES["wan"].build(), CASES["wan"].inputs(3, 7, 9)
    with tap_attention(model, lambda call: torch.zeros_like(call.q)):
        expected = run(model, inputs)
    with sparse_attention(model, SparsityPlan.uniform(HeadEntry(execution=Execution("skip")))):
        assert torch.equal(run(model, inputs), expected)
        summary = sparse_attention_summary(model).transformers["transformer"]
    assert summary.sparse_calls == 2 and summary.density == 0


def test_fused_projections_and_attention_backend() -> None:
    for name in ("wan", "cogvideox", "flux"):
        case = CASES[name]
        model = case.build()
        plan = mixed_plan(model)
        inputs = case.inputs(*case.shapes[0])
        with sparse_attention(model, plan):
            expected = run(model, inputs)
        model.fuse_qkv_projections()
        enable_sparse_attention(model, plan)
        assert_near(run(model, inputs), expected, MODEL)
        model.unfuse_qkv_projections()
        assert_near(run(model, inputs), expected, MODEL)
        disable_sparse_attention(model)


def test_attention_backend_before_and_after(native_afterwards: None) -> None:
    for name in ("wan", "flux"):
        case = CASES[name]
        model = case.build()
        plan = mixed_plan(model)
        inputs = case.inputs(*case.shapes[0])
        with sparse_attention(model, plan):
            expected = run(model, inputs)
        model.set_attention_backend("native")
        enable_sparse_attention(model, plan)
        assert torch.equal(run(model, inputs), expected)
        model.set_attention_backend("_native_math")  # cross-attention uses it too, so not bitwise
        assert_near(run(model, inputs), expected, MODEL)
        assert sparse_attention_summary(model).transformers["transformer"].dense_calls == 0


def test_fused_after_enabling() -> None:
    case = CASES["cogvideox"]  # installs one shared processor of another class
    model = case.build()
    inputs = case.inputs(*case.shapes[0])
    enable_sparse_attention(model, mixed_plan(model))
    expected = run(model, inputs)
    model.fuse_qkv_projections()
    assert_near(run(model, inputs), expected, MODEL)
    assert sparse_attention_summary(model).transformers["transformer"].dense_calls == 0
