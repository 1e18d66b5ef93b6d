"""Pipelines around transformers of random weights, without text encoders: what a search of a real model takes."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    WanPipeline,
)

from benchmarks.library.steps.models import Model, build

__all__ = ["pipeline_of", "with_layers"]


class _Wan(WanPipeline):
    def encode_prompt(self, prompt: Any, *_: Any, do_classifier_free_guidance: bool = True, **__: Any) -> Any:
        """Random embeddings of a prompt, and others of no prompt."""
        first = _draw(self, prompt, self.words, self.transformer.config.text_dim)
        return first, _draw(
            self, "", self.words, self.transformer.config.text_dim
        ) if do_classifier_free_guidance else None


class _HunyuanVideo(HunyuanVideoPipeline):
    def encode_prompt(self, prompt: Any, *_: Any, **__: Any) -> Any:
        """Random embeddings of a prompt, none of them padding."""
        config = self.transformer.config
        words = _draw(self, prompt, self.words, config.text_embed_dim)
        pooled = _draw(self, prompt, 1, config.pooled_projection_dim)[:, 0]
        return words, pooled, torch.ones(words.shape[:2], dtype=torch.bool, device=words.device)


def _draw(pipe: Any, prompt: str, words: int, width: int) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(repr(prompt).encode()).digest()[:4])
    found = torch.randn(1, words, width, generator=torch.Generator().manual_seed(seed))
    return found.to(pipe.transformer.device, pipe.transformer.dtype)


def with_layers(model: Model, layers: int) -> Model:
    """The same with so many layers; of HunyuanVideo a third of them have two streams, as in the whole model."""
    if model.family == "wan":
        return Model(model.family, model.latents, model.config | {"num_layers": layers}, model.text)
    double = max(1, layers // 3)
    return Model(
        model.family,
        model.latents,
        model.config | {"num_layers": double, "num_single_layers": layers - double},
        model.text,
    )


def pipeline_of(model: Model, device: torch.device, dtype: torch.dtype) -> tuple[Any, dict[str, int]]:
    """A pipeline, and the height, width and number of frames of its clips."""
    transformer: Any = build(model, device, dtype)
    frames, height, width = model.latents
    channels = transformer.config.in_channels
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    none = {"text_encoder": None, "tokenizer": None}
    if model.family == "wan":
        vae: Any = AutoencoderKLWan(
            base_dim=4, z_dim=channels, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * channels,
            latents_std=[1.0] * channels,
        )  # fmt: skip
        pipe: Any = _Wan(vae=vae, transformer=transformer, scheduler=scheduler, **none)
    else:
        vae = AutoencoderKLHunyuanVideo(
            latent_channels=channels, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
            mid_block_add_attention=False,
        )  # fmt: skip
        more = {"text_encoder_2": None, "tokenizer_2": None}
        pipe = _HunyuanVideo(vae=vae, transformer=transformer, scheduler=scheduler, **none, **more)
    pipe.words = model.text
    pipe.set_progress_bar_config(disable=True)
    size = {"num_frames": 4 * (frames - 1) + 1, "height": 8 * height, "width": 8 * width}
    return pipe, size
