"""The settings of the small text-to-image model in ``examples/tiny_flux``, and what it is made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import nn
from training import LoopSettings
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

Size = tuple[int, int]  # height, width in pixels
CLIP_LENGTH, T5_LENGTH = 77, 512  # what FluxPipeline pads captions to; it masks none of the padding


@dataclass(frozen=True)
class Settings(LoopSettings):
    """What is trained, and how. Batches are per process."""

    size: Size = (256, 256)
    other_sizes: tuple[Size, ...] = ((192, 320), (320, 192))
    other_share: float = 0.15  # of the transformer's steps
    # Autoencoder: 2x2 pixels to one latent, 4x4 pixels to one token.
    vae_dim: int = 24
    z_dim: int = 4
    vae_steps: int = 100_000
    vae_minutes: float = 1.5
    vae_batch: int = 16
    vae_lr: float = 1.2e-3
    vae_good_db: float = 36.0  # stop early above this, measured on held-out pictures
    # Transformer and text encoders.
    layers: int = 2  # with separate weights for text and image
    single_layers: int = 4
    heads: int = 3
    head_dim: int = 64
    text_dim: int = 96
    pool_pictures: int = 16384
    pool_minutes: float = 0.5
    steps: int = 100_000
    minutes: float = 8.0
    batch: int = 32
    lr: float = 1e-3
    level_shift: float = 2.0  # how far the noise levels of training lean towards 1
    no_caption: float = 0.1  # how often the caption is dropped, for guidance
    compile: bool = True

    @classmethod
    def smoke(cls) -> Settings:
        """So small that both stages pass in seconds on a CPU."""
        return cls(
            size=(32, 32),
            other_sizes=((32, 48),),
            vae_dim=8,
            vae_steps=3,
            vae_batch=2,
            layers=1,
            single_layers=1,
            heads=2,
            head_dim=16,
            text_dim=16,
            pool_pictures=4,
            steps=4,
            batch=2,
            compile=False,
            warmup=2,
            log_every=1,
            check_minutes=0.0,
        )


def build_vae(settings: Settings) -> AutoencoderKL:
    """2x smaller along height and width. Without attention, which would see 16,384 latents."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(settings.vae_dim, 2 * settings.vae_dim),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=settings.z_dim,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
        sample_size=settings.size[0],
    )


def build_clip(settings: Settings, vocabulary: int) -> CLIPTextModel:
    """The pooled caption."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=settings.text_dim,
            intermediate_size=2 * settings.text_dim,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=CLIP_LENGTH,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
        )
    )


def build_t5(settings: Settings, vocabulary: int) -> T5EncoderModel:
    """The caption's words. Two layers: enough to tell which colour goes with which shape."""
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=settings.text_dim,
            d_kv=settings.text_dim // 4,
            d_ff=2 * settings.text_dim,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )


def build_transformer(settings: Settings) -> FluxTransformer2DModel:
    """A Flux transformer, initialised so that its first output is zero."""
    half = settings.head_dim // 2
    across = 2 * (half // 4) + 2 * (half // 16)  # even, as rotary embeddings need
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * settings.z_dim,
        num_layers=settings.layers,
        num_single_layers=settings.single_layers,
        attention_head_dim=settings.head_dim,
        num_attention_heads=settings.heads,
        joint_attention_dim=settings.text_dim,
        pooled_projection_dim=settings.text_dim,
        guidance_embeds=False,
        axes_dims_rope=(settings.head_dim - 2 * across, across, across),
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        # Modulation that starts as the identity of its norm, and blocks that start as none.
        if name.startswith("proj_out.") or (".norm" in name and ".linear." in name):
            nn.init.zeros_(parameter)
    return model


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Latents ``[B, z, H, W]`` as tokens ``[B, (H / 2) (W / 2), 4 z]``, as ``FluxPipeline`` packs them."""
    blocks = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # [B, z, H / 2, 2, W / 2, 2]
    return blocks.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def positions(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Position ids ``[height * width, 3]`` of an image of so many tokens."""
    ids = torch.zeros(height, width, 3, device=device)
    ids[..., 1] = torch.arange(height, device=device)[:, None]
    ids[..., 2] = torch.arange(width, device=device)
    return ids.view(-1, 3)


@torch.no_grad()
def scale_latents(vae: AutoencoderKL, factors: torch.Tensor) -> None:
    """Multiply each channel of the latents by its own positive factor ``[z]``; what the decoder returns stays."""
    out, first, z = vae.encoder.conv_out, vae.decoder.conv_in, len(factors)
    out.weight[:z] *= factors.view(-1, 1, 1, 1)
    out.bias[:z] *= factors
    out.bias[z:] += 2 * factors.log()  # the logarithms of the variances
    first.weight /= factors.view(1, -1, 1, 1)


class Denoiser(nn.Module):
    """Text encoders and transformer as one module, fed as ``FluxPipeline`` feeds them."""

    def __init__(self, clip: CLIPTextModel, t5: T5EncoderModel, transformer: FluxTransformer2DModel) -> None:
        super().__init__()
        self.clip = clip
        self.t5 = t5
        self.transformer = transformer

    def forward(self, noisy: torch.Tensor, level: torch.Tensor, ids: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """The velocity ``noise - data``, shaped like ``noisy`` ``[batch, tokens, 4 z]``.

        ``level`` ``[batch]`` is the noise level in [0, 1]; ``ids`` are ``[batch, 512]``, ``place`` ``[tokens, 3]``.
        """
        # Every caption is far shorter than either limit, so the first 77 ids hold the same words.
        pooled = self.clip(ids[:, :CLIP_LENGTH]).pooler_output
        text = self.t5(ids).last_hidden_state
        return self.transformer(
            hidden_states=noisy,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=level,
            img_ids=place,
            txt_ids=torch.zeros(ids.shape[1], 3, device=noisy.device),
            return_dict=False,
        )[0]
