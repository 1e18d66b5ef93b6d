"""Whatever a pipeline does when a plan comes and goes: it is wrapped, has no transformer, is in the middle of a run."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from diffsparse.pipelines import (
    UnsupportedModelError,
    enable_sparse_attention,
    find_transformers,
    sparse_attention_summary,
    tap_attention,
)
from tests.helpers.process import run_python
from tests.pipelines.claims import shows
from tests.pipelines.models import generate, masked_attention, mixed_plan, run, wan, wan_inputs, wan_pipeline
from tests.tolerance import GENERATION, assert_near, near

WAN = "WanTransformer3DModel"
SHAPE = (3, 7, 9)


def check(pipe: Any, plan: Any, **options: Any) -> None:
    """A plan does what it says in this pipeline, and leaves it as it was."""
    dense = generate(pipe, **options)
    with tap_attention(pipe, masked_attention(plan)):
        expected = generate(pipe, **options)
    with pipe.sparse_attention(plan):
        assert_near(generate(pipe, **options), expected, GENERATION)
        summary = pipe.sparse_attention_summary().transformers["transformer"]
        assert summary.sparse_calls and not summary.dense_calls
    assert (expected - dense).abs().max() > 1e-2
    assert torch.equal(generate(pipe, **options), dense)


# -- wrapped ---------------------------------------------------------------------------------------------------------


@shows("PEFT wrapper", WAN)
def test_a_transformer_wrapped_by_peft() -> None:
    import peft

    pipe = wan_pipeline()
    plan, inner = mixed_plan(pipe.transformer), pipe.transformer
    plain = generate(pipe)
    torch.manual_seed(5)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.transformer = peft.get_peft_model(pipe.transformer, config)
    assert find_transformers(pipe)["transformer"] is inner
    assert not near(generate(pipe), plain, GENERATION)
    check(pipe, plan)
    enable_sparse_attention(pipe.transformer, plan)  # the wrapper by itself
    with pytest.raises(RuntimeError, match="already enabled"):
        pipe.enable_sparse_attention(plan)


def test_a_transformer_with_accelerates_hooks() -> None:
    """They stand in for ``forward``; device_map and offloading put them there."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    pipe = wan_pipeline()
    plan = mixed_plan(pipe.transformer)
    for module in (pipe.transformer, pipe.transformer.blocks[0].attn1):
        add_hook_to_module(module, AlignDevicesHook("cpu", io_same_device=True))
    check(pipe, plan)
    pipe.enable_sparse_attention(plan)
    sparse = generate(pipe)
    remove_hook_from_module(pipe.transformer, recurse=True)  # while it is enabled
    assert_near(generate(pipe), sparse, GENERATION)
    add_hook_to_module(pipe.transformer, AlignDevicesHook("cpu", io_same_device=True))
    assert_near(generate(pipe), sparse, GENERATION)


def test_a_transformer_inside_a_module_of_ones_own() -> None:
    """A module that is not known is not looked into: what it does with the transformer nobody can tell."""

    class Holder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = wan()

    with pytest.raises(UnsupportedModelError, match="Holder has no family"):
        enable_sparse_attention(Holder())


def test_a_pipeline_without_its_transformer() -> None:
    pipe = wan_pipeline()
    pipe.transformer = None
    for method in (pipe.enable_sparse_attention, pipe.disable_sparse_attention, pipe.sparse_attention_summary):
        with pytest.raises(UnsupportedModelError, match=r"its transformer and its transformer_2 are None; load"):
            method()


def test_disabling_what_is_not_enabled() -> None:
    pipe = wan_pipeline()
    dense = generate(pipe)
    for _ in range(2):
        pipe.disable_sparse_attention()
    assert torch.equal(generate(pipe), dense)
    pipe.enable_sparse_attention("window")
    pipe.transformer = wan()  # enabled is the one that was there
    assert not pipe.sparse_attention_summary().enabled
    pipe.disable_sparse_attention()
    assert torch.equal(generate(pipe), dense)


# -- in the middle of a run ------------------------------------------------------------------------------------------


