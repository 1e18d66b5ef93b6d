"""Layers whose heads all use outputs of an earlier step compute q, k and v for one token, and nothing changes."""

from __future__ import annotations

import copy
import importlib
import pickle
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from diffsparse.entry import Execution, HeadEntry
from diffsparse.patterns import Window
from diffsparse.pipelines import (
    disable_sparse_attention,
    enable_sparse_attention,
    sparse_attention_summary,
    whole,
)
from diffsparse.pipelines.family import layers_of
from diffsparse.pipelines.hooks import KEY
from diffsparse.plan import SparsityPlan
from diffsparse.schedule import Schedule
from tests.pipelines.models import CASES, dense_plan, generate, mixed_plan, run, wan_pipeline

STEPS = 8
LEVELS = (0.9, 0.8, 0.7, 0.6)
FUSED = ("to_qkv", "to_added_qkv")


def reusing(model: torch.nn.Module, reuse: float = 0.25, schedule: Schedule | None = None) -> SparsityPlan:
    """All heads serve alike; those that are left out stay."""
    plan = mixed_plan(model, schedule or Schedule())
    entries = tuple(
        e if e.execution.mode == "skip" else replace(e, execution=replace(e.execution, reuse=reuse))
        for e in plan.entries
    )
    return replace(plan, entries=entries)


@contextmanager
def without_the_rule() -> Iterator[None]:
    """The same plan, where every layer computes its q, k and v."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole, "ONE_USE", frozenset())
        yield


@contextmanager
def rows(model: torch.nn.Module) -> Iterator[dict[str, list[int]]]:
    """Tokens that each projection of the self-attention ran on, call by call."""
    found: dict[str, list[int]] = defaultdict(list)
    originals: list[tuple[Any, Any]] = []
    names = {
        id(part): f"{layer}.{name}"
        for layer, module in layers_of(model).items()
        for name in (*whole._PROJECTIONS, *whole._NORMS)
        if (part := module._modules.get(name)) is not None
    }

    def counting(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if id(self) in names:
                found[names[id(self)]].append(x.shape[:-1].numel() // x.shape[0])
            return original(self, x, *args, **kwargs)

        return forward

    modules = dict(model.named_modules()).values()
    for cls in {type(m) for m in modules if id(m) in names}:
        originals.append((cls, cls.forward))
        cls.forward = counting(cls.forward)
    try:
        yield found
    finally:
        for cls, forward in originals:
            cls.forward = forward


class Scheduler:
    def __init__(self) -> None:
        self.timesteps = torch.tensor(LEVELS) * 1000
        self.config = {"num_train_timesteps": 1000}


class Steps:
    """A bare model's steps, as a pipeline makes them: the same prompt, and other latents at each step."""

    def __init__(self, name: str) -> None:
        case = CASES[name]
        torch.manual_seed(7)
        self.model, self.scheduler = case.build(), Scheduler()
        first = [case.inputs(*case.shapes[0], timestep=level * 1000) for level in LEVELS]
        # What differs from step to step is the noise level and the latents.
        changing = {"timestep", "hidden_states"}
        self.inputs = [{**first[0], **{k: v for k, v in step.items() if k in changing}} for step in first]

    def run(self) -> list[torch.Tensor]:
        # A scheduler of its own for every generation, as a call of `set_timesteps` leaves it.
        pipe = self.scheduler = Scheduler()
        pipe.scheduler = pipe  # type: ignore[attr-defined]
        self.model._diffsparse_root._pipe = lambda: pipe  # type: ignore[union-attr]
        outs = [run(self.model, inputs) for inputs in self.inputs]
        return [out[0] if isinstance(out, (list, tuple)) else out for out in outs]


def calls_without(model: Any) -> int:
    found = sparse_attention_summary(model).transformers.values()
    return sum(t.calls_without_projections for t in found)


