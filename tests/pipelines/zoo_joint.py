"""Tiny video models whose text and video share one sequence."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from tests.pipelines.case import TEXT, Case, Inputs


def hunyuan15(**options: Any) -> torch.nn.Module:
    from diffusers import HunyuanVideo15Transformer3DModel

    torch.manual_seed(0)
    config: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 3,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "patch_size": 1,
        "patch_size_t": 1,
        "text_embed_dim": 16,
        "text_embed_2_dim": 8,
        "image_embed_dim": 12,
        "rope_axes_dim": (4, 6, 6),
        **options,
    }
    return HunyuanVideo15Transformer3DModel(**config).eval()


def hunyuan15_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    """7 prompt, 4 glyph and 3 image tokens; the second item has paddings in both texts."""
    prompt = torch.ones(2, TEXT, dtype=torch.bool)
    glyphs = torch.ones(2, 4, dtype=torch.bool)
    prompt[1, 5:] = glyphs[1, 1:] = False
    return {
        "hidden_states": torch.randn(2, 4, frames, height, width),
        "timestep": torch.full((2,), float(timestep)),
        "encoder_hidden_states": torch.randn(2, TEXT, 16),
        "encoder_attention_mask": prompt,
        "encoder_hidden_states_2": torch.randn(2, 4, 8),
        "encoder_attention_mask_2": glyphs,
        "image_embeds": torch.randn(2, 3, 12),
        "return_dict": False,
    }


def cogvideox(**options: Any) -> torch.nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(0)
    return CogVideoXTransformer3DModel(**_cogvideox_config(), **options).eval()


def _cogvideox_config() -> dict[str, Any]:
    return {
        "num_attention_heads": 3,
        "attention_head_dim": 16,
        "out_channels": 4,
        "time_embed_dim": 8,
        "text_embed_dim": 16,
        "num_layers": 2,
        "sample_width": 14,
        "sample_height": 10,
        "sample_frames": 9,
        "patch_size": 2,
        "temporal_compression_ratio": 4,
        "max_text_seq_length": TEXT,
    }


def cogvideox15_i2v() -> torch.nn.Module:
    """Patches of two frames, image latents as channels, an embedding of the offset."""
    return cogvideox(
        in_channels=8, patch_size_t=2, ofs_embed_dim=8, patch_bias=False, use_rotary_positional_embeddings=True
    )


def cogvideox15_i2v_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    angles = torch.rand(frames * height * width, 16) * 6.28
    return {
        "hidden_states": torch.randn(2, 2 * frames, 8, 2 * height, 2 * width),
        "encoder_hidden_states": torch.randn(2, TEXT, 16),
        "timestep": torch.tensor([timestep, timestep]),
        "ofs": torch.tensor([2.0]),
        "image_rotary_emb": (angles.cos(), angles.sin()),
        "return_dict": False,
    }


def cogvideox2b() -> torch.nn.Module:
    """Positions are added to the tokens, not rotated."""
    return cogvideox(in_channels=4)


def cogvideox2b_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    return {
        "hidden_states": torch.randn(2, frames, 4, 2 * height, 2 * width),
        "encoder_hidden_states": torch.randn(2, TEXT, 16),
        "timestep": torch.tensor([timestep, timestep]),
        "return_dict": False,
    }


def consisid() -> torch.nn.Module:
    from diffusers import ConsisIDTransformer3DModel

    torch.manual_seed(0)
    return ConsisIDTransformer3DModel(
        **_cogvideox_config(),
        in_channels=8,
        use_rotary_positional_embeddings=True,
        is_train_face=True,
        cross_attn_interval=1,
        cross_attn_dim_head=8,
        cross_attn_num_heads=2,
        LFE_id_dim=4,
        LFE_vit_dim=8,
        LFE_depth=2,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_id_token=2,
        LFE_num_querie=4,
        LFE_output_dim=32,
        LFE_ff_mult=1,
        LFE_num_scale=2,
    ).eval()


def consisid_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    angles = torch.rand(frames * height * width, 16) * 6.28
    return {
        "hidden_states": torch.randn(2, frames, 8, 2 * height, 2 * width),
        "encoder_hidden_states": torch.randn(2, TEXT, 16),
        "timestep": torch.tensor([timestep, timestep]),
        "image_rotary_emb": (angles.cos(), angles.sin()),
        "id_cond": torch.randn(2, 4),
        "id_vit_hidden": [torch.randn(2, 5, 8), torch.randn(2, 5, 8)],
        "return_dict": False,
    }


def hunyuan_i2v(kind: str) -> torch.nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    torch.manual_seed(0)
    channels = {"latent_concat": 9, "token_replace": 4}[kind]
    return HunyuanVideoTransformer3DModel(**_hunyuan_config(), in_channels=channels, image_condition_type=kind).eval()


def _hunyuan_config() -> dict[str, Any]:
    return {
        "out_channels": 4,
        "num_attention_heads": 3,
        "attention_head_dim": 16,
        "num_layers": 1,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "patch_size": 2,
        "patch_size_t": 1,
        "guidance_embeds": True,
        "text_embed_dim": 16,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (4, 6, 6),
    }


def _hunyuan_inputs(
    frames: int, height: int, width: int, timestep: float = 500, *, batch: int = 2, channels: int = 4
) -> Inputs:
    """The last item has three tokens of padding."""
    mask = torch.ones(batch, TEXT, dtype=torch.bool)
    mask[-1, 4:] = False
    return {
        "hidden_states": torch.randn(batch, channels, frames, 2 * height, 2 * width),
        "timestep": torch.full((batch,), timestep),
        "encoder_hidden_states": torch.randn(batch, TEXT, 16),
        "encoder_attention_mask": mask,
        "pooled_projections": torch.randn(batch, 8),
        "guidance": torch.full((batch,), 6000.0),
        "return_dict": False,
    }


def framepack() -> torch.nn.Module:
    from diffusers import HunyuanVideoFramepackTransformer3DModel

    torch.manual_seed(0)
    return HunyuanVideoFramepackTransformer3DModel(
        **_hunyuan_config(), in_channels=4, has_image_proj=True, image_proj_dim=12, has_clean_x_embedder=True
    ).eval()


def framepack_inputs(frames: int, height: int, width: int, timestep: float = 500, batch: int = 2) -> Inputs:
    """Two clean frames of history, two at half and five at a quarter of the resolution; an image of 3 tokens."""
    size = (2 * height, 2 * width)
    return {
        **_hunyuan_inputs(frames, height, width, timestep, batch=batch),
        "image_embeds": torch.randn(batch, 3, 12),
        "indices_latents": torch.arange(frames) + 9,
        "latents_clean": torch.randn(batch, 4, 2, *size),
        "indices_latents_clean": torch.tensor([0, 8]),
        "latents_history_2x": torch.randn(batch, 4, 2, *size),
        "indices_latents_history_2x": torch.tensor([6, 7]),
        "latents_history_4x": torch.randn(batch, 4, 5, *size),
        "indices_latents_history_4x": torch.arange(5) + 1,
    }


def mochi() -> torch.nn.Module:
    from diffusers import MochiTransformer3DModel

    torch.manual_seed(0)
    model = MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=3,
        attention_head_dim=16,
        num_layers=2,
        pooled_projection_dim=24,
        in_channels=4,
        out_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        max_sequence_length=TEXT,
    )
    torch.nn.init.normal_(model.pos_frequencies)  # zeros otherwise, as trained ones are not
    return model.eval()


def mochi_inputs(
    frames: int, height: int, width: int, timestep: float = 500, captions: tuple[int, ...] = (TEXT - 2, TEXT - 2)
) -> Inputs:
    """The time rises from 0 at pure noise to 1000. ``captions``: valid text tokens of each item."""
    batch = len(captions)
    return {
        "hidden_states": torch.randn(batch, 4, frames, 2 * height, 2 * width),
        "encoder_hidden_states": torch.randn(batch, TEXT, 16),
        "timestep": torch.full((batch,), 1000.0 - timestep),
        "encoder_attention_mask": torch.arange(TEXT) < torch.tensor(captions)[:, None],
        "return_dict": False,
    }


def easyanimate() -> torch.nn.Module:
    """The second of its layers has no projections of the text's own."""
    from diffusers import EasyAnimateTransformer3DModel

    torch.manual_seed(0)
    return EasyAnimateTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=12,
        out_channels=4,
        patch_size=2,
        sample_width=14,
        sample_height=10,
        num_layers=2,
        mmdit_layers=1,
        time_embed_dim=8,
        text_embed_dim=16,
        text_embed_dim_t5=8,
    ).eval()


