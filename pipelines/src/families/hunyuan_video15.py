"""HunyuanVideo 1.5: one sequence of video, then image, glyph and prompt tokens; what is padding among them is masked.

The model's own processor makes a mask of all pairs of tokens, 12.9 GB at 720p, of which a key-padding mask says all
that matters: rows of padding are different then, but no valid row ever attends to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from diffsparse.grid import TokenGrid
from diffsparse.pipelines._diffusers import StandIn
from diffsparse.pipelines.families.common import text_length, timed_patch, video_of
from diffsparse.pipelines.family import Family
from diffsparse.pipelines.patch import routed_dispatch, takes_key_mask


class KeyMaskProcessor(StandIn):
    """Calls attention with a mask ``[B, 1, 1, S]``; hands over to the model's own processor where a layer is dense."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of visual tokens ``[B, V, C]`` and text ``[B, T, C]`` with its mask ``[B, T]``, for both."""
        if encoder_hidden_states is None or attention_mask is None or not takes_key_mask(hidden_states.device):
            own: tuple[torch.Tensor, torch.Tensor | None] = self.original(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
            return own
        visual, text = hidden_states.shape[1], encoder_hidden_states.shape[1]
        q, k, v = _qkv(hidden_states, attn.heads, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
        if image_rotary_emb is not None:
            q, k = _rotate(q, *image_rotary_emb), _rotate(k, *image_rotary_emb)
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text_qkv = _qkv(encoder_hidden_states, attn.heads, added, (attn.norm_added_q, attn.norm_added_k))
        q, k, v = (torch.cat(pair, dim=1) for pair in zip((q, k, v), text_qkv))
        mask = attention_mask.bool()
        mask = torch.cat([mask.new_ones(mask.shape[0], visual + text - mask.shape[1]), mask], dim=1)
        out = routed_dispatch(q, k, v, attn_mask=mask[:, None, None], **self.dispatch_options())
        out = out.flatten(2, 3).to(q.dtype)
        return attn.to_out[1](attn.to_out[0](out[:, :visual])), attn.to_add_out(out[:, visual:])


def _qkv(
    tokens: torch.Tensor, heads: int, projections: tuple[Any, Any, Any], norms: tuple[Any, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Projections of tokens ``[B, S, C]`` as ``[B, S, H, D]``, the first two through a norm where there is one."""
    q, k, v = (project(tokens).unflatten(2, (heads, -1)) for project in projections)
    norm_q, norm_k = norms
    return (q if norm_q is None else norm_q(q), k if norm_k is None else norm_k(k), v)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of ``[B, S, H, D]``: neighbouring channels are a pair, angles are ``[S, D]``."""
    cos, sin = (angles[None, :, None].to(x.device) for angles in (cos, sin))
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def _stand_in(processor: Any) -> KeyMaskProcessor | None:
    # Of others we do not know what they compute.
    return KeyMaskProcessor(processor) if type(processor).__name__ == "HunyuanVideo15AttnProcessor2_0" else None


def _grid(config: Any, arguments: Mapping[str, Any]) -> TokenGrid:
    names = ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")
    text = sum(text_length(arguments, name) for name in names)
    return TokenGrid(*video_of(arguments["hidden_states"], timed_patch(config)), text_after=text)


FAMILIES = (
    Family(
        name="hunyuan_video15",
        classes=("HunyuanVideo15Transformer3DModel",),
        # The token refiner of the text has attention of its own, which stays as it is.
        layers=("transformer_blocks.*.attn",),
        grid=_grid,
        patch_size=timed_patch,
        text_position="after",
        stand_in=_stand_in,
    ),
)
