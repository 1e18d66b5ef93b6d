"""Families whose text and video share one sequence: what is special about each."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffsparse.grid import TokenGrid
from diffsparse.pipelines import (
    AttentionCall,
    disable_sparse_attention,
    enable_sparse_attention,
    sparse_attention,
    sparse_attention_summary,
    tap_attention,
)
from diffsparse.pipelines.family import family_by_class
from diffsparse.plan import SparsityPlan
from diffsparse.schedule import Schedule
from tests.pipelines.models import CASES, ENTRIES, masked_attention, mixed_plan, run
from tests.pipelines.zoo_joint import (
    framepack,
    framepack_inputs,
    hunyuan15,
    hunyuan15_inputs,
    mochi,
    mochi_inputs,
    motif,
    motif_inputs,
)
from tests.tolerance import MODEL, assert_near

SHAPE = (3, 7, 9)


def calls_of(model: torch.nn.Module, inputs: dict[str, Any]) -> list[AttentionCall]:
    """The calls of one forward, which must be what it is without a tap."""
    calls: list[AttentionCall] = []
    dense = run(model, inputs)
    with tap_attention(model, calls.append):
        assert torch.equal(run(model, inputs), dense)
    return calls


def check_plan(model: torch.nn.Module, inputs: dict[str, Any], calls: int) -> None:
    """A plan runs sparse in all calls of a forward, and does what it says."""
    plan = mixed_plan(model)
    dense = run(model, inputs)
    with tap_attention(model, masked_attention(plan)):
        expected = run(model, inputs)
    assert (expected - dense).abs().max() > 1e-3
    with sparse_attention(model, plan):
        assert_near(run(model, inputs), expected, MODEL)
        summary = sparse_attention_summary(model).transformers["transformer"]
    assert (summary.sparse_calls, summary.dense_calls) == (calls, 0)
    assert torch.equal(run(model, inputs), dense)


# -- HunyuanVideo 1.5: a processor of ours stands in for one that makes a mask of all pairs of tokens ------------------


class Largest(TorchDispatchMode):
    """The size of the largest mask that any operation returned, in entries."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.dtype == torch.bool:
                self.mask = max(self.mask, x.numel())
        return out


def test_hunyuan15_makes_no_mask_of_all_pairs() -> None:
    case = CASES["hunyuan15"]
    model = case.build()
    inputs = case.inputs(*SHAPE)
    tokens = case.grid(SHAPE).seq_len
    with Largest() as dense:
        run(model, inputs)
    assert dense.mask == 2 * tokens**2
    enable_sparse_attention(model, mixed_plan(model))
    run(model, inputs)  # the layouts are there now
    with Largest() as sparse:
        run(model, inputs)
    assert sparse.mask == 2 * tokens