NAMES = [
    "wan", "vace", "wan_animate", "skyreels_v2", "chronoedit", "ltx", "hunyuan", "hunyuan_i2v",
    "hunyuan_token_replace", "framepack", "flux", "kontext", "chroma", "qwenimage",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_model_puts_out_the_same(name: str) -> None:
    steps = Steps(name)
    dense = [run(steps.model, inputs) for inputs in steps.inputs]
    with without_the_rule():
        enable_sparse_attention(steps.model, reusing(steps.model))
        expected = steps.run()
        assert calls_without(steps.model) == 0
        reused = sparse_attention_summary(steps.model).transformers["transformer"].reused_heads
        disable_sparse_attention(steps.model)
    enable_sparse_attention(steps.model, reusing(steps.model))
    with rows(steps.model) as seen:
        found = steps.run()
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    summary = sparse_attention_summary(steps.model).transformers["transformer"]
    assert summary.reused_heads == reused > 0
    # Steps 0 and 3 compute, steps 1 and 2 take what step 0 left.
    layers, case = layers_of(steps.model), CASES[name]
    assert summary.calls_without_projections == 2 * len(layers)
    assert f"calls of layers that needed no q, k and v: {2 * len(layers)}" in str(summary_of(steps.model))
    for layer, counts in seen.items():
        full, one = counts[0], case.heads if full_by_heads(steps.model, layer) else 1
        assert full > one and counts == [full, one, one, full], layer
    assert {x.rsplit(".", 1)[0] for x in seen} == set(case.layers)
    disable_sparse_attention(steps.model)
    assert all(torch.equal(run(steps.model, x), y) for x, y in zip(steps.inputs, dense, strict=True))
    assert not any(
        KEY in hooks
        for m in steps.model.modules()
        for hooks in (m._forward_pre_hooks, m._forward_hooks, m._forward_hooks_always_called)
    )


def full_by_heads(model: Any, part: str) -> bool:
    """Whether a norm runs on each head's vector, so that a token is several rows."""
    return "norm" in part and model.get_submodule(part).weight.shape[-1] == 16


def test_the_processors_that_are_named_are_there() -> None:
    for name in sorted(whole.ONE_USE):
        module, _, cls = name.rpartition(".")
        assert callable(getattr(importlib.import_module(module), cls))


def summary_of(model: Any) -> Any:
    return sparse_attention_summary(model)


def generations(pipe: Any, plan: SparsityPlan, **options: Any) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A clip with q, k and v of all layers, the same without, and how many calls needed none."""
    with without_the_rule(), pipe.sparse_attention(plan):
        expected = generate(pipe, STEPS, **options)
    with pipe.sparse_attention(plan):
        found = generate(pipe, STEPS, **options)
        return expected, found, calls_without(pipe)


@pytest.mark.parametrize("stages", [1, 2])
def test_guidance_in_two_calls(stages: int) -> None:
    pipe = wan_pipeline(stages)
    plan = reusing(pipe.transformer)
    expected, found, calls = generations(pipe, {"transformer": plan, "transformer_2": plan} if stages == 2 else plan)
    assert torch.equal(found, expected) and calls > 0


def test_guidance_in_one_batch_and_another_grid() -> None:
    pipe = wan_pipeline()
    embeddings = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(3))
    kwargs: dict[str, Any] = dict(
        prompt_embeds=embeddings, num_inference_steps=STEPS, num_frames=9, guidance_scale=1.0, output_type="latent"
    )
    plan = reusing(pipe.transformer)

    def clips() -> list[torch.Tensor]:
        shapes = [(112, 144), (144, 112)]
        return [pipe(**kwargs, height=h, width=w, generator=torch.Generator().manual_seed(0)).frames for h, w in shapes]

    with without_the_rule(), pipe.sparse_attention(plan):
        expected = clips()
    with pipe.sparse_attention(plan):
        found = clips()
        assert calls_without(pipe) > 0
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_a_layer_of_which_one_head_computes_needs_q_k_and_v() -> None:
    pipe = wan_pipeline()
    entry = HeadEntry(pattern=Window((None, 0.4, 0.4)))
    again = replace(entry, execution=Execution(reuse=0.25))
    model = pipe.transformer
    plan = SparsityPlan.from_table(
        {"blocks.0.attn1": [[entry, again, again]], "blocks.1.attn1": [[again] * 3]},
        schedule=Schedule(),
        architecture=dense_plan(model).architecture,
    )
    pipe.enable_sparse_attention(plan)
    with rows(model) as seen:
        generate(pipe, STEPS)
    assert min(seen["blocks.0.attn1.to_q"]) > 1 and min(seen["blocks.1.attn1.to_q"]) == 1


def test_heads_that_serve_for_different_times() -> None:
    """The layer is left out where all of its heads are served, and computed where one is due."""
    pipe = wan_pipeline(layers=1)
    entry = HeadEntry(pattern=Window((None, 0.4, 0.4)))
    heads = [replace(entry, execution=Execution(reuse=r)) for r in (0.15, 0.3, 0.3)]
    plan = SparsityPlan.from_table(
        {"blocks.0.attn1": [heads]}, schedule=Schedule(), architecture=dense_plan(pipe.transformer).architecture
    )
    expected, found, calls = generations(pipe, plan)
    assert torch.equal(found, expected) and calls > 0


def _lora(pipe: Any) -> None:
    import peft

    torch.manual_seed(5)
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))


def _offload(pipe: Any, kind: str) -> None:
    cpu = torch.device("cpu")
    extra = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    pipe.transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=kind, **extra)


def _accelerate(pipe: Any) -> None:
    """Hooks that bring a projection's weights before it runs, and take them away after it."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for module in layers_of(pipe.transformer).values():
        for part in (module.to_q, module.to_k, module.to_v):
            weights = {name: x.detach().clone() for name, x in part.named_parameters()}
            add_hook_to_module(part, AlignDevicesHook("cpu", offload=True, io_same_device=True, weights_map=weights))


def _first_block(pipe: Any) -> None:
    from diffusers import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.12))


