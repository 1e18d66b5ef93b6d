"""What compiled layers did is counted as it was, for every reason for which they may have run dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from diffsparse.pipelines import attend, patch, sparse_attention, sparse_attention_summary
from diffsparse.pipelines.policy import UNKNOWN
from diffsparse.preset_plans import preset
from tests.pipelines import zoo_image
from tests.pipelines.case import TEXT
from tests.pipelines.models import mixed_plan, wan, wan_inputs
from tests.tolerance import MODEL, assert_near

pytestmark = [pytest.mark.slow(reason="every test compiles a model"), pytest.mark.usefixtures("fresh_dynamo")]

LAYERS = 3
WINDOW = preset("window", tail="none")
KINDS = ("blocks", "module", "wrapper")


class Attends:
    """A processor for Wan that calls attention once for each of ``calls``, which are options of the call.

    ``keys``: a share of the keys. ``tokens``: one of tokens. ``heads``: the first ones. The last call is the output.
    """

    def __init__(self, *calls: dict[str, Any]) -> None:
        self.calls = calls or ({},)

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        q, k, v = (f(hidden_states).unflatten(2, (attn.heads, -1)) for f in (attn.to_q, attn.to_k, attn.to_v))
        seq = q.shape[1]
        for options in self.calls:
            given = dict(options)
            tokens, keys, heads = given.pop("tokens", 1.0), given.pop("keys", 1.0), given.pop("heads", attn.heads)
            if "mask" in given:
                given["attn_mask"] = given.pop("mask")(seq)
            part = [x[:, : int(n * seq), :heads] for x, n in ((q, tokens), (k, tokens * keys), (v, tokens * keys))]
            out = patch.routed_dispatch(*part, **given)
        padding = (0, 0, 0, attn.heads - out.shape[2], 0, seq - out.shape[1])
        return attn.to_out[0](torch.nn.functional.pad(out, padding).flatten(2, 3))


def attending(*calls: dict[str, Any]) -> torch.nn.Module:
    model = wan(layers=LAYERS)
    for block in model.blocks:
        block.attn1.set_processor(Attends(*calls))
    return model


def counted(
    model: torch.nn.Module, inputs: dict[str, Any], kind: str = "", plan: Any = WINDOW, grad: bool = False
) -> tuple[torch.Tensor, Any, int]:
    """Two forwards under a plan: the last output, the summary, and how many graphs there are.

    kind: how the model is compiled, if it is.
    """
    from torch._dynamo.testing import CompileCounterWithBackend

    counter, called = CompileCounterWithBackend("eager"), model
    with sparse_attention(model, plan), torch.set_grad_enabled(grad):
        if kind == "blocks":
            model.compile_repeated_blocks(fullgraph=True, backend=counter)
        elif kind == "module":
            model.compile(fullgraph=True, backend=counter)
        elif kind == "wrapper":
            called = torch.compile(model, fullgraph=True, backend=counter)
        for _ in range(2):
            out = called(**inputs)[0]
        return out.detach(), sparse_attention_summary(model).transformers["transformer"], counter.frame_count


def check_as_eager(build: Callable[[], torch.nn.Module], inputs: dict[str, Any], kind: str, **options: Any) -> Any:
    """A compiled model's summary is an uncompiled one's, but for names of backends and details of reasons."""
    expected, eager, _ = counted(build(), inputs, **options)
    out, found, graphs = counted(build(), inputs, kind, **options)
    assert_near(out, expected, MODEL)
    assert graphs <= 2, "layers that do the same share a graph"
    for one, other in zip(found.layers, eager.layers, strict=True):
        assert (one.sparse_calls, one.dense_calls, one.unseen_calls, one.density) == (
            other.sparse_calls, other.dense_calls, other.unseen_calls, other.density,
        )  # fmt: skip
        assert one.total_density == other.total_density
    return found, eager


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str) -> None:
    found, eager = check_as_eager(lambda: wan(layers=LAYERS), wan_inputs(3, 7, 9), kind, grad=True)
    assert found.dense_reasons == eager.dense_reasons == {"gradients are needed": 2 * LAYERS}
    assert found.density == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_that_is_added(kind: str) -> None:
    inputs = zoo_image.packed_inputs(1, 13, 16)
    inputs["attention_mask"] = torch.ones(1, TEXT + 208)
    inputs["attention_mask"][:, 4:TEXT] = 0
    found, eager = check_as_eager(zoo_image.chroma, inputs, kind, plan=mixed_plan(zoo_image.chroma()))
    assert found.dense_reasons == eager.dense_reasons == {"a mask that is not a key-padding mask": 2 * 3}


REASONS = {
    "dropout": {"dropout_p": 1e-9},
    "causal attention": {"is_causal": True},
    "context parallel": {"parallel_config": "a mesh"},
    "extra arguments for the attention backend": {"attention_kwargs": {"return_lse": False}},
    "a mask that is not a key-padding mask": {"mask": lambda seq: torch.ones(1, 1, seq, seq, dtype=torch.bool).tril()},
    "a key mask over visual tokens": {"mask": lambda seq: torch.ones(1, 1, 1, seq, dtype=torch.bool)},
}


@pytest.mark.parametrize("reason", REASONS)
def test_every_kind_of_call_that_runs_dense(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason == "context parallel":  # with one process there is none; what is decided does not depend on that
        own = patch._dispatch
        monkeypatch.setattr(patch, "_dispatch", lambda *args, parallel_config, **options: own(*args, **options))
    found, eager = check_as_eager(lambda: attending(REASONS[reason]), wan_inputs(3, 7, 9), "blocks")
    assert found.dense_reasons == eager.dense_reasons == {reason: 2 * LAYERS}


@pytest.mark.parametrize("options", [{"tokens": 0.5}, {"heads": 2}])
def test_calls_of_another_size(options: dict[str, Any]) -> None:
    """How many tokens such a call had is known in uncompiled code alone, so work is counted as on the grid."""
    inputs = wan_inputs(3, 7, 9)
    eager = counted(attending(options), inputs)[1]
    found = counted(attending(options), inputs, "blocks")[1]
    assert found.dense_calls == eager.dense_calls == 2 * LAYERS and found.sparse_calls == eager.sparse_calls == 0
    (reason,) = found.dense_reasons
    assert ("tokens" if "tokens" in options else "heads") in reason and found.density == 1


@pytest.mark.parametrize("kind", KINDS)
def test_several_calls_in_one_layer(kind: str) -> None:
    """One with other keys, one that has to run dense, two that run sparse."""
    calls = {"keys": 0.5}, {"is_causal": True}, {}, {}
    found, eager = check_as_eager(lambda: attending(*calls), wan_inputs(3, 7, 9), kind)
    assert (found.sparse_calls, found.dense_calls) == (4 * LAYERS, 2 * LAYERS)
    assert found.dense_reasons == eager.dense_reasons == {"causal attention": 2 * LAYERS}


def test_a_layer_whose_keys_are_never_its_own() -> None:
    found, _ = check_as_eager(lambda: attending({"keys": 0.5}), wan_inputs(3, 7, 9), "blocks")
    assert [layer.unseen_calls for layer in found.layers] == [2] * LAYERS


def test_a_block_that_runs_twice_is_counted_twice() -> None:
    def build() -> torch.nn.Module:
        model = wan(layers=LAYERS)
        model.blocks[2] = model.blocks[1]
        return model

    found, _ = check_as_eager(build, wan_inputs(3, 7, 9), "blocks")
    assert [layer.sparse_calls for layer in found.layers] == [2, 4]


def test_dense_steps_have_the_plans_reason_whatever_else_there_is() -> None:
    found, eager = check_as_eager(
        lambda: attending({"is_causal": True}), wan_inputs(3, 7, 9, timestep=990), "blocks", plan=preset("radial")
    )
    assert found.dense_reasons == eager.dense_reasons == {"noise level outside the plan's sparse range": 2 * LAYERS}


def test_layers_that_left_no_note_are_unknown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(attend, "_leave_note", lambda *note: None)
    found = counted(wan(layers=LAYERS), wan_inputs(3, 7, 9), "blocks")[1]
    assert (found.sparse_calls, found.dense_calls, found.density) == (0, 0, None)
    assert [layer.unseen_calls for layer in found.layers] == [2] * LAYERS
    assert UNKNOWN in caplog.text


@pytest.mark.parametrize("grad", [False, True])
def test_where_some_blocks_are_compiled(grad: bool) -> None:
    def build() -> torch.nn.Module:
        model = wan(layers=LAYERS)
        model.blocks[1].compile(fullgraph=True, backend="eager")
        return model

    inputs = wan_inputs(3, 7, 9)
    eager, found = counted(wan(layers=LAYERS), inputs, grad=grad)[1], counted(build(), inputs, grad=grad)[1]
    assert (found.sparse_calls, found.dense_calls) == (eager.sparse_calls, eager.dense_calls)
    assert found.density == eager.density and found.dense_reasons == eager.dense_reasons