def _own_calls(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Layers whose own processor was called, as they are called."""
    seen: list[str] = []
    names = {id(m): name for name, m in model.named_modules()}
    kind = type(model.transformer_blocks[0].attn.processor)
    own = kind.__call__

    def spy(self: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(names[id(attn)])
        return own(self, attn, *args, **kwargs)

    monkeypatch.setattr(kind, "__call__", spy)
    return seen


def test_hunyuan15_own_processor_runs_what_is_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hunyuan15()
    first, second = CASES["hunyuan15"].layers
    inputs, early = (hunyuan15_inputs(*SHAPE, timestep=t) for t in (500, 990))
    dense_early = run(model, early)
    seen = _own_calls(model, monkeypatch)
    plan = SparsityPlan.uniform(ENTRIES[0], schedule=Schedule(sparse_below=0.9, dense_layers=(first,)))
    with sparse_attention(model, plan):
        run(model, inputs)
        assert seen == [first]
        assert torch.equal(run(model, early), dense_early)
        assert seen == [first, first, second]
        summary = sparse_attention_summary(model).transformers["transformer"]
    assert (summary.sparse_calls, summary.dense_calls) == (1, 3)
    assert not any("mask" in reason for layer in summary.layers for reason in layer.dense_reasons)


def test_hunyuan15_text_only() -> None:
    """Without a picture its tokens are padding: they stand last, and count as text."""
    model = hunyuan15()
    inputs = {**hunyuan15_inputs(*SHAPE), "image_embeds": torch.zeros(2, 3, 12)}
    for call in calls_of(model, inputs):
        assert call.grid == TokenGrid(*SHAPE, text_after=14)
        assert call.kv_len is not None
        assert call.kv_len.sum(dim=1).tolist() == [189 + 11, 189 + 6]


def test_hunyuan15_processors_come_back() -> None:
    model = hunyuan15()
    inputs = hunyuan15_inputs(*SHAPE)
    dense = run(model, inputs)
    own = dict(model.attn_processors)
    enable_sparse_attention(model, mixed_plan(model))
    sparse = run(model, inputs)
    ours = dict(model.attn_processors)
    assert [name for name in own if ours[name] is not own[name]] == [
        f"{n}.processor" for n in CASES["hunyuan15"].layers
    ]
    model.set_attention_backend("_native_math")
    assert_near(run(model, inputs), sparse, MODEL)
    disable_sparse_attention(model)
    assert all(a is b for a, b in zip(model.attn_processors.values(), own.values()))
    assert all(p._attention_backend == "_native_math" for p in own.values() if hasattr(p, "_attention_backend"))
    model.set_attention_backend("native")
    assert torch.equal(run(model, inputs), dense)
    # Ours, kept by somebody and put back: they only hand over, also while it is enabled again.
    model.set_attn_processor(ours)
    assert torch.equal(run(model, inputs), dense)
    with sparse_attention(model, mixed_plan(model)):
        assert torch.equal(run(model, inputs), sparse)
    assert all(a is b for a, b in zip(model.attn_processors.values(), own.values()))


def test_hunyuan15_after_an_exception() -> None:
    model = hunyuan15()
    inputs = hunyuan15_inputs(*SHAPE)
    dense = run(model, inputs)
    own = dict(model.attn_processors)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), sparse_attention(model, mixed_plan(model)):
        model.transformer_blocks[1].attn.to_q.register_forward_hook(fail)
        run(model, inputs)
    model.transformer_blocks[1].attn.to_q._forward_hooks.clear()
    assert all(a is b for a, b in zip(model.attn_processors.values(), own.values()))
    assert torch.equal(run(model, inputs), dense)


def test_hunyuan15_pickle_and_save(tmp_path: Path) -> None:
    model = hunyuan15()
    inputs = hunyuan15_inputs(*SHAPE)
    dense = run(model, inputs)
    enable_sparse_attention(model, mixed_plan(model))
    sparse = run(model, inputs)
    twin = pickle.load(io.BytesIO(pickle.dumps(model)))
    model.save_pretrained(tmp_path)
    disable_sparse_attention(model)
    assert torch.equal(run(twin, inputs), sparse)
    disable_sparse_attention(twin)
    assert torch.equal(run(twin, inputs), dense)
    assert [type(p) for p in twin.attn_processors.values()] == [type(p) for p in model.attn_processors.values()]
    assert torch.equal(run(type(model).from_pretrained(tmp_path), inputs), dense)


def test_hunyuan15_processor_of_somebody_else() -> None:
    """Ours stands in for the one that it knows; another is left, and what it does with its full mask is dense."""
    model = hunyuan15()
    inputs = hunyuan15_inputs(*SHAPE)
    dense = run(model, inputs)
    own = type(model.transformer_blocks[0].attn.processor)
    other = type("OtherProcessor", (own,), {})
    model.transformer_blocks[0].attn.set_processor(other())
    enable_sparse_attention(model, mixed_plan(model))
    assert type(model.transformer_blocks[0].attn.processor) is other
    run(model, inputs)
    model.transformer_blocks[1].attn.set_processor(other())
    assert torch.equal(run(model, inputs), dense)
    layers = sparse_attention_summary(model).transformers["transformer"].layers
    assert [(layer.sparse_calls, layer.dense_calls) for layer in layers] == [(0, 2), (1, 1)]
    assert list(layers[0].dense_reasons) == ["a mask that is not a key-padding mask"]
    disable_sparse_attention(model)
    assert all(type(block.attn.processor) is other for block in model.transformer_blocks)


def test_hunyuan15_fused_projections() -> None:
    model = hunyuan15()
    inputs = hunyuan15_inputs(*SHAPE)
    dense = run(model, inputs)
    enable_sparse_attention(model, mixed_plan(model))
    sparse = run(model, inputs)
    for block in model.transformer_blocks:
        block.attn.fuse_projections()
    assert_near(run(model, inputs), sparse, MODEL)
    disable_sparse_attention(model)
    assert_near(run(model, inputs), dense, MODEL)


def test_hunyuan15_gradients() -> None:
    model = hunyuan15()
    inputs = {**hunyuan15_inputs(*SHAPE), "hidden_states": torch.randn(2, 4, *SHAPE, requires_grad=True)}

    def gradient() -> torch.Tensor:
        return torch.autograd.grad(model(**inputs)[0].square().sum(), inputs["hidden_states"])[0]

    expected = gradient()
    with sparse_attention(model, mixed_plan(model)):
        assert_near(gradient(), expected, MODEL)
        layers = sparse_attention_summary(model).transformers["transformer"].layers
    assert [list(layer.dense_reasons) for layer in layers] == [["gradients are needed"]] * 2


@pytest.mark.slow(reason="compiles a model")
def test_hunyuan15_compiled(fresh_dynamo: None) -> None:
    model = hunyuan15(num_layers=4)
    inputs, late = (hunyuan15_inputs(*SHAPE, timestep=t) for t in (500, 990))
    plan = mixed_plan(model, Schedule(sparse_below=0.9))
    dense, dense_late = run(model, inputs), run(model, late)
    with sparse_attention(model, plan):
        sparse = run(model, inputs)
    for block in model.transformer_blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    assert_near(run(model, inputs), dense, MODEL)
    enable_sparse_attention(model, plan)
    assert_near(run(model, inputs), sparse, MODEL)
    assert_near(run(model, late), dense_late, MODEL)
    summary = sparse_attention_summary(model).transformers["transformer"]
    assert (summary.sparse_calls, summary.dense_calls) == (4, 4)
    disable_sparse_attention(model)
    assert_near(run(model, inputs), dense, MODEL)


# -- the others --------------------------------------------------------------------------------------------------------


def test_framepack_cuts_the_padding_of_one_item() -> None:
    model = framepack()
    inputs = framepack_inputs(*SHAPE, batch=1)
    for call in calls_of(model, inputs):
        assert call.grid == TokenGrid(*SHAPE, text_before=2 * 63 + 20 + 12, text_after=3 + 4)
        assert call.kv_len is None
    check_plan(model, inputs, calls=3)


def test_framepack_history_of_other_lengths() -> None:
    model = framepack()
    inputs = framepack_inputs(*SHAPE)
    size = inputs["latents_clean"].shape[3:]
    inputs |= {
        "latents_clean": torch.randn(2, 4, 3, *size),
        "indices_latents_clean": torch.arange(3),
        "latents_history_2x": torch.randn(2, 4, 3, *size),
        "indices_latents_history_2x": torch.arange(3),
        "latents_history_4x": torch.randn(2, 4, 4, *size),
        "indices_latents_history_4x": torch.arange(4),
    }
    assert {call.grid.text_before for call in calls_of(model, inputs)} == {3 * 63 + 2 * 20 + 6}


def test_mochi_captions_of_unequal_lengths() -> None:
    """One of them empty. Each item's calls have its own grid."""
    model = mochi()
    inputs = mochi_inputs(*SHAPE, captions=(5, 0, 7))
    assert [call.grid.text_after for call in calls_of(model, inputs)] == [5, 0, 7] * 2
    check_plan(model, inputs, calls=6)
    with sparse_attention(model, mixed_plan(model)):
        run(model, inputs)
        assert sparse_attention_summary(model).transformers["transformer"].grids == {"3x7x9+7": 1}


def test_mochi_time_rises() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.25])
    family = family_by_class("MochiTransformer3DModel")
    assert scheduler.timesteps.tolist() == [0, 250, 750]
    for known in (scheduler, None):
        levels = [family.noise_level(t, 1000, known) for t in scheduler.timesteps.tolist()]
        assert levels == pytest.approx([1.0, 0.75, 0.25])