def _pyramid(pipe: Any) -> None:
    from diffusers import PyramidAttentionBroadcastConfig

    pipe.transformer.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(100, 950),
            spatial_attention_block_identifiers=("blocks.*attn1",),
            current_timestep_callback=lambda: pipe._current_timestep,
        )
    )


FEATURES: dict[str, Callable[[Any], None]] = {
    "lora": _lora,
    "fused": lambda pipe: pipe.transformer.fuse_qkv_projections(),
    "casting": lambda pipe: pipe.transformer.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    ),
    "groups of blocks": lambda pipe: _offload(pipe, "block_level"),
    "groups of leaves": lambda pipe: _offload(pipe, "leaf_level"),
    "accelerate": _accelerate,
    "model offload": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "first block cache": _first_block,
    "pyramid": _pyramid,
}


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("first", ["feature first", "plan first"])
def test_features_of_diffusers(name: str, first: str) -> None:
    def clip(rule: bool) -> tuple[torch.Tensor, int]:
        pipe = wan_pipeline(layers=3)
        plan = reusing(pipe.transformer)
        if first == "feature first":
            FEATURES[name](pipe)
        pipe.enable_sparse_attention(plan)
        if first == "plan first":
            if rule:
                generate(pipe, STEPS)  # hooks stand on the modules that are replaced
            FEATURES[name](pipe)
        before = calls_without(pipe)
        return generate(pipe, STEPS), calls_without(pipe) - before

    with without_the_rule():
        expected, none = clip(rule=False)
    found, calls = clip(rule=True)
    assert torch.equal(found, expected)
    # A cache that has the attention's forward itself may leave it out: there q, k and v are computed when it runs.
    assert none == 0 and (calls > 0 or name == "pyramid")


def test_fused_projections_run_on_one_token() -> None:
    pipe = wan_pipeline()
    pipe.transformer.fuse_qkv_projections()
    pipe.enable_sparse_attention(reusing(pipe.transformer))
    with rows(pipe.transformer) as seen:
        generate(pipe, STEPS)
    assert min(seen["blocks.0.attn1.to_qkv"]) == 1 and "blocks.0.attn1.to_q" not in seen


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["to_k", "norm_q", "to_out.0"])
def test_an_exception_where_q_k_and_v_are_left_out(error: type[BaseException], where: str) -> None:
    pipe = wan_pipeline()
    model = pipe.transformer
    layer = model.blocks[1].attn1
    tokens = torch.randn(1, 189, 48)
    with torch.no_grad():
        alone = layer(tokens), layer.to_q(tokens)
    pipe.enable_sparse_attention(reusing(model))
    expected = generate(pipe, STEPS)
    calls: list[int] = []

    def fail(module: Any, args: Any) -> None:
        calls.append(1)
        if len(calls) == 4 and where == "to_out.0":
            raise error
        if args[0].shape[1] == 1:
            raise error

    handle = layer.get_submodule(where).register_forward_pre_hook(fail)
    with pytest.raises(error) as caught:
        generate(pipe, STEPS, seed=1)
    handle.remove()
    with torch.no_grad():  # on its own, while a notebook keeps the traceback
        assert torch.equal(layer.to_q(tokens), alone[1])
        assert torch.equal(layer(tokens), alone[0])
    assert torch.equal(generate(pipe, STEPS), expected)
    assert caught.value.__traceback__ is not None


def test_other_processors_compute_q_k_and_v() -> None:
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    class Own(WanAttnProcessor):
        """May do anything with q, k and v."""

    pipe = wan_pipeline()
    for block in pipe.transformer.blocks:
        block.attn1.set_processor(Own())
    pipe.enable_sparse_attention(reusing(pipe.transformer))
    with rows(pipe.transformer) as seen:
        generate(pipe, STEPS)
    assert calls_without(pipe) == 0 and min(min(x) for x in seen.values()) > 1
    assert sparse_attention_summary(pipe).transformers["transformer"].reused_heads > 0


def test_where_gradients_may_be_asked_for_q_k_and_v_are_computed() -> None:
    steps = Steps("wan")
    enable_sparse_attention(steps.model, reusing(steps.model))
    pipe = Scheduler()
    pipe.scheduler = pipe  # type: ignore[attr-defined]
    steps.model._diffsparse_root._pipe = lambda: pipe  # type: ignore[union-attr]
    steps.model.requires_grad_(False)
    for inputs in steps.inputs:
        steps.model(**inputs)
    found = sparse_attention_summary(steps.model).transformers["transformer"]
    assert found.reused_heads > 0 and found.calls_without_projections == 0


