"""Tiny video models whose self-attention holds no text."""

from __future__ import annotations

from typing import Any

import torch

from tests.pipelines.case import TEXT, Case, Inputs

WAN_LIKE: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
}


def skyreels_v2(**options: Any) -> torch.nn.Module:
    from diffusers import SkyReelsV2Transformer3DModel

    torch.manual_seed(0)
    return SkyReelsV2Transformer3DModel(**{**WAN_LIKE, **options}).eval()


def wan_like_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    return {
        "hidden_states": torch.randn(1, 4, frames, 2 * height, 2 * width),
        "timestep": torch.tensor([timestep]),
        "encoder_hidden_states": torch.randn(1, TEXT, 16),
        "return_dict": False,
    }


def wan_animate() -> torch.nn.Module:
    from diffusers import WanAnimateTransformer3DModel

    torch.manual_seed(0)
    return WanAnimateTransformer3DModel(
        **{**WAN_LIKE, "in_channels": 12},
        latent_channels=4,
        image_dim=16,
        added_kv_proj_dim=48,
        motion_encoder_channel_sizes={"4": 8},
        motion_encoder_size=4,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    ).eval()


def wan_animate_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    return {
        "hidden_states": torch.randn(1, 12, frames, 2 * height, 2 * width),
        "timestep": torch.tensor([timestep]),
        # The model takes the last 512 for text.
        "encoder_hidden_states": torch.randn(1, 512, 16),
        "encoder_hidden_states_image": torch.randn(1, TEXT, 16),
        "pose_hidden_states": torch.randn(1, 4, frames - 1, 2 * height, 2 * width),
        "face_pixel_values": torch.randn(1, 3, 4 * (frames - 2) + 1, 4, 4),
        "return_dict": False,
    }


def chronoedit(**options: Any) -> torch.nn.Module:
    from diffusers import ChronoEditTransformer3DModel

    torch.manual_seed(0)
    return ChronoEditTransformer3DModel(**{**WAN_LIKE, **options}).eval()


def anyflow() -> torch.nn.Module:
    from diffusers import AnyFlowTransformer3DModel

    torch.manual_seed(0)
    return AnyFlowTransformer3DModel(**WAN_LIKE).eval()


def anyflow_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    timesteps = torch.full((1, frames), timestep)
    timesteps[:, 0] = 0  # a given frame
    return {
        "hidden_states": torch.randn(1, frames, 4, 2 * height, 2 * width),
        "timestep": timesteps,
        "r_timestep": timesteps / 2,
        "encoder_hidden_states": torch.randn(1, TEXT, 16),
        "return_dict": False,
    }


def ltx() -> torch.nn.Module:
    from diffusers import LTXVideoTransformer3DModel

    torch.manual_seed(0)
    return LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=3,
        attention_head_dim=16,
        cross_attention_dim=48,
        num_layers=2,
        caption_channels=16,
    ).eval()


def ltx_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    mask = torch.ones(2, TEXT)
    mask[1, 4:] = 0
    return {
        "hidden_states": torch.randn(2, frames * height * width, 4),
        "encoder_hidden_states": torch.randn(2, TEXT, 16),
        "encoder_attention_mask": mask,
        "timestep": torch.tensor([timestep, timestep]),
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (8 / 25, 32, 32),
        "return_dict": False,
    }


def ltx2(**options: Any) -> torch.nn.Module:
    from diffusers import LTX2VideoTransformer3DModel

    torch.manual_seed(0)
    return LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=3,
        attention_head_dim=16,
        cross_attention_dim=48,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=3,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=24,
        num_layers=2,
        caption_channels=16,
        rope_double_precision=False,
        **options,
    ).eval()


def ltx2_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    mask = torch.ones(2, TEXT)
    mask[1, 4:] = 0
    return {
        "hidden_states": torch.randn(2, frames * height * width, 4),
        "audio_hidden_states": torch.randn(2, 11, 4),
        "encoder_hidden_states": torch.randn(2, TEXT, 16),
        "audio_encoder_hidden_states": torch.randn(2, TEXT, 16),
        "encoder_attention_mask": mask,
        "audio_encoder_attention_mask": mask,
        "timestep": torch.tensor([timestep, timestep]),
        "num_frames": frames,
        "height": height,
        "width": width,
        "audio_num_frames": 11,
        "return_dict": False,
    }


def cosmos(**options: Any) -> torch.nn.Module:
    from diffusers import CosmosTransformer3DModel

    torch.manual_seed(0)
    config: dict[str, Any] = {"in_channels": 4, **options}
    return CosmosTransformer3DModel(
        **config,
        out_channels=4,
        num_attention_heads=3,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=16,
        adaln_lora_dim=4,
        max_size=(8, 32, 32),
        concat_padding_mask=False,  # needs torchvision, and adds a channel only
    ).eval()