def test_motif_decoder_sees_the_video_twice() -> None:
    model = motif(decoder_layers=1)
    inputs = motif_inputs(*SHAPE)
    calls = calls_of(model, inputs)
    assert [call.grid for call in calls] == [TokenGrid(*SHAPE, text_after=n) for n in (10, 10, 189)]
    assert [call.kv_len is None for call in calls] == [False, False, True]
    check_plan(model, inputs, calls=3)


def test_motif_without_image_and_mask() -> None:
    model = motif()
    inputs = {**motif_inputs(*SHAPE), "image_embeds": None, "encoder_attention_mask": None}
    for call in calls_of(model, inputs):
        assert call.grid == TokenGrid(*SHAPE, text_after=7) and call.kv_len is None


@pytest.mark.slow(reason="compiles a model")
def test_motif_decoder_compiled(fresh_dynamo: None) -> None:
    model = motif(decoder_layers=1)
    inputs = motif_inputs(*SHAPE)
    plan = mixed_plan(model)
    with sparse_attention(model, plan):
        sparse = run(model, inputs)
        expected = sparse_attention_summary(model).density
    for block in model.single_transformer_blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    with sparse_attention(model, plan):
        assert_near(run(model, inputs), sparse, MODEL)
        assert sparse_attention_summary(model).density == pytest.approx(expected)
        assert sparse_attention_summary(model).transformers["transformer"].dense_calls == 0
