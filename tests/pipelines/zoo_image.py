"""Tiny image models of the Flux kind: text and image in one sequence."""

from __future__ import annotations

import torch

from tests.pipelines.case import IMAGE_SHAPES, TEXT, Case, Inputs

JOINT = ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn", "single_transformer_blocks.1.attn")
FIBO2 = ("noise_refiner.0.attention", "layers.0.attention", "layers.1.attention")


def image_ids(height: int, width: int, image: float = 0, axes: int = 3) -> torch.Tensor:
    """Positions ``[height * width, axes]`` of one packed image."""
    ids = torch.zeros(height, width, axes)
    ids[..., 0] = image
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)
    return ids.reshape(-1, axes)


def text_mask() -> torch.Tensor:
    """Text tokens of a batch of two, bool: the second has padding."""
    mask = torch.ones(2, TEXT, dtype=torch.bool)
    mask[1, 4:] = False
    return mask


def flux2() -> torch.nn.Module:
    from diffusers import Flux2Transformer2DModel

    torch.manual_seed(0)
    return Flux2Transformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    ).eval()


def flux2_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    ids = torch.cat([image_ids(height, width, 10 * i, axes=4) for i in range(frames)])
    text_ids = torch.zeros(TEXT, 4)
    text_ids[:, 3] = torch.arange(TEXT)
    return {
        "hidden_states": torch.randn(1, frames * height * width, 4),
        "encoder_hidden_states": torch.randn(1, TEXT, 16),
        "timestep": torch.tensor([timestep / 1000]),
        "img_ids": ids[None],
        "txt_ids": text_ids[None],
        "guidance": torch.tensor([4.0]),
        "return_dict": False,
    }


def qwenimage() -> torch.nn.Module:
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(0)
    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=1,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    ).eval()


def qwenimage_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    return {
        "hidden_states": torch.randn(2, frames * height * width, 4),
        "encoder_hidden_states": torch.randn(2, TEXT, 16),
        "encoder_hidden_states_mask": text_mask(),
        "timestep": torch.full((2,), timestep / 1000),
        "img_shapes": [[(1, height, width)] * frames] * 2,
        "return_dict": False,
    }


def sd3(dual: tuple[int, ...] = ()) -> torch.nn.Module:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        caption_projection_dim=48,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=24,
        dual_attention_layers=dual,
        qk_norm="rms_norm" if dual else None,
    ).eval()


def sd35_medium() -> torch.nn.Module:
    return sd3((0,))


def sd3_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    return {
        "hidden_states": torch.randn(2, 4, 2 * height, 2 * width),
        "encoder_hidden_states": torch.randn(2, TEXT, 16),
        "pooled_projections": torch.randn(2, 8),
        "timestep": torch.full((2,), float(timestep)),
        "return_dict": False,
    }


def kontext() -> torch.nn.Module:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6),
    ).eval()


def kontext_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    return {**packed_inputs(frames, height, width, timestep), "pooled_projections": torch.randn(1, 8)}


def chroma() -> torch.nn.Module:
    from diffusers import ChromaTransformer2DModel

    torch.manual_seed(0)
    return ChromaTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    ).eval()


def packed_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    """Of models with the argument names of Flux; several frames are reference images in the image's size."""
    return {
        "hidden_states": torch.randn(1, frames * height * width, 4),
        "encoder_hidden_states": torch.randn(1, TEXT, 16),
        "timestep": torch.tensor([timestep / 1000]),
        "img_ids": torch.cat([image_ids(height, width, i) for i in range(frames)]),
        "txt_ids": torch.zeros(TEXT, 3),
        "return_dict": False,
    }


def auraflow() -> torch.nn.Module:
    from diffusers import AuraFlowTransformer2DModel

    torch.manual_seed(0)
    model = AuraFlowTransformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        caption_projection_dim=48,
        out_channels=4,
        pos_embed_max_size=32 * 32,
    ).eval()
    with torch.no_grad():  # gates are near 0 in a random model, so attention would hardly reach the output
        for name, weight in model.named_parameters():
            if ".norm1" in name and name.endswith("linear.weight"):
                weight.normal_()
    return model


