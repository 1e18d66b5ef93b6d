"""Tiny random transformers of every family, their inputs, and plans that use several patterns at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from diffsparse.entry import Execution, HeadEntry
from diffsparse.order import AxisOrder, RasterOrder, TileOrder
from diffsparse.patterns import Diagonals, Full, Sink, Window
from diffsparse.pipelines import AttentionCall, architecture_of
from diffsparse.plan import SparsityPlan
from diffsparse.repair import Repair
from diffsparse.schedule import Schedule
from tests.pipelines import zoo_image, zoo_joint, zoo_picture, zoo_video
from tests.pipelines.case import IMAGE_SHAPES, TEXT, Case, Inputs


def wan(seed: int = 0, layers: int = 2, **options: Any) -> torch.nn.Module:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    return WanTransformer3DModel(**_wan_config(layers, **options)).eval()


def _wan_config(layers: int, **options: Any) -> dict[str, Any]:
    return {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 3,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 32,
        "ffn_dim": 32,
        "num_layers": layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        **options,
    }


def with_large_logits(model: torch.nn.Module) -> torch.nn.Module:
    """A Wan model whose logits have a standard deviation of about 10, as trained models have."""
    for block in model.blocks:
        for norm in (block.attn1.norm_q, block.attn1.norm_k):
            norm.weight.data.fill_(10**0.5)
    return model


def wan_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    return {
        "hidden_states": torch.randn(1, 4, frames, 2 * height, 2 * width),
        "timestep": torch.tensor([timestep]),
        "encoder_hidden_states": torch.randn(1, TEXT, 16),
        "return_dict": False,
    }


def vace(vace_in_channels: int = 8) -> torch.nn.Module:
    from diffusers import WanVACETransformer3DModel

    torch.manual_seed(0)
    return WanVACETransformer3DModel(**_wan_config(3), vace_layers=[0, 2], vace_in_channels=vace_in_channels).eval()


def vace_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    inputs = wan_inputs(frames, height, width, timestep)
    return {**inputs, "control_hidden_states": torch.randn(1, 8, frames, 2 * height, 2 * width)}


def hunyuan() -> torch.nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    torch.manual_seed(0)
    return HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=3,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    ).eval()


def hunyuan_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    mask = torch.ones(2, TEXT, dtype=torch.bool)
    mask[1, 4:] = False
    return {
        "hidden_states": torch.randn(2, 4, frames, 2 * height, 2 * width),
        "timestep": torch.tensor([timestep, timestep]),
        "encoder_hidden_states": torch.randn(2, TEXT, 16),
        "encoder_attention_mask": mask,
        "pooled_projections": torch.randn(2, 8),
        "guidance": torch.tensor([6000.0, 6000.0]),
        "return_dict": False,
    }


def cogvideox() -> torch.nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(0)
    return CogVideoXTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=2,
        sample_width=14,
        sample_height=10,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=True,
    ).eval()


def cogvideox_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    angles = torch.rand(frames * height * width, 16) * 6.28
    return {
        "hidden_states": torch.randn(2, frames, 4, 2 * height, 2 * width),
        "encoder_hidden_states": torch.randn(2, TEXT, 16),
        "timestep": torch.tensor([timestep, timestep]),
        "image_rotary_emb": (angles.cos(), angles.sin()),
        "return_dict": False,
    }


def flux() -> torch.nn.Module:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=[4, 6, 6],
    ).eval()


def flux_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    ids = torch.zeros(height, width, 3)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)
    return {
        "hidden_states": torch.randn(1, height * width, 4),
        "encoder_hidden_states": torch.randn(1, TEXT, 16),
        "pooled_projections": torch.randn(1, 8),
        "timestep": torch.tensor([timestep / 1000]),
        "img_ids": ids.reshape(-1, 3),
        "txt_ids": torch.zeros(TEXT, 3),
        "return_dict": False,
    }


CASES: dict[str, Case] = {
    "wan": Case(wan, wan_inputs, ("blocks.0.attn1", "blocks.1.attn1")),
    "vace": Case(
        vace,
        vace_inputs,
        ("blocks.0.attn1", "blocks.1.attn1", "blocks.2.attn1", "vace_blocks.0.attn1", "vace_blocks.1.attn1"),
    ),
    "hunyuan": Case(
        hunyuan,
        hunyuan_inputs,
        ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn", "single_transformer_blocks.1.attn"),
        after=TEXT,
        masked=True,
    ),
    "cogvideox": Case(
        cogvideox, cogvideox_inputs, ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1"), before=TEXT
    ),
    "flux": Case(
        flux,
        flux_inputs,
        ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn", "single_transformer_blocks.1.attn"),
        before=TEXT,
        shapes=IMAGE_SHAPES,
    ),
    **zoo_video.CASES,
    **zoo_joint.CASES,
    **zoo_image.CASES,
    **zoo_picture.CASES,
}

NEAR = Window((1, 3, 3))
ENTRIES = (
    HeadEntry(TileOrder(1, 8, 8), NEAR),
    HeadEntry(AxisOrder("HWF"), Diagonals(half_width=(None, 0, 0))),
    HeadEntry(RasterOrder(), Window((0.4, 0.4, 0.4)) | Sink(tokens=1)),
    HeadEntry(TileOrder(1, 4, 16), Full()),
    HeadEntry(RasterOrder(), Full(), execution=Execution("skip")),
)


def mixed_plan(model: torch.nn.Module, schedule: Schedule | None = None, shift: int = 0) -> SparsityPlan:
    """Another pattern and order for every head and layer, none with a tail."""
    architecture = architecture_of(model)
    phases = (schedule or Schedule()).num_phases
    table = {
        name: [[ENTRIES[(i + h + p + shift) % len(ENTRIES)] for h in range(architecture.heads)] for p in range(phases)]
        for i, name in enumerate(architecture.layers)
    }
    return SparsityPlan.from_table(table, schedule=schedule or Schedule(), architecture=architecture)


def with_repair(plan: SparsityPlan, dim: int, strength: float = 0.5, seed: int = 0) -> SparsityPlan:
    """The plan with random maps for two of three heads of each layer."""
    rng = np.random.default_rng(seed)
    index = np.full(plan.index.shape, -1, np.int32)
    index[:, :, :2] = np.arange(index[:, :, :2].size).reshape(index[:, :, :2].shape)
    n = index.max() + 1
    scale = strength / dim**0.5
    left, bias = rng.normal(scale=scale, size=(n, dim, dim)), rng.normal(scale=scale, size=(n, dim))
    return replace(plan, repair=Repair(index, left.astype(np.float16), bias.astype(np.float16)))


def dense_plan(model: torch.nn.Module) -> SparsityPlan:
    """All entries dense, each layer named."""
    architecture = architecture_of(model)
    table = {name: [[HeadEntry()] * architecture.heads] for name in architecture.layers}
    return SparsityPlan.from_table(table, architecture=architecture)


def masked_attention(plan: SparsityPlan) -> Callable[[AttentionCall], torch.Tensor | None]:
    """A tap that runs torch's own attention under the plan's token masks: what the plan means."""

    def run(call: AttentionCall) -> torch.Tensor | None:
        phase = plan.schedule.phase(call.noise_level)
        layout = None if phase is None else plan.layout(phase, call.layer, call.q.shape[2], call.grid)
        if layout is None:
            return None
        out = torch.zeros_like(call.q)
        for head in range(call.q.shape[2]):
            if layout.heads.table[head, 0]:
                continue
            mask = layout.token_mask(head)[None, None]
            if call.kv_len is not None:
                mask = mask & call.kv_len[:, None, None]
            q, k, v = (x[:, :, head : head + 1].transpose(1, 2) for x in (call.q, call.k, call.v))
            found = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=call.scale)
            out[:, :, head : head + 1] = torch.nan_to_num(found).transpose(1, 2)  # rows with no key give 0
        return out

    return run


def run(model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def wan_pipeline(stages: int = 1, layers: int = 2) -> Any:
    """A ``WanPipeline`` without text encoder and decoder: run it with :func:`generate`. Two stages are Wan 2.2's."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline

    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae.eval(),
        scheduler=scheduler,
        transformer=wan(0, layers),
        transformer_2=wan(1, layers) if stages == 2 else None,
        boundary_ratio=0.8 if stages == 2 else None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(
    pipe: Any, steps: int = 4, height: int = 112, width: int = 144, frames: int = 9, seed: int = 0, **options: Any
) -> torch.Tensor:
    """Latents of one clip; 3 x 7 x 9 tokens unless told otherwise, two forwards a step."""
    embeddings = torch.Generator().manual_seed(1)
    options.setdefault("output_type", "latent")
    return pipe(
        prompt_embeds=torch.randn(1, TEXT, 16, generator=embeddings),
        negative_prompt_embeds=torch.randn(1, TEXT, 16, generator=embeddings),
        num_inference_steps=steps,
        height=height,
        width=width,
        num_frames=frames,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(seed),
        **options,
    ).frames
