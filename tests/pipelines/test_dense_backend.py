"""``dense_backend="fastest"``: opt-in, measured once a shape, shown; without it dense calls are untouched."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from diffsparse.entry import HeadEntry
from diffsparse.kernels import dense as kernels
from diffsparse.kernels.dense import DENSE_KERNELS, OWN_WAY, DenseRace
from diffsparse.pipelines import (
    architecture_of,
    disable_sparse_attention,
    enable_sparse_attention,
    sparse_attention,
    sparse_attention_summary,
)
from diffsparse.pipelines import dense as choosing
from diffsparse.plan import SparsityPlan
from diffsparse.preset_plans import preset
from diffsparse.schedule import Schedule
from tests.pipelines.models import CASES, run, wan, wan_inputs
from tests.tolerance import MODEL, assert_near

SPARSE = preset("window", tail="none")
DENSE = preset("dense")


def choose(monkeypatch: pytest.MonkeyPatch, winner: str) -> list[tuple[int, ...]]:
    """Make a kernel win every race; the shapes that were raced."""
    shapes: list[tuple[int, ...]] = []

    def race(q: torch.Tensor, *args: Any, **options: Any) -> DenseRace:
        shapes.append(tuple(q.shape))
        return DenseRace(winner, {winner: 1.0, "slow": 2.0}, {"cudnn_sdpa": "not here"})

    monkeypatch.setattr(choosing, "race_dense", race)
    return shapes


def summary(model: Any) -> Any:
    return sparse_attention_summary(model).transformers["transformer"]


def test_measures_once_a_shape_and_runs_the_winner() -> None:
    """The real race, on whatever this machine has."""
    model = wan()
    inputs, late = wan_inputs(3, 7, 9), wan_inputs(3, 7, 9, timestep=990)
    dense = run(model, late)
    with sparse_attention(model, SPARSE, dense_backend="fastest"):
        out = run(model, late)
        run(model, inputs)
        run(model, late)
        found = summary(model)
    assert_near(out, dense, MODEL)
    layers = len(found.layers)
    assert (found.sparse_calls, found.dense_calls) == (layers, 2 * layers)
    assert sum(found.dense_kernels.values()) == 2 * layers and set(found.dense_kernels) <= {OWN_WAY, *DENSE_KERNELS}
    assert list(found.races) == ["1 x 189 tokens, 3 heads of 16, float32"]
    (excluded,) = found.race_excluded.values()
    assert excluded["cudnn_sdpa"] == "it runs on a GPU, q is on cpu"
    assert found.dense_backend == "fastest"


@pytest.mark.parametrize("winner", ["flash_sdpa", "diffsparse", OWN_WAY])
def test_the_winner_runs_dense_steps_and_layers(winner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = choose(monkeypatch, winner)
    calls: list[str] = []
    real = kernels._dense_op

    def counted(*args: Any) -> torch.Tensor:
        calls.append(args[-1])
        return real(*args)

    monkeypatch.setattr(kernels, "_dense_op", counted)
    model = wan()
    layers = architecture_of(model).layers
    inputs = wan_inputs(3, 7, 9)
    plan = SparsityPlan.uniform(SPARSE.entries[0], schedule=Schedule(dense_layers=(layers[1],)))
    with sparse_attention(model, plan, backend="cpu"):
        want = run(model, inputs)
    with sparse_attention(model, plan, backend="cpu", dense_backend="fastest"):
        out = run(model, inputs)
        found = summary(model)
    assert_near(out, want, MODEL)
    assert found.layers[1].dense_kernels == {winner: 1} and not found.layers[0].dense_kernels
    assert calls == ([] if winner == OWN_WAY else [winner]) and len(shapes) == 1
    text = str(sparse_attention_summary(model)) + str(found)
    assert winner in text
    if winner == OWN_WAY:
        assert torch.equal(out, want)


def test_the_summary_shows_the_race(monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, "flash_sdpa")
    model = wan()
    with sparse_attention(model, DENSE, dense_backend="fastest"):
        run(model, wan_inputs(3, 7, 9))
        found = sparse_attention_summary(model)
    line = "fastest dense attention for 1 x 189 tokens, 3 heads of 16, float32: flash_sdpa (flash_sdpa 1 ms, slow 2 ms)"
    assert line in str(found) and "dense calls ran on: flash_sdpa" in str(found)
    data = found.to_dict()["transformers"]["transformer"]
    assert data["dense_kernels"] == {"flash_sdpa": len(data["layers"])} and data["dense_backend"] == "fastest"


def test_by_default_dense_calls_are_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = choose(monkeypatch, "diffsparse")
    model = wan()
    inputs = wan_inputs(3, 7, 9)
    dense = run(model, inputs)
    with sparse_attention(model, DENSE):
        assert torch.equal(run(model, inputs), dense)
        found = summary(model)
    assert found.dense_calls == len(found.layers) and found.dense_backend is None
    assert not shapes and not found.dense_kernels and not found.races


def test_masked_calls_are_raced_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["hunyuan"]
    model = case.build()
    inputs = case.inputs(*case.shapes[0])
    dense = run(model, inputs)
    with sparse_attention(model, DENSE, dense_backend="fastest"):
        out = run(model, inputs)
        found = summary(model)
    assert_near(out, dense, MODEL)
    assert all(shape.endswith("float32, masked") for shape in found.races) and found.races
    for excluded in found.race_excluded.values():
        assert excluded["diffsparse"].startswith("it masks text tokens only")


def test_copies_and_pickles_keep_what_was_measured() -> None:
    model = wan()
    enable_sparse_attention(model, DENSE, dense_backend="fastest")
    run(model, wan_inputs(3, 7, 9))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        run(other, wan_inputs(3, 7, 9))
        assert summary(other).races == summary(model).races
    disable_sparse_attention(model)


def test_other_values_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown dense_backend 'cudnn'; it is None .* or 'fastest'"):
        enable_sparse_attention(wan(), DENSE, dense_backend="cudnn")


def test_calls_that_need_gradients_stay_with_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = choose(monkeypatch, "flash_sdpa")
    model = wan()
    inputs = wan_inputs(3, 7, 9)
    with sparse_attention(model, DENSE, dense_backend="fastest"):
        model(**inputs)[0].sum().backward()
    assert not shapes


@pytest.mark.slow(reason="compiles a model with Inductor")
def test_compiled_blocks_use_what_won_on_random_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    shapes = choose(monkeypatch, "flash_sdpa")
    model = wan(layers=4)
    late = wan_inputs(3, 7, 9, timestep=990)
    dense = run(model, late)
    counter = CompileCounterWithBackend("inductor")
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    enable_sparse_attention(model, SPARSE, dense_backend="fastest")
    assert_near(run(model, late), dense, MODEL)
    run(model, late)
    found = summary(model)
    assert counter.frame_count == 1 and shapes == [(1, 189, 3, 16)]
    assert found.dense_kernels == {"flash_sdpa": 8}
    run(model, wan_inputs(3, 7, 9))
    assert summary(model).sparse_calls == 4 and counter.frame_count == 2
    torch._dynamo.reset()


def test_dense_entries_are_dense_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, "flash_sdpa")
    model = wan()
    plan = SparsityPlan.uniform(HeadEntry())
    with sparse_attention(model, plan, dense_backend="fastest"):
        run(model, wan_inputs(3, 7, 9))
        assert summary(model).dense_kernels == {"flash_sdpa": len(architecture_of(model).layers)}


# -- dense heads beside sparse ones ------------------------------------------------------------------------------------


def mixed(model: Any) -> SparsityPlan:
    """The first layer has a dense head beside sparse ones, the second has none, the third two."""
    sparse = SPARSE.entries[0]
    heads = ([HeadEntry(), sparse, sparse], [sparse] * 3, [sparse, HeadEntry(), HeadEntry()])
    layers = architecture_of(model).layers
    return SparsityPlan.from_table({name: [heads[i % 3]] for i, name in enumerate(layers)})


@pytest.mark.parametrize("winner", ["flash_sdpa", "diffsparse"])
def test_dense_heads_run_on_the_winner(winner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffsparse.kernels.dense import dense_heads_

    choose(monkeypatch, winner)
    model = wan(layers=3)
    inputs = wan_inputs(3, 7, 9)
    calls: list[list[bool]] = []

    def counted(*args: Any, **options: Any) -> None:
        calls.append(args[4].tolist())
        dense_heads_(*args, **options)

    monkeypatch.setattr("diffsparse.pipelines.attend.dense_heads_", counted)
    with sparse_attention(model, mixed(model)):
        want = run(model, inputs)
    with sparse_attention(model, mixed(model), dense_backend="fastest"):
        out = run(model, inputs)
        found = summary(model)
    assert_near(out, want, MODEL)
    assert found.dense_calls == 0
    if winner == "diffsparse":  # the sparse kernel runs them as fast itself
        assert not calls and found.backends == {"cpu": 3}
    else:
        assert calls == [[True, False, False], [False, True, True]]
        assert found.backends == {"cpu, dense heads flash_sdpa": 2, "cpu": 1}


def test_dense_heads_beside_masked_text() -> None:
    case = CASES["hunyuan"]
    model = case.build()
    inputs = case.inputs(*case.shapes[0])
    with sparse_attention(model, mixed(model)):
        want = run(model, inputs)
    with sparse_attention(model, mixed(model), dense_backend="fastest"):
        assert_near(run(model, inputs), want, MODEL)
        assert any("dense heads" in name for name in summary(model).backends)


@pytest.mark.slow(reason="compiles two models")
@pytest.mark.parametrize("name", ["wan", "hunyuan"])
def test_dense_heads_cost_compiled_layers_no_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many graphs as without: a layer's dense heads are a tensor of one size."""
    from torch._dynamo.testing import CompileCounterWithBackend

    from diffsparse.pipelines.state import state_of

    choose(monkeypatch, "flash_sdpa")
    graphs: list[int] = []
    want: torch.Tensor | None = None
    for choice in (None, "fastest"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        if name == "wan":
            model, inputs = wan(layers=6), wan_inputs(3, 7, 9)
        else:
            case = CASES["hunyuan"]
            model, inputs = case.build(), case.inputs(*case.shapes[0])
        counter = CompileCounterWithBackend("inductor")
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
        with sparse_attention(model, mixed(model), dense_backend=choice):
            out = run(model, inputs)
            run(model, inputs)
            assert summary(model).dense_calls == 0
            state = state_of(model)
            assert state is not None
            apart = [layer.dense_heads for layer in state.layers]
        assert (None in apart) == (choice is None)
        graphs.append(counter.frame_count)
        want = out if want is None else want
    assert_near(out, want, MODEL)
    assert graphs[0] == graphs[1]
    torch._dynamo.reset()