def auraflow_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    return {
        "hidden_states": torch.randn(2, 4, 2 * height, 2 * width),
        "encoder_hidden_states": torch.randn(2, TEXT, 16),
        "timestep": torch.full((2,), timestep / 1000),
        "return_dict": False,
    }


def bria() -> torch.nn.Module:
    from diffusers import BriaTransformer2DModel

    torch.manual_seed(0)
    return BriaTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        axes_dims_rope=[4, 6, 6],
    ).eval()


def bria_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    return {**packed_inputs(frames, height, width), "timestep": torch.tensor([float(timestep)])}


def bria_fibo() -> torch.nn.Module:
    from diffusers import BriaFiboTransformer2DModel

    torch.manual_seed(0)
    return BriaFiboTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        axes_dims_rope=[4, 6, 6],
        text_encoder_dim=8,
    ).eval()


def bria_fibo_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    tokens = frames * height * width
    mask = torch.nn.functional.pad(text_mask(), (0, tokens), value=True)
    return {
        "hidden_states": torch.randn(2, tokens, 4),
        "encoder_hidden_states": torch.randn(2, TEXT, 16),
        "text_encoder_layers": [torch.randn(2, TEXT, 8) for _ in range(3)],
        "timestep": torch.full((2,), float(timestep)),
        "img_ids": torch.cat([image_ids(height, width, i) for i in range(frames)]),
        "txt_ids": torch.zeros(TEXT, 3),
        "joint_attention_kwargs": {"attention_mask": mask[:, None, None]},
        "return_dict": False,
    }


def bria_fibo2() -> torch.nn.Module:
    from diffusers import BriaFibo2Transformer2DModel

    torch.manual_seed(0)
    return BriaFibo2Transformer2DModel(
        in_channels=4,
        patch_size=2,
        dim=48,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=3,
        cap_feat_dim=16,
        injection_layer_ids=(1,),
        perceiver_num_layers=1,
        min_num_gist_tokens=TEXT,
        max_num_gist_tokens=2 * TEXT,
        gist_step=TEXT,
        gist_min_text_len=12,
        gist_max_text_len=20,
        axes_dims=(4, 6, 6),
        axes_lens=(64, 32, 32),
    ).eval()


def bria_fibo2_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    """With images to edit in the image's size where there are several frames."""
    images = [torch.randn(1, 4, 2 * height, 2 * width) for _ in range(frames)]
    return {
        "hidden_states": images[0],
        "timestep": torch.tensor([timestep / 1000]),
        "encoder_hidden_states": torch.randn(1, 2, 10, 16),
        "context_latents": images[1:] or None,
        "return_dict": False,
    }


def ovis_image() -> torch.nn.Module:
    from diffusers import OvisImageTransformer2DModel

    torch.manual_seed(0)
    return OvisImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    ).eval()


def longcat_image() -> torch.nn.Module:
    from diffusers import LongCatImageTransformer2DModel

    torch.manual_seed(0)
    return LongCatImageTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        axes_dims_rope=[4, 6, 6],
    ).eval()


def longcat_image_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    inputs = packed_inputs(frames, height, width, timestep)
    inputs["img_ids"] += torch.tensor([1, TEXT, TEXT])  # behind the text's positions
    return inputs


def hunyuan_image(patch_size: tuple[int, ...] = (1, 1), rope: tuple[int, ...] = (8, 8)) -> torch.nn.Module:
    from diffusers import HunyuanImageTransformer2DModel

    torch.manual_seed(0)
    return HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=3,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=patch_size,
        text_embed_dim=16,
        text_embed_2_dim=8 if len(patch_size) == 2 else None,
        rope_axes_dim=rope,
    ).eval()


def hunyuan_image_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    return {
        "hidden_states": torch.randn(2, 4, height, width),
        "timestep": torch.full((2,), float(timestep)),
        "encoder_hidden_states": torch.randn(2, TEXT, 16),
        "encoder_attention_mask": text_mask(),
        "encoder_hidden_states_2": torch.randn(2, 5, 8),
        "encoder_attention_mask_2": text_mask()[:, 1:6],
        "return_dict": False,
    }


