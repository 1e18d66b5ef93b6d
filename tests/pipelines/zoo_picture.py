"""More tiny image models."""

from __future__ import annotations

from typing import Any

import torch

from tests.pipelines.case import IMAGE_SHAPES, TEXT, Case, Inputs, Shape


def _small(seed: int, *parameters: torch.nn.Parameter) -> None:
    """Fill parameters that start at zero, and would hide what attention computes."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)


def z_image() -> torch.nn.Module:
    from diffusers import ZImageTransformer2DModel

    torch.manual_seed(0)
    return ZImageTransformer2DModel(
        in_channels=4,
        dim=48,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 64, 64],
    ).eval()


def z_image_inputs(
    frames: int, height: int, width: int, timestep: float = 500, captions: tuple[int, ...] = (TEXT, 5)
) -> Inputs:
    """Captions of up to 32 tokens take 32, up to 64 take 64."""
    return {
        "x": [torch.randn(4, frames, 2 * height, 2 * width) for _ in captions],
        "t": torch.full((len(captions),), 1 - timestep / 1000),
        "cap_feats": [torch.randn(length, 16) for length in captions],
        "return_dict": False,
    }


def z_image_stacked() -> torch.nn.Module:
    """Answers with one tensor, as the tests expect, where the model answers with a list."""
    model = z_image()
    model.register_forward_hook(_stack)
    return model


def _stack(module: torch.nn.Module, args: Any, output: Any) -> tuple[torch.Tensor]:
    return (torch.stack(output[0]),)


def pixart() -> torch.nn.Module:
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=24,  # no power of two, like the 72 of the released models
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=72,
        sample_size=128,  # the size at which resolution and aspect ratio are conditions
        caption_channels=16,
    ).eval()


def pixart_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    mask = torch.ones(2, TEXT)
    mask[1, 4:] = 0
    return {
        "hidden_states": torch.randn(2, 4, 2 * height, 2 * width),
        "encoder_hidden_states": torch.randn(2, TEXT, 16),
        "encoder_attention_mask": mask,
        "timestep": torch.tensor([timestep, timestep]),
        "added_cond_kwargs": {
            "resolution": torch.tensor([[16.0 * height, 16.0 * width]] * 2),
            "aspect_ratio": torch.tensor([[height / width]] * 2),
        },
        "return_dict": False,
    }


def hunyuan_dit() -> torch.nn.Module:
    from diffusers import HunyuanDiT2DModel

    torch.manual_seed(0)
    return HunyuanDiT2DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=4,
        patch_size=2,
        sample_size=32,
        hidden_size=48,
        num_layers=4,  # the last one has a skip connection
        cross_attention_dim=16,
        cross_attention_dim_t5=16,
        pooled_projection_dim=16,
        text_len=3,
        text_len_t5=4,
    ).eval()


def hunyuan_dit_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    angles = torch.rand(height * width, 16) * 6.28
    return {
        "hidden_states": torch.randn(2, 4, 2 * height, 2 * width),
        "timestep": torch.full((2,), float(timestep)),
        "encoder_hidden_states": torch.randn(2, 3, 16),
        "text_embedding_mask": torch.tensor([[1, 1, 1], [1, 0, 0]]),
        "encoder_hidden_states_t5": torch.randn(2, 4, 16),
        "text_embedding_mask_t5": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "image_meta_size": torch.tensor([[16.0 * height, 16.0 * width] * 2 + [0.0, 0.0]] * 2),
        "style": torch.tensor([0, 0]),
        "image_rotary_emb": (angles.cos(), angles.sin()),
        "return_dict": False,
    }


def lumina2() -> torch.nn.Module:
    from diffusers import Lumina2Transformer2DModel

    torch.manual_seed(0)
    model = Lumina2Transformer2DModel(
        sample_size=32,
        in_channels=4,
        hidden_size=48,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(64, 64, 64),
        cap_feat_dim=16,
    )
    return model.eval()


def lumina2_inputs(
    frames: int, height: int, width: int, timestep: float = 500, captions: tuple[int, ...] = (TEXT, TEXT)
) -> Inputs:
    """Captions are padded to 12 tokens; the model cuts padding off."""
    return {
        "hidden_states": torch.randn(len(captions), 4, 2 * height, 2 * width),
        "timestep": torch.full((len(captions),), 1 - timestep / 1000),
        "encoder_hidden_states": torch.randn(len(captions), 12, 16),
        "encoder_attention_mask": torch.arange(12) < torch.tensor(captions)[:, None],
        "return_dict": False,
    }


def hidream() -> torch.nn.Module:
    from diffusers import HiDreamImageTransformer2DModel

    torch.manual_seed(0)
    return HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        caption_channels=[16, 8],
        text_emb_dim=8,
        num_routed_experts=0,  # which expert a token gets would depend on the last bit
        axes_dims_rope=(4, 6, 6),
        max_resolution=(32, 32),
        llama_layers=[0, 1, 1],
    ).eval()


def hidream_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    return {
        "hidden_states": torch.randn(2, 4, 2 * height, 2 * width),
        "timesteps": torch.tensor([timestep, timestep]),
        "encoder_hidden_states_t5": torch.randn(2, TEXT, 16),
        "encoder_hidden_states_llama3": torch.randn(2, 2, 5, 8),
        "pooled_embeds": torch.randn(2, 8),
        "return_dict": False,
    }


def cogview4() -> torch.nn.Module:
    from diffusers import CogView4Transformer2DModel

    torch.manual_seed(0)
    return CogView4Transformer2DModel(**_cogview_config(), rope_axes_dim=(16, 16)).eval()


def _cogview_config() -> dict[str, Any]:
    return {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 3,
        "text_embed_dim": 16,
        "time_embed_dim": 8,
        "condition_dim": 4,
    }


def cogview_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    size = torch.tensor([[16.0 * height, 16.0 * width]] * 2)
    return {
        "hidden_states": torch.randn(2, 4, 2 * height, 2 * width),
        "encoder_hidden_states": torch.randn(2, TEXT, 16),
        "timestep": torch.tensor([timestep, timestep]),
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros(2, 2),
        "return_dict": False,
    }


def cogview3() -> torch.nn.Module:
    from diffusers import CogView3PlusTransformer2DModel

    torch.manual_seed(0)
    return CogView3PlusTransformer2DModel(**_cogview_config(), pos_embed_max_size=32, sample_size=32).eval()


def glm_image() -> torch.nn.Module:
    from diffusers import GlmImageTransformer2DModel

    torch.manual_seed(0)
    return GlmImageTransformer2DModel(**_cogview_config(), prior_vq_quantizer_codebook_size=11).eval()


def glm_image_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    inputs = cogview_inputs(frames, height, width, timestep)
    del inputs["original_size"]
    return {
        **inputs,
        "prior_token_id": torch.randint(11, (2, height * width)),
        "prior_token_drop": torch.zeros(2, height * width, dtype=torch.bool),
    }


def krea2() -> torch.nn.Module:
    from diffusers import Krea2Transformer2DModel

    torch.manual_seed(0)
    model = Krea2Transformer2DModel(
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    return model.eval()


def krea2_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    mask = torch.ones(2, TEXT, dtype=torch.bool)
    mask[1, 4:] = False
    positions = torch.zeros(TEXT + height * width, 3)
    positions[TEXT:, 1] = torch.arange(height).repeat_interleave(width)
    positions[TEXT:, 2] = torch.arange(width).repeat(height)
    return {
        "hidden_states": torch.randn(2, height * width, 4),
        "encoder_hidden_states": torch.randn(2, TEXT, 2, 16),
        "timestep": torch.full((2,), timestep / 1000),
        "position_ids": positions,
        "encoder_attention_mask": mask,
        "return_dict": False,
    }


def ernie_image() -> torch.nn.Module:
    from diffusers import ErnieImageTransformer2DModel

    torch.manual_seed(0)
    model = ErnieImageTransformer2DModel(
        hidden_size=48,
        num_attention_heads=3,
        num_layers=2,
        ffn_hidden_size=32,
        in_channels=4,
        out_channels=4,
        text_in_dim=16,
        rope_axes_dim=(4, 6, 6),
    )
    modulation = model.adaLN_modulation[-1]
    _small(1, modulation.weight, modulation.bias, model.final_linear.weight, model.final_linear.bias)
    return model.eval()


def ernie_image_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    return {
        "hidden_states": torch.randn(2, 4, height, width),
        "timestep": torch.full((2,), float(timestep)),
        "text_bth": torch.randn(2, TEXT, 16),
        "text_lens": torch.tensor([TEXT, 4]),
        "return_dict": False,
    }


def _joyimage_config() -> dict[str, Any]:
    return {
        "in_channels": 4,
        "hidden_size": 48,
        "num_attention_heads": 3,
        "text_dim": 16,
        "mlp_width_ratio": 1.0,
        "num_layers": 2,
        "rope_dim_list": [4, 6, 6],
    }


def joyimage_edit() -> torch.nn.Module:
    from diffusers import JoyImageEditTransformer3DModel

    torch.manual_seed(0)
    return JoyImageEditTransformer3DModel(**_joyimage_config()).eval()


def joyimage_edit_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    """The image and two references, for three frames."""
    return {
        "hidden_states": torch.randn(1, frames, 4, 1, 2 * height, 2 * width),
        "timestep": torch.tensor([timestep]),
        "encoder_hidden_states": torch.randn(1, TEXT, 16),
        "return_dict": False,
    }


def joyimage_edit_plus() -> torch.nn.Module:
    from diffusers import JoyImageEditPlusTransformer3DModel

    torch.manual_seed(0)
    return JoyImageEditPlusTransformer3DModel(**_joyimage_config()).eval()


def joyimage_edit_plus_inputs(
    frames: int,
    height: int,
    width: int,
    timestep: float = 500,
    references: tuple[tuple[Shape, ...], ...] = (((1, 5, 6),), ((1, 5, 6),)),
) -> Inputs:
    """An image and references of their own sizes for each item of the batch."""
    sizes = [[(frames, height, width), *item] for item in references]
    longest = max(sum(t * h * w for t, h, w in item) for item in sizes)
    mask = torch.ones(len(sizes), TEXT)
    mask[1:, 4:] = 0
    return {
        "hidden_states": torch.randn(len(sizes), longest, 4, 1, 2, 2),
        "timestep": torch.full((len(sizes),), float(timestep)),
        "encoder_hidden_states": torch.randn(len(sizes), TEXT, 16),
        "encoder_hidden_states_mask": mask,
        "shape_list": sizes,
        "return_dict": False,
    }


def ideogram4() -> torch.nn.Module:
    from diffusers import Ideogram4Transformer2DModel

    torch.manual_seed(0)
    return Ideogram4Transformer2DModel(
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        intermediate_size=32,
        adaln_dim=16,
        llm_features_dim=16,
        mrope_section=(4, 2, 2),
    ).eval()


def ideogram4_image() -> torch.nn.Module:
    """Answers with the image alone, as the pipeline uses it: what padding gives is of no use to anyone."""
    model = ideogram4()
    model.register_forward_hook(_image_alone)
    return model


def _image_alone(module: torch.nn.Module, args: Any, output: Any) -> tuple[torch.Tensor]:
    return (output[0][:, TEXT:],)


def ideogram4_inputs(
    frames: int, height: int, width: int, timestep: float = 500, text: tuple[int, ...] = (TEXT, 4), room: int = TEXT
) -> Inputs:
    """Text of these lengths, padded in front to ``room`` tokens."""
    batch, image = len(text), height * width
    positions = torch.zeros(batch, room + image, 3, dtype=torch.long)
    segments = torch.full((batch, room + image), -1)
    indicator = torch.zeros(batch, room + image, dtype=torch.long)
    positions[:, room:] = 65536
    positions[:, room:, 1] += torch.arange(height).repeat_interleave(width)
    positions[:, room:, 2] += torch.arange(width).repeat(height)
    for i, length in enumerate(text):
        positions[i, room - length : room] = torch.arange(length)[:, None]
        segments[i, room - length :] = 1
        indicator[i, room - length :] = 3
    indicator[:, room:] = 2
    return {
        "hidden_states": torch.randn(batch, room + image, 4),
        "timestep": torch.full((batch,), 1 - timestep / 1000),
        "encoder_hidden_states": torch.randn(batch, room + image, 16),
        "position_ids": positions,
        "segment_ids": segments,
        "indicator": indicator,
        "return_dict": False,
    }


def dit() -> torch.nn.Module:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    return DiTTransformer2DModel(num_attention_heads=3, attention_head_dim=16, num_layers=2, sample_size=28).eval()


def dit_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    return {
        "hidden_states": torch.randn(2, 4, 2 * height, 2 * width),
        "timestep": torch.tensor([timestep, timestep]),
        "class_labels": torch.tensor([3, 1000]),
        "return_dict": False,
    }


SHAPES_OF_32: tuple[Shape, Shape] = ((1, 14, 16), (1, 16, 14))  # images that need no padding
CASES: dict[str, Case] = {
    "z_image": Case(
        z_image_stacked,
        z_image_inputs,
        ("noise_refiner.0.attention", "layers.0.attention", "layers.1.attention"),
        after=32,
        shapes=SHAPES_OF_32,
        visual_only=("noise_refiner.0.attention",),
    ),
    "pixart": Case(
        pixart,
        pixart_inputs,
        ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1"),
        shapes=IMAGE_SHAPES,
        head_dim=24,
    ),
    "hunyuan_dit": Case(
        hunyuan_dit, hunyuan_dit_inputs, tuple(f"blocks.{i}.attn1" for i in range(4)), shapes=IMAGE_SHAPES
    ),
    "lumina2": Case(
        lumina2,
        lumina2_inputs,
        ("noise_refiner.0.attn", "layers.0.attn", "layers.1.attn"),
        before=TEXT,
        shapes=IMAGE_SHAPES,
        visual_only=("noise_refiner.0.attn",),
    ),
    "hidream": Case(
        hidream,
        hidream_inputs,
        (
            "double_stream_blocks.0.block.attn1",
            "single_stream_blocks.0.block.attn1",
            "single_stream_blocks.1.block.attn1",
        ),
        after=256 - 208 + TEXT + 10,  # padding of an image that is not square, T5, Llama twice
        shapes=IMAGE_SHAPES,
    ),
    "cogview4": Case(
        cogview4,
        cogview_inputs,
        ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1"),
        before=TEXT,
        shapes=IMAGE_SHAPES,
    ),
    "cogview3": Case(
        cogview3,
        cogview_inputs,
        ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1"),
        before=TEXT,
        shapes=IMAGE_SHAPES,
    ),
    "glm_image": Case(
        glm_image,
        glm_image_inputs,
        ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1"),
        before=TEXT,
        shapes=IMAGE_SHAPES,
    ),
    "krea2": Case(
        krea2,
        krea2_inputs,
        ("transformer_blocks.0.attn", "transformer_blocks.1.attn"),
        before=TEXT,
        shapes=IMAGE_SHAPES,
        masked=True,
    ),
    "ernie_image": Case(
        ernie_image,
        ernie_image_inputs,
        ("layers.0.self_attention", "layers.1.self_attention"),
        after=TEXT,
        shapes=IMAGE_SHAPES,
        masked=True,
    ),
    "joyimage_edit": Case(
        joyimage_edit, joyimage_edit_inputs, ("double_blocks.0.attn", "double_blocks.1.attn"), after=TEXT
    ),
    "joyimage_edit_plus": Case(
        joyimage_edit_plus,
        joyimage_edit_plus_inputs,
        ("double_blocks.0.attn", "double_blocks.1.attn"),
        after=30 + TEXT,
        shapes=IMAGE_SHAPES,
        masked=True,
    ),
    "ideogram4": Case(
        ideogram4_image,
        ideogram4_inputs,
        ("layers.0.attention", "layers.1.attention"),
        before=TEXT,
        shapes=IMAGE_SHAPES,
        masked=True,
    ),
    "dit": Case(
        dit,
        dit_inputs,
        ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1"),
        shapes=((1, 14, 14), (1, 13, 13)),  # the model makes squares only
    ),
}