def test_enabled_and_disabled_between_steps() -> None:
    """A plan that comes for the second step alone gives what that step gives with it."""
    pipe = wan_pipeline()
    plan = mixed_plan(pipe.transformer)
    steps: list[int] = []

    def switch(pipe: Any, step: int, timestep: torch.Tensor, values: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            pipe.enable_sparse_attention(plan)
        if step == 1:
            steps.append(pipe.sparse_attention_summary().transformers["transformer"].forwards)
            pipe.disable_sparse_attention()
        return {}

    forwards = [0]

    def second_step(call: Any) -> torch.Tensor | None:
        forwards[0] += call.layer_index == 0
        return masked_attention(plan)(call) if forwards[0] in (3, 4) else None

    with tap_attention(pipe, second_step):
        expected = generate(pipe)
    assert_near(generate(pipe, callback_on_step_end=switch), expected, GENERATION)
    assert steps == [2] and not pipe.sparse_attention_summary().enabled


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_middle_of_a_step(error: type[BaseException]) -> None:
    """In the second half of the guidance of the third step, inside attention: the next run is as if nothing was."""
    pipe = wan_pipeline()
    dense = generate(pipe)
    pipe.enable_sparse_attention(mixed_plan(pipe.transformer))
    sparse = generate(pipe)
    calls = [0]

    def fail(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == 6:
            raise error

    handle = pipe.transformer.blocks[1].attn1.to_q.register_forward_hook(fail)
    with pytest.raises(error):
        generate(pipe)
    handle.remove()
    assert calls == [6]
    assert torch.equal(generate(pipe), sparse)
    pipe.disable_sparse_attention()
    assert torch.equal(generate(pipe), dense)


def test_two_pipelines_with_two_plans_in_two_threads() -> None:
    pipes = [wan_pipeline(), wan_pipeline(stages=2), wan_pipeline()]  # the third stays dense
    sizes = [(112, 144), (144, 112), (112, 144)]
    for i in (0, 1):
        pipes[i].enable_sparse_attention(mixed_plan(pipes[i].transformer, shift=2 * i))
    expected = [generate(pipe, 3, *size) for pipe, size in zip(pipes, sizes)]
    assert not torch.equal(expected[0], expected[2])
    wrong: list[str] = []

    def work(i: int) -> None:
        for _ in range(4):
            if not torch.equal(generate(pipes[i], 3, *sizes[i]), expected[i]):
                wrong.append(f"pipeline {i}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    for i, grid in ((0, "3x7x9"), (1, "3x9x7")):
        parts = pipes[i].sparse_attention_summary().transformers.values()
        assert sum(part.forwards for part in parts) == 5 * 3 * 2
        assert all(set(part.grids) == {grid} and not part.dense_calls for part in parts)
    assert not pipes[2].sparse_attention_summary().enabled


# -- loaded into a pipeline ------------------------------------------------------------------------------------------


def lora_weights() -> dict[str, torch.Tensor]:
    """As a file of a LoRA has them."""
    import peft

    model = wan(0)
    torch.manual_seed(5)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    return {f"transformer.{name}": value for name, value in peft.get_peft_model_state_dict(model).items()}


@shows("LoRA files", WAN)
@pytest.mark.parametrize("first", ["lora", "plan"])
def test_a_lora_loaded_fused_and_unloaded_by_the_pipeline(first: str) -> None:
    weights, oracle = lora_weights(), wan_pipeline()
    plan = mixed_plan(oracle.transformer)
    with tap_attention(oracle, masked_attention(plan)):
        bare = generate(oracle)
        oracle.load_lora_weights(dict(weights), adapter_name="one")
        loaded = generate(oracle)
        oracle.set_adapters("one", 0.5)
        halved = generate(oracle)
    assert (loaded - bare).abs().max() > 1e-2 and (halved - loaded).abs().max() > 1e-3

    def near(expected: torch.Tensor) -> None:
        assert_near(generate(pipe), expected, GENERATION)

    pipe = wan_pipeline()
    if first == "plan":
        pipe.enable_sparse_attention(plan)
    pipe.load_lora_weights(dict(weights), adapter_name="one")
    if first == "lora":
        pipe.enable_sparse_attention(plan)
    near(loaded)
    pipe.fuse_lora()
    near(loaded)
    pipe.unfuse_lora()
    near(loaded)
    pipe.set_adapters("one", 0.5)
    near(halved)
    pipe.unload_lora_weights()
    near(bare)
    summary = pipe.sparse_attention_summary().transformers["transformer"]
    assert summary.sparse_calls == 5 * 4 * 2 * 2 and not summary.dense_calls


@shows("modular pipeline", WAN)
def test_a_modular_pipeline_from_noise_to_latents() -> None:
    from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep

    parts = wan_pipeline()
    pipe = WanCoreDenoiseStep().init_pipeline()
    pipe.update_components(transformer=parts.transformer, scheduler=parts.scheduler)
    pipe.set_progress_bar_config(disable=True)
    random = torch.Generator().manual_seed(1)
    text = [torch.randn(1, 7, 16, generator=random) for _ in range(2)]
    latents = torch.randn(1, 4, 3, 14, 18, generator=random)

    def denoise() -> torch.Tensor:
        return pipe(
            prompt_embeds=text[0],
            negative_prompt_embeds=text[1],
            latents=latents,
            num_inference_steps=4,
            height=112,
            width=144,
            num_frames=9,
            output="latents",
        )

    dense = denoise()
    plan = mixed_plan(parts.transformer)
    with tap_attention(pipe, masked_attention(plan)):
        expected = denoise()
    with pipe.sparse_attention(plan):
        assert_near(denoise(), expected, GENERATION)
        summary = pipe.sparse_attention_summary().transformers["transformer"]
        assert (summary.sparse_calls, summary.dense_calls) == (4 * 2 * 2, 0)
    assert (expected - dense).abs().max() > 1e-2
    assert torch.equal(denoise(), dense)


# -- enabled in the middle of a forward ------------------------------------------------------------------------------


def test_disabled_by_a_hook_in_the_middle_of_a_forward() -> None:
    """Layers that come after it run dense, and the model is clean afterwards."""
    model, inputs = wan(layers=3), wan_inputs(*SHAPE)
    dense = run(model, inputs)
    enable_sparse_attention(model, mixed_plan(model))
    sparse = run(model, inputs)
    from diffsparse.pipelines import disable_sparse_attention

    handle = model.blocks[1].register_forward_pre_hook(lambda *_: disable_sparse_attention(model))
    mixed = run(model, inputs)
    handle.remove()
    assert not torch.equal(mixed, dense) and not torch.equal(mixed, sparse)
    assert not sparse_attention_summary(model).enabled
    assert torch.equal(run(model, inputs), dense)


# -- from outside diffusers ------------------------------------------------------------------------------------------

SOMEBODYS_MODEL = """
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_dispatch import dispatch_attention_fn

class Layer(torch.nn.Module):
    def __init__(self, direct):
        super().__init__()
        self.qkv, self.direct = torch.nn.Linear(32, 96), direct

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (6, 16)).chunk(3, dim=2)
        if self.direct:
            out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
        else:
            out = dispatch_attention_fn(q, k, v)
        return x + out.flatten(2)

class SomebodysTransformer(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, num_attention_heads=2, attention_head_dim=16):
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer(True), Layer(False)])

    def forward(self, video, timestep):  # [B, T, H, W, C]
        x = video.flatten(1, 3)
        for layer in self.layers:
            x = layer(x)
        return (x,)
"""


def test_a_model_from_outside_that_calls_attention_itself(tmp_path: Path) -> None:
    """By either way out, imported before anything was enabled; and again out of a pickle, in a fresh process."""
    (tmp_path / "somebodys.py").write_text(SOMEBODYS_MODEL)
    common = f"""
import sys, torch, diffsparse
sys.path.insert(0, {str(tmp_path)!r})
from somebodys import SomebodysTransformer
from diffsparse.pipelines import Family
diffsparse.register_family(Family(
    name="somebody's", classes=("SomebodysTransformer",), layers=("layers.*",), patch_size=lambda config: (1, 1, 1),
    grid=lambda config, arguments: diffsparse.TokenGrid(*arguments["video"].shape[1:4]),
))
def check(model, inputs, dense, forwards):
    from tests.pipelines.models import masked_attention
    from tests.tolerance import MODEL, assert_near
    with torch.no_grad():
        sparse = model(**inputs)[0]
        found = diffsparse.sparse_attention_summary(model).transformers["transformer"]
        assert (found.sparse_calls, found.dense_calls) == (2 * forwards, 0), found
        plan = model._diffsparse_root.plan
        diffsparse.disable_sparse_attention(model)
        assert torch.equal(model(**inputs)[0], dense)
        from diffsparse.pipelines import tap_attention
        with tap_attention(model, masked_attention(plan)):
            assert_near(model(**inputs)[0], sparse, MODEL)
        assert (sparse - dense).abs().max() > 1e-3
"""
    first = """
torch.manual_seed(0)
model = SomebodysTransformer().eval()
inputs = {"video": torch.randn(1, 3, 7, 9, 32), "timestep": torch.tensor([500.0])}
with torch.no_grad():
    dense = model(**inputs)[0]
diffsparse.enable_sparse_attention(model, diffsparse.preset("window", size=(1, 3, 3), tail="none"))
torch.save((model, inputs, dense), path)
check(model, inputs, dense, 1)
"""
    path = f"path = {str(tmp_path / 'model.pt')!r}\n"
    run_python(common + path + first)
    run_python(common + path + "check(*torch.load(path, weights_only=False), 1)\n")