def easyanimate_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    size = (frames, 2 * height, 2 * width)
    return {
        "hidden_states": torch.randn(2, 4, *size),
        "timestep": torch.tensor([timestep, timestep]),
        "encoder_hidden_states": torch.randn(2, TEXT, 16),
        "encoder_hidden_states_t5": torch.randn(2, 4, 8),
        "inpaint_latents": torch.randn(2, 4, *size),
        "control_latents": torch.randn(2, 4, *size),
        "return_dict": False,
    }


def motif(decoder_layers: int = 0) -> torch.nn.Module:
    from diffusers import MotifVideoTransformer3DModel

    torch.manual_seed(0)
    return MotifVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=3,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=2,
        num_decoder_layers=decoder_layers,
        text_embed_dim=16,
        image_embed_dim=12,
        rope_axes_dim=(4, 6, 6),
        enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True,
    ).eval()


def motif_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    mask = torch.ones(2, TEXT, dtype=torch.long)
    mask[1, 4:] = 0
    return {
        "hidden_states": torch.randn(2, 4, frames, 2 * height, 2 * width),
        "timestep": torch.tensor([timestep, timestep]),
        "encoder_hidden_states": torch.randn(2, TEXT, 16),
        "encoder_attention_mask": mask,
        "image_embeds": torch.randn(2, 3, 12),
        "return_dict": False,
    }


