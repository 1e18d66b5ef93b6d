"""Pipelines of diffusers that are given more than a prompt, with tiny random models, and inputs for them.

Text encoders are stand-ins as in ``zoo``; the autoencoders are real, for they encode the pictures that are given.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.pipelines import zoo_image, zoo_joint, zoo_video
from tests.pipelines.models import flux, vace, wan, wan_pipeline
from tests.search.zoo import IMAGE, VIDEO, _embed, _own, _padded, _pair

PROMPTS = ("a red circle", "a blue square on a hill")


def picture(seed: int, height: int = 112, width: int = 144) -> Image.Image:
    """Random colours in fields of 16 pixels."""
    small = np.random.default_rng(seed).integers(0, 255, (height // 16, width // 16, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST)


def write_files(folder: Path) -> None:
    """What the inputs below name: two pictures, two square ones, a mask of each, and a clip of nine frames of each."""
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(2):
        picture(n).save(folder / f"picture{n}.png")
        picture(n, 128, 128).save(folder / f"square{n}.png")
        frames = [picture(10 * n + f + 2) for f in range(9)]
        frames[0].save(folder / f"clip{n}.gif", save_all=True, append_images=frames[1:])
        half = np.zeros((112, 144), np.uint8)
        half[:, 72:] = 255
        Image.fromarray(half).save(folder / f"mask{n}.png")


@dataclass(frozen=True)
class Conditioned:
    """How a pipeline is built, what it is asked for, and what each of two inputs gives beside the prompt.

    ``files``: by argument, with ``{n}`` for the number of the input. ``stays_dense``: what a search says of it.
    """

    build: Callable[[], Any]
    settings: dict[str, Any]
    files: dict[str, Any]
    density: float = 0.6
    ran: dict[int, int] = field(default_factory=dict)

    def inputs(self) -> list[dict[str, Any]]:
        return [
            json.loads(json.dumps({"prompt": prompt, **self.files}).replace("{n}", str(n)))
            for n, prompt in enumerate(PROMPTS)
        ]


# -- videos ------------------------------------------------------------------------------------------------------------


def wan_i2v() -> Any:
    base = wan_pipeline()
    transformer = wan(in_channels=12, out_channels=4)
    return _own(
        "WanImageToVideoPipeline", transformer, _pair, vae=base.vae, scheduler=base.scheduler, tokenizer=None,
        text_encoder=None,
    )  # fmt: skip


def wan_i2v_experts() -> Any:
    base = wan_pipeline()
    return _own(
        "WanImageToVideoPipeline", wan(0, in_channels=12), _pair, vae=base.vae, scheduler=base.scheduler,
        transformer_2=wan(1, in_channels=12), boundary_ratio=0.8,
    )  # fmt: skip


def wan_v2v() -> Any:
    base = wan_pipeline()
    return _own("WanVideoToVideoPipeline", wan(), _pair, vae=base.vae, scheduler=base.scheduler)


def wan_vace() -> Any:
    base = wan_pipeline()
    # The video twice, active and inactive, and 8 x 8 pixels of the mask.
    return _own("WanVACEPipeline", vace(vace_in_channels=72), _pair, vae=base.vae, scheduler=base.scheduler)


def hunyuan_i2v() -> Any:
    from diffusers import AutoencoderKLHunyuanVideo

    def encode(prompt: str | None, _: str | None) -> Any:
        found, mask = _padded(prompt, 16, 12)
        return found, found[:, 0, :8], mask

    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=1,
        mid_block_add_attention=False,
    ).eval()  # fmt: skip
    transformer = zoo_joint.hunyuan_i2v("latent_concat")
    return _own("HunyuanVideoImageToVideoPipeline", transformer, encode, vae=vae)


def _ltx_vae() -> Any:
    from diffusers import AutoencoderKLLTXVideo

    torch.manual_seed(0)
    return AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5,
    ).eval()  # fmt: skip


def _ltx_text(prompt: str | None, negative: str | None) -> tuple[torch.Tensor, ...]:
    return *_padded(prompt, 16, 12), *_padded(negative, 16, 12)


def ltx_i2v() -> Any:
    return _own("LTXImageToVideoPipeline", zoo_video.ltx(), _ltx_text, vae=_ltx_vae())


def ltx_condition() -> Any:
    return _own("LTXConditionPipeline", zoo_video.ltx(), _ltx_text, vae=_ltx_vae())


# -- images ------------------------------------------------------------------------------------------------------------


def _image_vae(levels: int = 4) -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(4,) * levels, down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels, latent_channels=1, norm_num_groups=1, use_quant_conv=False,
        use_post_quant_conv=False, shift_factor=0.0, scaling_factor=1.0,
    ).eval()  # fmt: skip


def _flux_text(prompt: str | None, _: str | None) -> tuple[torch.Tensor, ...]:
    found = _embed(prompt, 16)
    return found, found[:, 0, :8], torch.zeros(found.shape[1], 3)


def kontext() -> Any:
    """64 pixels a token, so that the megapixel that it makes of every picture is 256 tokens."""
    return _own("FluxKontextPipeline", zoo_image.kontext(), _flux_text, vae=_image_vae(6))


def flux_img2img() -> Any:
    return _own("FluxImg2ImgPipeline", flux(), _flux_text, vae=_image_vae())


def flux_controlnet() -> Any:
    from diffusers import FluxControlNetModel

    transformer: Any = flux()
    controlnet = FluxControlNetModel.from_transformer(
        transformer, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=3
    ).eval()
    for parameter in (*controlnet.controlnet_blocks.parameters(), *controlnet.controlnet_x_embedder.parameters()):
        torch.nn.init.normal_(parameter, std=0.5)  # zeros of a new one would hide the control
    return _own("FluxControlNetPipeline", transformer, _flux_text, vae=_image_vae(), controlnet=controlnet)


def qwen_edit() -> Any:
    from diffusers import AutoencoderKLQwenImage

    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(
        base_dim=4, z_dim=1, dim_mult=[1] * 6, num_res_blocks=1, temperal_downsample=[False] * 5, latents_mean=[0.0],
        latents_std=[1.0],
    ).eval()  # fmt: skip
    return _own("QwenImageEditPipeline", zoo_image.qwenimage(), lambda p, _: (_embed(p, 16), None), vae=vae)


# -- modular -----------------------------------------------------------------------------------------------------------


def modular_wan() -> Any:
    """The blocks of Wan, with a stand-in for the one that encodes the prompt."""
    from diffusers.modular_pipelines import SequentialPipelineBlocks, WanBlocks
    from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks
    from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam

    class Encode(ModularPipelineBlocks):
        model_name = "wan"
        inputs = [InputParam("prompt"), InputParam("negative_prompt")]
        intermediate_outputs = [OutputParam("prompt_embeds"), OutputParam("negative_prompt_embeds")]

        def __call__(self, components: Any, state: Any) -> Any:
            block = self.get_block_state(state)
            block.prompt_embeds, block.negative_prompt_embeds = _pair(block.prompt, block.negative_prompt)
            self.set_block_state(state, block)
            return components, state

    blocks = dict(WanBlocks().sub_blocks) | {"text_encoder": Encode()}
    base = wan_pipeline()
    pipe = SequentialPipelineBlocks.from_blocks_dict(blocks).init_pipeline()
    pipe.update_components(transformer=base.transformer, vae=base.vae, scheduler=base.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


PIPELINES: dict[str, Conditioned] = {
    "wan_i2v": Conditioned(wan_i2v, VIDEO, {"image": "picture{n}.png"}),
    "wan_i2v_experts": Conditioned(wan_i2v_experts, VIDEO, {"image": "picture{n}.png", "negative_prompt": "blurred"}),
    "wan_v2v": Conditioned(
        wan_v2v, {"height": 112, "width": 144}, {"video": "clip{n}.gif", "strength": 0.6}, ran={4: 2}
    ),
    "wan_vace": Conditioned(
        wan_vace, VIDEO, {"video": "clip{n}.gif", "mask": ["mask{n}.png"] * 9, "reference_images": ["picture{n}.png"]}
    ),
    "modular_wan": Conditioned(modular_wan, {**VIDEO, "guidance_scale": None}, {"negative_prompt": "blurred"}),
    "hunyuan_i2v": Conditioned(hunyuan_i2v, VIDEO, {"image": "picture{n}.png"}),
    "ltx_i2v": Conditioned(
        ltx_i2v, {"height": 224, "width": 288, "num_frames": 17}, {"image": "picture{n}.png"}
    ),
    "ltx_condition": Conditioned(
        ltx_condition, {"height": 224, "width": 288, "num_frames": 17},
        {"conditions": [{"image": "picture{n}.png", "frame_index": 0}, {"video": "clip{n}.gif", "frame_index": 8}]},
        density=0.8,
    ),
    # A reference in the size of the image: one in another size counts as text.
    "kontext": Conditioned(kontext, {}, {"image": "square{n}.png"}),
    "qwen_edit": Conditioned(qwen_edit, {"true_cfg_scale": 4.0}, {"image": "picture{n}.png"}),
    "flux_controlnet": Conditioned(flux_controlnet, IMAGE, {"control_image": "picture{n}.png"}),
    "flux_img2img": Conditioned(flux_img2img, IMAGE, {"image": "picture{n}.png", "strength": 0.5}, ran={4: 2}),
}  # fmt: skip