def cosmos_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    mask = torch.ones(2, TEXT, dtype=torch.bool)
    mask[1, 4:] = False
    return {
        "hidden_states": torch.randn(2, 4, frames, 2 * height, 2 * width),
        "timestep": torch.tensor([timestep / 1000, timestep / 1000]),
        "encoder_hidden_states": torch.randn(2, TEXT, 16),
        "attention_mask": mask,  # of the text
        "fps": 24,
        "return_dict": False,
    }


def allegro() -> torch.nn.Module:
    from diffusers import AllegroTransformer3DModel

    torch.manual_seed(0)
    return AllegroTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=24,  # rotary embedding needs multiples of 6
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=72,
        sample_width=14,
        sample_height=18,
        sample_frames=3,
        caption_channels=16,
    ).eval()


def allegro_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    freqs_and_positions = get_3d_rotary_pos_embed_allegro(
        embed_dim=24,
        crops_coords=((0, 0), (height, width)),
        grid_size=(height, width),
        temporal_size=frames,
        interpolation_scale=(2.2, 2.0, 2.0),
        device=torch.device("cpu"),
    )
    axes = [positions.long() for positions in freqs_and_positions[3:]]
    positions = torch.cartesian_prod(*axes).T.reshape(3, 1, -1)
    mask = torch.ones(2, TEXT)
    mask[1, 4:] = 0
    return {
        "hidden_states": torch.randn(2, 4, frames, 2 * height, 2 * width),
        "encoder_hidden_states": torch.randn(2, TEXT, 16),
        "encoder_attention_mask": mask,
        "timestep": torch.tensor([timestep, timestep]),
        "image_rotary_emb": (freqs_and_positions[:3], tuple(positions)),
        "return_dict": False,
    }


#: What Wan's kin add for image-to-video: keys of the image's features in cross-attention, image latents as channels.
I2V: dict[str, Any] = {"in_channels": 9, "image_dim": 12, "added_kv_proj_dim": 48}


def wan(**options: Any) -> torch.nn.Module:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(**{**WAN_LIKE, **options}).eval()


def wan_i2v_inputs(frames: int, height: int, width: int, images: int = 1) -> Inputs:
    """With the features of one image (3 tokens), or of a first and a last one in a batch of their own."""
    return {
        **wan_like_inputs(frames, height, width),
        "hidden_states": torch.randn(1, 9, frames, 2 * height, 2 * width),
        "encoder_hidden_states_image": torch.randn(images, 3, 12),
    }


def wan_ti2v_inputs(frames: int, height: int, width: int) -> Inputs:
    """Wan 2.2 5B: every token has its timestep, and those of the given first frame are clean."""
    timesteps = torch.full((1, frames * height * width), 500.0)
    timesteps[:, : height * width] = 0
    return {**wan_like_inputs(frames, height, width), "timestep": timesteps}


def cosmos_video2world_inputs(frames: int, height: int, width: int) -> Inputs:
    """Cosmos 1 and 2: a channel says which frames are given."""
    mask = torch.zeros(2, 1, frames, 2 * height, 2 * width)
    mask[:, :, 0] = 1
    return {**cosmos_inputs(frames, height, width), "condition_mask": mask}


def cosmos25_transfer(**options: Any) -> torch.nn.Module:
    """Cosmos 2.5: text through a projection, keys of an image in cross-attention, a ControlNet's residuals."""
    return cosmos(
        use_crossattn_projection=True,
        crossattn_proj_in_channels=24,
        encoder_hidden_states_channels=16,
        img_context_dim_in=12,
        img_context_num_tokens=3,
        img_context_dim_out=48,
        controlnet_block_every_n=1,
        **options,
    )


def cosmos25_transfer_inputs(frames: int, height: int, width: int) -> Inputs:
    inputs = cosmos_inputs(frames, height, width)
    return {
        **inputs,
        "attention_mask": None,
        "encoder_hidden_states": (torch.randn(2, TEXT, 24), torch.randn(2, 3, 12)),
        "block_controlnet_hidden_states": [torch.randn(2, frames * height * width, 48) for _ in range(2)],
    }


def kandinsky5_i2v_inputs(frames: int, height: int, width: int) -> Inputs:
    """The given frames and a mask of them are further channels."""
    inputs = kandinsky5_inputs(frames, height, width)
    return {**inputs, "hidden_states": torch.randn(1, frames, 2 * height, 2 * width, 9)}