HUNYUAN_LAYERS = ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn", "single_transformer_blocks.1.attn")
COGVIDEOX_LAYERS = ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1")

CASES: dict[str, Case] = {
    "hunyuan15": Case(
        hunyuan15,
        hunyuan15_inputs,
        ("transformer_blocks.0.attn", "transformer_blocks.1.attn"),
        after=TEXT + 4 + 3,
        masked=True,
    ),
    "cogvideox15_i2v": Case(cogvideox15_i2v, cogvideox15_i2v_inputs, COGVIDEOX_LAYERS, before=TEXT),
    "cogvideox2b": Case(cogvideox2b, cogvideox2b_inputs, COGVIDEOX_LAYERS, before=TEXT),
    "consisid": Case(consisid, consisid_inputs, COGVIDEOX_LAYERS, before=TEXT),
    "hunyuan_i2v": Case(
        partial(hunyuan_i2v, "latent_concat"),
        partial(_hunyuan_inputs, channels=9),
        HUNYUAN_LAYERS,
        after=TEXT,
        masked=True,
    ),
    "hunyuan_token_replace": Case(
        partial(hunyuan_i2v, "token_replace"), _hunyuan_inputs, HUNYUAN_LAYERS, after=TEXT, masked=True
    ),
    # History: 2 frames of 7 x 9 or 9 x 7 tokens, 1 x 4 x 5 or 5 x 4, 2 x 2 x 3 or 3 x 2.
    "framepack": Case(
        framepack, framepack_inputs, HUNYUAN_LAYERS, before=2 * 63 + 20 + 12, after=3 + TEXT, masked=True
    ),
    "mochi": Case(mochi, mochi_inputs, COGVIDEOX_LAYERS, after=TEXT - 2, calls=2),
    "easyanimate": Case(easyanimate, easyanimate_inputs, COGVIDEOX_LAYERS, before=TEXT + 4),
    "motif": Case(motif, motif_inputs, HUNYUAN_LAYERS, after=3 + TEXT, masked=True),
}