class Wrong:
    """A processor that is taken for one that uses q, k and v once."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, text: Any = None, mask: Any = None, rotary: Any = None
    ) -> torch.Tensor:
        from diffusers.models.transformers import transformer_wan

        if self.what == "none":
            return attn.to_out[0](attn.to_v(hidden_states))
        q, k, v = (p(hidden_states).unflatten(2, (attn.heads, -1)) for p in (attn.to_q, attn.to_k, attn.to_v))
        extra: dict[str, Any] = {}
        if Wrong.active and self.what == "tokens":
            q, k, v = (x[:, :-1] for x in (q, k, v))
        if Wrong.active and self.what == "keys":
            k, v = k[:, :-1], v[:, :-1]
        if Wrong.active and self.what == "causal":
            extra["is_causal"] = True
        out = transformer_wan.dispatch_attention_fn(q, k, v, **extra)
        if Wrong.active and self.what == "two":
            out = out + transformer_wan.dispatch_attention_fn(q, k, v)
        return attn.to_out[0](out.flatten(2, 3))

    active = False


@pytest.mark.parametrize("what", ["none", "tokens", "keys", "causal", "two"])
def test_a_call_that_is_not_the_announced_one_raises(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = wan_pipeline(layers=1)
    attention = pipe.transformer.blocks[0].attn1
    monkeypatch.setattr(whole, "ONE_USE", frozenset({f"{__name__}.Wrong"}))
    attention.set_processor(Wrong("right"))
    pipe.enable_sparse_attention(reusing(pipe.transformer))
    expected = generate(pipe, STEPS)
    assert calls_without(pipe) > 0

    def later(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        monkeypatch.setattr(Wrong, "active", True)
        attention.processor.what = what
        return {}

    with pytest.raises(RuntimeError, match=r"blocks.0.attn1: q, k and v were not computed.*another one than was"):
        generate(pipe, STEPS, callback_on_step_end=later)
    monkeypatch.setattr(Wrong, "active", False)
    attention.processor.what = "right"
    assert torch.equal(generate(pipe, STEPS), expected)


def test_copies_and_pickles() -> None:
    pipe = wan_pipeline()
    pipe.enable_sparse_attention(reusing(pipe.transformer))
    expected = generate(pipe, STEPS)
    inputs = CASES["wan"].inputs(3, 7, 9)
    want = run(pipe.transformer, inputs)
    for other in (copy.deepcopy(pipe.transformer), pickle.loads(pickle.dumps(pipe.transformer))):
        assert torch.equal(run(other, inputs), want)
        disable_sparse_attention(other)
        assert not any(KEY in m._forward_pre_hooks for m in other.modules())
    assert torch.equal(generate(pipe, STEPS), expected)


def test_other_threads_are_not_misled() -> None:
    """One thread leaves q, k and v out, and another one computes them with the same modules."""
    pipe, inputs = wan_pipeline(), CASES["wan"].inputs(3, 7, 9)
    model = pipe.transformer
    layer, tokens = model.blocks[0].attn1, torch.randn(1, 189, 48)
    with torch.no_grad():
        expected_q = layer.to_q(tokens)
    pipe.enable_sparse_attention(reusing(model))
    expected, wrong, stop = generate(pipe, STEPS), [], threading.Event()

    def other() -> None:
        with torch.no_grad():
            while not stop.is_set():
                if not torch.equal(layer.to_q(tokens), expected_q):
                    wrong.append(1)

    thread = threading.Thread(target=other)
    thread.start()
    try:
        for _ in range(3):
            assert torch.equal(generate(pipe, STEPS), expected)
    finally:
        stop.set()
        thread.join()
    assert not wrong and torch.isfinite(run(model, inputs)).all()


@pytest.mark.slow(reason="compiles a model")
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_model_that_is_compiled_afterwards_keeps_one_graph() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    pipe = wan_pipeline(layers=4)
    plan = reusing(pipe.transformer)
    # Every second layer computes at each step, so that hooks stand on the others' projections alone.
    index = plan.index.copy()
    entries = (*plan.entries, *(replace(e, execution=replace(e.execution, reuse=0.0)) for e in plan.entries))
    index[:, 1::2] += len(plan.entries)
    plan = replace(plan, entries=entries, index=index)
    pipe.enable_sparse_attention(plan)
    expected = generate(pipe, STEPS)
    before = calls_without(pipe)
    assert before > 0
    counter = CompileCounterWithBackend("aot_eager")
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
    found = generate(pipe, STEPS)
    assert counter.frame_count == 1 and calls_without(pipe) == before
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2 * float(expected.abs().max()))