def _fill_zeros(model: torch.nn.Module) -> torch.nn.Module:
    """Give modulation layers, which begin at zero, small values: at zero, attention does not reach the output."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.2, generator=generator)
    return model


def kandinsky5(**options: Any) -> torch.nn.Module:
    """One block only: the model rounds queries and keys to bfloat16, so a second one would magnify rounding errors."""
    from diffusers import Kandinsky5Transformer3DModel

    torch.manual_seed(0)
    model = Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=8,
        time_dim=16,
        model_dim=48,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 6, 6),
        **options,
    ).eval()
    return _fill_zeros(model)


def kandinsky5_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    return {
        "hidden_states": torch.randn(1, frames, 2 * height, 2 * width, 4),
        "encoder_hidden_states": torch.randn(1, TEXT, 16),
        "timestep": torch.tensor([timestep]),
        "pooled_projections": torch.randn(1, 8),
        "visual_rope_pos": [torch.arange(frames), torch.arange(height), torch.arange(width)],
        "text_rope_pos": torch.arange(TEXT),
    }


def kandinsky6(**options: Any) -> torch.nn.Module:
    from diffusers import Kandinsky6Transformer3DModel

    torch.manual_seed(0)
    model = Kandinsky6Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        visual_cond=False,
        in_text_dim=16,
        in_text_dim2=8,
        time_dim=16,
        model_dim=48,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        in_audio_dim=4,
        out_audio_dim=4,
        ca_rope=True,
        cross_gates=True,
        fix_modulation=True,
        **options,
    ).eval()
    return _fill_zeros(model)


def kandinsky6_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    mask = torch.ones(2, TEXT, dtype=torch.bool)
    mask[1, 4:] = False
    return {
        "hidden_states": torch.randn(2, frames, 2 * height, 2 * width, 4),
        "encoder_hidden_states": torch.randn(2, TEXT, 16),
        "pooled_projections": torch.randn(2, 8),
        "timestep": torch.tensor([timestep, timestep]),
        "audio_hidden_states": torch.randn(2, 11, 4),
        "encoder_attention_mask": mask,
        "return_dict": False,
    }


def helios() -> torch.nn.Module:
    from diffusers import HeliosTransformer3DModel

    torch.manual_seed(0)
    return HeliosTransformer3DModel(**WAN_LIKE, rope_dim=(4, 6, 6), is_amplify_history=True).eval()


def helios_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    """With a past of 1, 2 and 5 frames, none of which is a multiple of its tokens' size."""
    past = {"short": 1, "mid": 2, "long": 5}
    inputs = {
        "hidden_states": torch.randn(1, 4, frames, 2 * height, 2 * width),
        "timestep": torch.tensor([timestep]),
        "encoder_hidden_states": torch.randn(1, TEXT, 16),
        "indices_hidden_states": torch.arange(8, 8 + frames)[None],
        "return_dict": False,
    }
    begin = 8
    for name, length in past.items():
        begin -= length
        inputs[f"latents_history_{name}"] = torch.randn(1, 4, length, 2 * height, 2 * width)
        inputs[f"indices_latents_history_{name}"] = torch.arange(begin, begin + length)[None]
    return inputs


#: Tokens of Helios's past at 7 x 9 and at 9 x 7: short, middle, long.
HELIOS_PAST = 1 * 7 * 9 + 1 * 4 * 5 + 2 * 2 * 3

WAN_LAYERS = ("blocks.0.attn1", "blocks.1.attn1")
BLOCK_LAYERS = ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1")

CASES: dict[str, Case] = {
    "wan_animate": Case(wan_animate, wan_animate_inputs, WAN_LAYERS),
    "skyreels_v2": Case(skyreels_v2, wan_like_inputs, WAN_LAYERS),
    "chronoedit": Case(chronoedit, wan_like_inputs, WAN_LAYERS),
    "ltx": Case(ltx, ltx_inputs, BLOCK_LAYERS),
    "ltx2": Case(ltx2, ltx2_inputs, BLOCK_LAYERS),
    "cosmos": Case(cosmos, cosmos_inputs, BLOCK_LAYERS),
    "allegro": Case(allegro, allegro_inputs, BLOCK_LAYERS, head_dim=24),
    "kandinsky5": Case(kandinsky5, kandinsky5_inputs, ("visual_transformer_blocks.0.self_attention",)),
    "kandinsky6": Case(
        kandinsky6,
        kandinsky6_inputs,
        (
            "visual_transformer_blocks.0.video_dec_block.self_attention",
            "visual_transformer_blocks.1.video_dec_block.self_attention",
        ),
    ),
    "helios": Case(helios, helios_inputs, WAN_LAYERS, before=HELIOS_PAST),
    "anyflow": Case(anyflow, anyflow_inputs, WAN_LAYERS),
}