def hunyuan_image_refiner() -> torch.nn.Module:
    return hunyuan_image((1, 1, 1), (4, 6, 6))


def hunyuan_image_refiner_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    return {
        "hidden_states": torch.randn(2, 4, frames, height, width),
        "timestep": torch.full((2,), float(timestep)),
        "encoder_hidden_states": torch.randn(2, TEXT, 16),
        "encoder_attention_mask": text_mask(),
        "return_dict": False,
    }


def flux3() -> torch.nn.Module:
    from diffusers import Flux3Transformer2DModel

    torch.manual_seed(0)
    return Flux3Transformer2DModel(
        in_channels=4,
        cond_in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        timestep_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    ).eval()


def flux3_inputs(frames: int, height: int, width: int, timestep: float = 500) -> Inputs:
    return {
        "hidden_states": torch.randn(1, height * width, 4),
        "encoder_hidden_states": torch.randn(1, TEXT, 16),
        "timestep": torch.tensor([timestep / 1000]),
        "img_ids": image_ids(height, width, axes=4),
        "txt_ids": torch.zeros(TEXT, 4),
        "return_dict": False,
    }


CASES: dict[str, Case] = {
    "flux2": Case(flux2, flux2_inputs, JOINT, before=TEXT, shapes=IMAGE_SHAPES),
    "flux2_reference": Case(flux2, flux2_inputs, JOINT, before=TEXT),
    "qwenimage": Case(
        qwenimage,
        qwenimage_inputs,
        ("transformer_blocks.0.attn", "transformer_blocks.1.attn"),
        before=TEXT,
        shapes=IMAGE_SHAPES,
        masked=True,
    ),
    "sd3": Case(
        sd3, sd3_inputs, ("transformer_blocks.0.attn", "transformer_blocks.1.attn"), after=TEXT, shapes=IMAGE_SHAPES
    ),
    "sd35_medium": Case(
        sd35_medium,
        sd3_inputs,
        ("transformer_blocks.0.attn", "transformer_blocks.0.attn2", "transformer_blocks.1.attn"),
        after=TEXT,
        shapes=IMAGE_SHAPES,
        visual_only=("transformer_blocks.0.attn2",),
    ),
    "kontext": Case(kontext, kontext_inputs, JOINT, before=TEXT),
    "chroma": Case(chroma, packed_inputs, JOINT, before=TEXT, shapes=IMAGE_SHAPES),
    "auraflow": Case(
        auraflow,
        auraflow_inputs,
        ("joint_transformer_blocks.0.attn", "single_transformer_blocks.0.attn", "single_transformer_blocks.1.attn"),
        before=TEXT + 8,
        shapes=IMAGE_SHAPES,
    ),
    "bria": Case(bria, bria_inputs, JOINT, before=TEXT, shapes=IMAGE_SHAPES),
    "bria_fibo": Case(bria_fibo, bria_fibo_inputs, JOINT, before=TEXT, shapes=IMAGE_SHAPES, masked=True),
    "bria_fibo2": Case(bria_fibo2, bria_fibo2_inputs, FIBO2, before=TEXT, shapes=IMAGE_SHAPES, visual_only=FIBO2[:1]),
    "bria_fibo2_edit": Case(bria_fibo2, bria_fibo2_inputs, FIBO2, before=TEXT, visual_only=FIBO2[:1]),
    "ovis_image": Case(ovis_image, packed_inputs, JOINT, before=TEXT, shapes=IMAGE_SHAPES),
    "longcat_image": Case(longcat_image, longcat_image_inputs, JOINT, before=TEXT, shapes=IMAGE_SHAPES),
    "hunyuan_image": Case(hunyuan_image, hunyuan_image_inputs, JOINT, after=TEXT + 5, shapes=IMAGE_SHAPES, masked=True),
    "hunyuan_image_refiner": Case(hunyuan_image_refiner, hunyuan_image_refiner_inputs, JOINT, after=TEXT, masked=True),
    "flux3": Case(
        flux3,
        flux3_inputs,
        ("mode_blocks.image.0.attn", *JOINT[1:]),
        before=TEXT,
        shapes=IMAGE_SHAPES,
        visual_only=("mode_blocks.image.0.attn",),
    ),
}
