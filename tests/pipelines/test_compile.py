"""Compiled transformers: one graph for all layers, and no stale graph after enabling or disabling."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from diffsparse.pipelines import (
    disable_sparse_attention,
    enable_sparse_attention,
    sparse_attention,
    sparse_attention_summary,
    tap_attention,
)
from diffsparse.pipelines.families.tested import features_of
from diffsparse.preset_plans import preset
from diffsparse.schedule import Schedule
from tests.pipelines.claims import shows
from tests.pipelines.models import CASES, generate, mixed_plan, run, wan, wan_inputs, wan_pipeline
from tests.tolerance import GENERATION, MODEL, assert_near

pytestmark = [pytest.mark.slow(reason="every test compiles a model"), pytest.mark.usefixtures("fresh_dynamo")]


def _counter(backend: str) -> Any:
    from torch._dynamo.testing import CompileCounterWithBackend

    return CompileCounterWithBackend(backend)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_repeated_blocks(backend: str) -> None:
    layers = 12
    model = wan(layers=layers)
    inputs = wan_inputs(3, 7, 9)
    late = wan_inputs(3, 7, 9, timestep=990)
    dense = run(model, inputs)
    plan = preset("window", tail="none")
    with sparse_attention(model, plan):
        sparse = run(model, inputs)
    counter = _counter(backend)
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    assert_near(run(model, inputs), dense, MODEL)
    assert counter.frame_count == 1
    enable_sparse_attention(model, plan)
    assert_near(run(model, inputs), sparse, MODEL)
    assert counter.frame_count == 2  # one graph for twelve layers
    run(model, late)
    assert counter.frame_count == 3  # the dense steps
    assert_near(run(model, inputs), sparse, MODEL)
    assert counter.frame_count == 3
    found = sparse_attention_summary(model).transformers["transformer"]
    assert (found.sparse_calls, found.dense_calls) == (2 * layers, layers)
    assert found.density == pytest.approx((2 * found.call_density + 1) / 3)
    disable_sparse_attention(model)
    assert_near(run(model, inputs), dense, MODEL)


@pytest.mark.parametrize("packed", [False, True])
def test_layers_that_differ_share_graphs(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wan(layers=12)
    inputs = wan_inputs(3, 7, 9)
    plan = mixed_plan(model)
    with sparse_attention(model, plan):
        sparse = run(model, inputs)
    monkeypatch.setattr("diffsparse.pipelines.state._is_packed", lambda *_: packed)
    counter = _counter("aot_eager")
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    enable_sparse_attention(model, plan)
    assert_near(run(model, inputs), sparse, MODEL)
    assert counter.frame_count == 1  # whatever orders, and however many blocks, their heads have


KINDS = ("blocks", "module", "wrapper")


def _compile(pipe: Any, kind: str, backend: Any) -> None:
    """In each of the three ways that users have."""
    if kind == "blocks":
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
    elif kind == "module":
        pipe.transformer.compile(fullgraph=True, backend=backend)
    else:
        pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend=backend)


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_model_takes_any_number_of_plans(kind: str) -> None:
    """More than Dynamo keeps graphs of one function (``recompile_limit``), past which it would give up."""
    pipe = wan_pipeline()
    inputs = wan_inputs(3, 7, 9)
    plans = [preset("window", size=(1, 0.1 * n, 0.5), tail="none") for n in range(1, 6)]
    dense = run(pipe.transformer, inputs)
    sparse = []
    for plan in plans:
        with sparse_attention(pipe.transformer, plan):
            sparse.append(run(pipe.transformer, inputs))
    _compile(pipe, kind, "eager")
    model = pipe.transformer
    for _ in range(2):
        for plan, expected in zip(plans, sparse, strict=True):
            with sparse_attention(model, plan):
                assert_near(run(model, inputs), expected, MODEL)
            assert_near(run(model, inputs), dense, MODEL)


def test_plans_of_an_offloaded_model_leave_other_graphs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a hook of accelerate's stands for a module's forward, too."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = add_hook_to_module(wan(), ModelHook())
    assert not hasattr(model.forward, "__code__")
    monkeypatch.setattr(torch._dynamo, "reset", lambda: pytest.fail("all graphs of the process were thrown away"))
    counter = _counter("eager")
    other = torch.compile(lambda x: x + 1, backend=counter)
    inputs = wan_inputs(3, 7, 9)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    for _ in range(2):
        other(torch.ones(2))
        with sparse_attention(model, preset("window", tail="none")):
            run(model, inputs)
    assert counter.frame_count == 1
    monkeypatch.undo()


@shows("whole model compiled", "WanTransformer3DModel")
@pytest.mark.parametrize("first", ["plan first", "compiled first"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_graph_is_made_anew_from_step_to_step(kind: str, first: str) -> None:
    """A generation through dense steps and three phases with other entries: at most one graph for each."""
    steps, schedule = 12, Schedule(sparse_below=0.95, phase_bounds=(0.7, 0.4))
    pipe = wan_pipeline(layers=4)
    plan = mixed_plan(pipe.transformer, schedule)
    with pipe.sparse_attention(plan):
        expected = generate(pipe, steps)
        eager = pipe.sparse_attention_summary().transformers["transformer"]
    counter = _counter("aot_eager")
    if first == "plan first":
        pipe.enable_sparse_attention(plan)
        _compile(pipe, kind, counter)
    else:
        _compile(pipe, kind, counter)
        pipe.enable_sparse_attention(plan)
    graphs: dict[int | None, set[int]] = {}

    def count(pipe: Any, step: int, timestep: torch.Tensor, values: dict[str, Any]) -> dict[str, Any]:
        graphs.setdefault(schedule.phase(float(timestep) / 1000), set()).add(counter.frame_count)
        return {}

    assert_near(generate(pipe, steps, callback_on_step_end=count), expected, GENERATION)
    assert set(graphs) == {None, 0, 1, 2}
    assert all(len(seen) == 1 for seen in graphs.values())  # all there are after a phase's first step
    assert counter.frame_count <= (4 if kind == "wrapper" else 2)
    found = pipe.sparse_attention_summary().transformers["transformer"]
    assert (found.forwards, found.sparse_calls, found.dense_calls) == (
        eager.forwards, eager.sparse_calls, eager.dense_calls,
    )  # fmt: skip
    assert found.density == pytest.approx(eager.density) and found.dense_reasons == eager.dense_reasons
    before = counter.frame_count
    assert_near(generate(pipe, steps, seed=1), generate(pipe, steps, seed=1), GENERATION)
    assert counter.frame_count == before


def test_a_function_around_an_enabled_model_says_what_to_compile() -> None:
    model, inputs = wan(), wan_inputs(3, 7, 9)
    enable_sparse_attention(model, "window")
    around = torch.compile(lambda **arguments: model(**arguments)[0], fullgraph=True, backend="eager")
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.Unsupported, match="compile the model itself"):
        around(**inputs)
    torch._dynamo.reset()
    with sparse_attention(wan(), "window"):
        expected = run(model, inputs)
    broken = torch.compile(lambda **arguments: model(**arguments)[0], backend="eager")  # graph breaks are allowed
    with torch.no_grad():
        assert_near(broken(**inputs), expected, MODEL)


@pytest.mark.parametrize("wrapped", [True, False])
def test_whole_model(wrapped: bool) -> None:
    model = wan(layers=4)
    inputs = wan_inputs(3, 7, 9)
    dense = run(model, inputs)
    with sparse_attention(model, "window"):
        sparse = run(model, inputs)
    if wrapped:
        compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    else:
        model.compile(backend="aot_eager", fullgraph=True)
        compiled = model
    assert_near(run(compiled, inputs), dense, MODEL)
    enable_sparse_attention(compiled, "window")
    assert_near(run(compiled, inputs), sparse, MODEL)
    assert sparse_attention_summary(compiled).transformers["transformer"].sparse_calls == 4
    disable_sparse_attention(compiled)
    assert_near(run(compiled, inputs), dense, MODEL)


@pytest.mark.parametrize("name", ["hunyuan", "flux"])
def test_families_with_text(name: str) -> None:
    case = CASES[name]
    model = case.build()
    inputs = case.inputs(*case.shapes[0])
    plan = mixed_plan(model)
    with sparse_attention(model, plan):
        sparse = run(model, inputs)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    enable_sparse_attention(model, plan)
    assert_near(run(model, inputs), sparse, MODEL)
    other = case.inputs(*case.shapes[1])
    compiled = run(model, other)
    disable_sparse_attention(model)
    eager = case.build()
    with sparse_attention(eager, plan):
        assert_near(compiled, run(eager, other), MODEL)


@pytest.mark.parametrize("name", CASES)
def test_blocks_of_every_family(name: str) -> None:
    """Every block that holds attention, compiled by itself with ``fullgraph``, gives what eager gives."""
    case = CASES[name]
    model = case.build()
    inputs = case.inputs(*case.shapes[0])
    plan = mixed_plan(model)
    dense = run(model, inputs)
    with sparse_attention(model, plan):
        sparse = run(model, inputs)
    for block in _blocks(model, case.layers):
        block.compile(fullgraph=True, backend="aot_eager")
    assert_near(run(model, inputs), dense, GENERATION)
    enable_sparse_attention(model, plan)  # after compiling
    expected = sparse if "compiled blocks" in features_of(type(model).__name__) else dense
    assert_near(run(model, inputs), expected, GENERATION)
    found = sparse_attention_summary(model).transformers["transformer"]
    if expected is dense:
        assert found.dense_reasons == {
            "compiled code does not know the number of text tokens": len(case.layers) * case.calls
        }
    else:
        assert found.dense_calls == 0 and found.sparse_calls == len(case.layers)
    disable_sparse_attention(model)
    # Whoever compiles, enables and disables in one process has graphs of three kinds.
    with torch._dynamo.config.patch(recompile_limit=16):
        assert_near(run(model, inputs), dense, GENERATION)


def _blocks(model: torch.nn.Module, layers: tuple[str, ...]) -> list[torch.nn.Module]:
    """The modules in lists of blocks that hold these layers: ``blocks.0`` for ``blocks.0.attn1``."""
    names = {re.match(r".*?\.\d+(?=\.)", layer)[0] for layer in layers}  # type: ignore[index]
    return [model.get_submodule(name) for name in sorted(names)]


def test_a_tap_refuses_compiled_models() -> None:
    model = wan()
    model.compile_repeated_blocks(backend="eager")
    with pytest.raises(RuntimeError, match="compiled"), tap_attention(model, lambda call: None):
        pass
