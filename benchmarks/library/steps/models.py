"""The transformers whose steps are timed, with random weights, and the arguments of one forward."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from diffsparse.grid import TokenGrid

__all__ = ["MODELS", "TINY", "Model", "build", "inputs"]


@dataclass(frozen=True)
class Model:
    """A transformer that is timed.

    family: ``wan`` or ``hunyuan_video``. latents: ``(frames, height, width)`` before patches of 1 x 2 x 2.

    config: what differs from the class's own defaults. text: tokens of the prompt.
    """

    family: str
    latents: tuple[int, int, int]
    config: dict[str, Any] = field(default_factory=dict)
    text: int = 0

    @property
    def grid(self) -> TokenGrid:
        """Tokens of a self-attention call."""
        frames, height, width = self.latents
        return TokenGrid(frames, height // 2, width // 2, text_after=self.text if self.family != "wan" else 0)


_WAN_1_3B = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
#: Wan2.1-14B and HunyuanVideo are the defaults of their classes; 81 frames (Wan) and 129 (HunyuanVideo).
MODELS = {
    "wan-1.3b-480p": Model("wan", (21, 60, 104), _WAN_1_3B, 512),
    "wan-1.3b-720p": Model("wan", (21, 90, 160), _WAN_1_3B, 512),
    "wan-14b-720p": Model("wan", (21, 90, 160), {}, 512),
    "hunyuan-720p": Model("hunyuan_video", (33, 90, 160), {}, 256),
}
_TINY_WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "ffn_dim": 64,
    "num_layers": 2,
    "text_dim": 16,
    "freq_dim": 32,
}
_TINY_HUNYUAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (8, 12, 12),
}
TINY = {
    "wan-1.3b-480p": Model("wan", (5, 32, 48), _TINY_WAN, 7),
    "wan-1.3b-720p": Model("wan", (5, 48, 48), _TINY_WAN, 7),
    "wan-14b-720p": Model("wan", (5, 48, 48), _TINY_WAN, 7),
    "hunyuan-720p": Model("hunyuan_video", (5, 48, 48), _TINY_HUNYUAN, 20),
}


def build(model: Model, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """The transformer, made on its device and in its precision, so that the host never holds it."""
    from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel

    kind = WanTransformer3DModel if model.family == "wan" else HunyuanVideoTransformer3DModel
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            transformer = kind(**model.config)
    finally:
        torch.set_default_dtype(before)
    return transformer.eval().requires_grad_(False)


def inputs(model: Model, transformer: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of one forward in the middle of the noise levels."""
    draw = torch.Generator(device).manual_seed(1)
    normal = partial(torch.randn, generator=draw, device=device, dtype=dtype)
    config = transformer.config
    found: dict[str, Any] = {
        "hidden_states": normal(1, config.in_channels, *model.latents),
        "timestep": torch.tensor([500], device=device),
        "return_dict": False,
    }
    if model.family == "wan":
        return {**found, "encoder_hidden_states": normal(1, model.text, config.text_dim)}
    return {
        **found,
        "encoder_hidden_states": normal(1, model.text, config.text_embed_dim),
        "encoder_attention_mask": torch.ones(1, model.text, dtype=torch.bool, device=device),
        "pooled_projections": normal(1, config.pooled_projection_dim),
        "guidance": torch.tensor([6000.0], device=device, dtype=dtype),
    }
