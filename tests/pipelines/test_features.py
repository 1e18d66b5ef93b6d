"""Every diffusers feature beside sparse attention, switched on before and after it.

The oracle is the same pipeline with the same feature, whose attention is torch's own under the plan's token masks.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
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
from tests.pipelines.claims import shows
from tests.pipelines.models import (
    cogvideox,
    cogvideox_inputs,
    generate,
    masked_attention,
    mixed_plan,
    run,
    wan,
    wan_inputs,
    wan_pipeline,
)
from tests.tolerance import GENERATION, MODEL, assert_near, near

WAN = "WanTransformer3DModel"
STEPS = 6
SHAPE = (3, 7, 9)


def _first_block(pipe: Any) -> None:
    from diffusers import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.3))


def _mag(pipe: Any) -> None:
    from diffusers import MagCacheConfig

    ratios = torch.ones(2 * STEPS)
    pipe.transformer.enable_cache(
        MagCacheConfig(threshold=0.5, max_skip_steps=1, num_inference_steps=STEPS, mag_ratios=ratios)
    )


def _taylorseer(pipe: Any) -> None:
    from diffusers import TaylorSeerCacheConfig

    pipe.transformer.enable_cache(
        TaylorSeerCacheConfig(
            cache_interval=2,
            disable_cache_before_step=2,
            taylor_factors_dtype=torch.float32,
            cache_identifiers=["blocks.*attn1"],  # the default ones match none of Wan's layers
        )
    )


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


def _faster(pipe: Any) -> None:
    from diffusers import FasterCacheConfig

    pipe.transformer.enable_cache(
        FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 950),
            spatial_attention_block_identifiers=("blocks.*attn1",),
            is_guidance_distilled=True,  # Wan calls its transformer once for each half of the guidance
            current_timestep_callback=lambda: pipe._current_timestep,
        )
    )


def _layerwise_casting(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def _group_offload(pipe: Any) -> None:
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
    )


def _model_offload(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def _fused(pipe: Any) -> None:
    pipe.transformer.fuse_qkv_projections()


def _lora(pipe: Any) -> None:
    import peft

    torch.manual_seed(5)
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))


def _fused_lora(pipe: Any) -> None:
    _lora(pipe)
    pipe.transformer.fuse_lora()


# name -> what switches it on, and whether it leaves out some attention calls
FEATURES: dict[str, tuple[Callable[[Any], None], bool]] = {
    "first block cache": (_first_block, True),
    "mag cache": (_mag, True),
    "taylorseer": (_taylorseer, True),
    "pyramid attention broadcast": (_pyramid, True),
    "faster cache": (_faster, True),
    "layerwise casting": (_layerwise_casting, False),
    "group offload": (_group_offload, False),
    "model offload": (_model_offload, False),
    "fused projections": (_fused, False),
    "lora": (_lora, False),
    "fused lora": (_fused_lora, False),
}


@shows("other caches", WAN)
@shows("model offload", WAN)
@pytest.mark.parametrize("first", ["feature first", "plan first"])
@pytest.mark.parametrize("name", FEATURES)
def test_beside(name: str, first: str) -> None:
    switch_on, leaves_out = FEATURES[name]
    oracle = wan_pipeline()
    plan = mixed_plan(oracle.transformer)
    switch_on(oracle)
    with tap_attention(oracle, masked_attention(plan)):
        expected = generate(oracle, STEPS)
    featured = wan_pipeline()
    switch_on(featured)
    dense = generate(featured, STEPS)

    pipe = wan_pipeline()
    for step in (switch_on, lambda p: p.enable_sparse_attention(plan))[:: 1 if first == "feature first" else -1]:
        step(pipe)
    assert_near(generate(pipe, STEPS), expected, GENERATION)
    assert (expected - dense).abs().max() > 1e-2
    summary = pipe.sparse_attention_summary().transformers["transformer"]
    assert summary.dense_calls == 0 and not summary.dense_reasons
    assert (summary.sparse_calls < 2 * 2 * STEPS) == leaves_out, summary.sparse_calls
    pipe.disable_sparse_attention()
    if not leaves_out:  # caches keep what they saw last
        assert torch.equal(generate(pipe, STEPS), dense)


def test_a_cache_taken_off_again() -> None:
    pipe = wan_pipeline()
    plan = mixed_plan(pipe.transformer)
    pipe.enable_sparse_attention(plan)
    plain = generate(pipe, STEPS)
    _first_block(pipe)
    assert not torch.equal(generate(pipe, STEPS), plain)
    pipe.transformer.disable_cache()
    assert torch.equal(generate(pipe, STEPS), plain)


def test_lora_through_its_whole_life() -> None:
    import peft

    model, inputs = wan(), wan_inputs(*SHAPE)
    plan = mixed_plan(model)
    enable_sparse_attention(model, plan)
    bare = run(model, inputs)
    torch.manual_seed(5)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    adapted = run(model, inputs)
    assert not near(adapted, bare, MODEL)
    model.fuse_lora()
    assert_near(run(model, inputs), adapted, MODEL)
    model.unfuse_lora()
    assert_near(run(model, inputs), adapted, MODEL)
    model.disable_adapters()
    assert_near(run(model, inputs), bare, MODEL)
    model.enable_adapters()
    assert_near(run(model, inputs), adapted, MODEL)
    model.unload_lora()
    assert_near(run(model, inputs), bare, MODEL)
    assert sparse_attention_summary(model).transformers["transformer"].dense_calls == 0


def test_guidance_in_one_batch_and_in_two_calls() -> None:
    model, inputs = cogvideox(), cogvideox_inputs(*SHAPE)
    with sparse_attention(model, mixed_plan(model)):
        both = run(model, inputs)
        for i in range(2):
            one = {k: v[i : i + 1] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
            assert_near(run(model, one), both[i : i + 1], MODEL)


@pytest.mark.parametrize("steps", [50, 20, 8, 4])
def test_any_number_of_steps(steps: int) -> None:
    pipe = wan_pipeline()
    plan = mixed_plan(pipe.transformer)
    with tap_attention(pipe, masked_attention(plan)):
        expected = generate(pipe, steps)
    pipe.enable_sparse_attention(plan)
    assert_near(generate(pipe, steps), expected, GENERATION)
    assert pipe.sparse_attention_summary().transformers["transformer"].sparse_calls == 2 * 2 * steps


@pytest.mark.parametrize(
    "name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
def test_other_schedulers(name: str) -> None:
    import diffusers

    options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if name.startswith("DPM") else {}
    pipe = wan_pipeline()
    pipe.scheduler = getattr(diffusers, name)(**options)
    plan = mixed_plan(pipe.transformer)
    with tap_attention(pipe, masked_attention(plan)):
        expected = generate(pipe, 4)
    pipe.enable_sparse_attention(plan)
    assert_near(generate(pipe, 4), expected, GENERATION)


@shows("quantised weights", WAN)
def test_quantised_with_torchao() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model, inputs = wan(), wan_inputs(*SHAPE)
    plan = mixed_plan(model)
    with sparse_attention(model, plan):
        full = run(model, inputs)
    quantize_(model.blocks, Int8WeightOnlyConfig())
    with tap_attention(model, masked_attention(plan)):
        expected = run(model, inputs)
    enable_sparse_attention(model, plan)
    assert_near(run(model, inputs), expected, GENERATION)
    assert not torch.equal(expected, full)
    assert sparse_attention_summary(model).transformers["transformer"].dense_calls == 0


def test_quantised_with_gguf(tmp_path: Path) -> None:
    import gguf
    from diffusers import GGUFQuantizationConfig, WanTransformer3DModel

    # Rows of a GGUF block are 32 numbers, so the model is a little wider than the others.
    model = wan(attention_head_dim=32, ffn_dim=64)
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(str(file), "wan")
    for name, tensor in model.state_dict().items():
        data = tensor.float().numpy()
        quantised = tensor.ndim == 2 and ".attn1.to_" in name
        kind = gguf.GGMLQuantizationType.Q8_0 if quantised else gguf.GGMLQuantizationType.F32
        packed = gguf.quantize(data, kind) if quantised else data
        writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.save_config(tmp_path / "config")
    quantised_model = WanTransformer3DModel.from_single_file(
        str(file),
        config=str(tmp_path / "config"),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        dtype=torch.float32,
    ).eval()
    inputs = wan_inputs(*SHAPE)
    plan = mixed_plan(quantised_model)
    with tap_attention(quantised_model, masked_attention(plan)):
        expected = run(quantised_model, inputs)
    enable_sparse_attention(quantised_model, plan)
    assert_near(run(quantised_model, inputs), expected, GENERATION)
    assert sparse_attention_summary(quantised_model).transformers["transformer"].dense_calls == 0


def test_a_modular_pipeline() -> None:
    """``ModularPipeline`` is no ``DiffusionPipeline``."""
    from diffusers.modular_pipelines import WanBlocks

    pipe = WanBlocks().init_pipeline()
    model, inputs = wan(), wan_inputs(*SHAPE)
    pipe.register_components(transformer=model)
    assert pipe.components["transformer"] is model
    dense = run(model, inputs)
    plan = mixed_plan(model)
    with tap_attention(model, masked_attention(plan)):
        expected = run(model, inputs)
    pipe.enable_sparse_attention(plan)
    assert_near(run(model, inputs), expected, MODEL)
    assert pipe.sparse_attention_summary().transformers["transformer"].sparse_calls == 2
    pipe.disable_sparse_attention()
    assert torch.equal(run(model, inputs), dense)


def test_pickle_and_deepcopy_of_a_pipeline() -> None:
    pipe = wan_pipeline()
    dense = generate(pipe)
    pipe.enable_sparse_attention(mixed_plan(pipe.transformer))
    sparse = generate(pipe)
    copies = [pickle.loads(pickle.dumps(pipe)), copy.deepcopy(pipe)]
    pipe.disable_sparse_attention()
    for other in copies:
        assert torch.equal(generate(other), sparse)
        disable_sparse_attention(other)
        assert torch.equal(generate(other), dense)


def test_saved_and_loaded_again_is_dense(tmp_path: Path) -> None:
    from diffusers import WanPipeline

    pipe = wan_pipeline()
    dense = generate(pipe)
    pipe.save_pretrained(tmp_path / "before")
    pipe.enable_sparse_attention(mixed_plan(pipe.transformer))
    pipe.save_pretrained(tmp_path / "after")
    before, after = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in sorted((tmp_path / name).rglob("*.*"))}
        for name in ("before", "after")
    )
    assert before == after
    loaded = WanPipeline.from_pretrained(tmp_path / "after", text_encoder=None, tokenizer=None)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(generate(loaded), dense)
