"""The settings of the small text-to-video model in ``examples/tiny_wan``, and what it is made of."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import nn
from training import LoopSettings
from transformers import UMT5Config, UMT5EncoderModel

Size = tuple[int, int, int]  # frames, height, width in pixels


@dataclass(frozen=True)
class Settings(LoopSettings):
    """What is trained, and how. Batches are per process."""

    size: Size = (17, 128, 128)
    other_sizes: tuple[Size, ...] = ((9, 96, 160), (25, 160, 128))
    other_share: float = 0.15  # of the transformer's steps
    # Autoencoder: 4x4x4 pixels to one latent token.
    vae_dim: int = 24  # of the decoder, whose work is the harder
    vae_encoder_dim: int = 16
    z_dim: int = 16
    vae_blocks: int = 1
    vae_steps: int = 100_000
    vae_minutes: float = 5.0
    vae_batch: int = 8
    vae_lr: float = 1.2e-3
    vae_good_db: float = 34.0  # stop early above this, measured on held-out clips
    channels_last: bool = True
    vae_compile: bool = True  # the norms only: 1.5 times the speed; the whole takes minutes to compile
    # Transformer and text encoder.
    layers: int = 8
    heads: int = 4
    head_dim: int = 64
    ffn_dim: int = 1024
    text_dim: int = 128
    pool_clips: int = 16384
    pool_minutes: float = 1.0
    steps: int = 100_000
    minutes: float = 10.0
    batch: int = 32
    lr: float = 1e-3
    level_shift: float = 2.0  # how far the noise levels of training lean towards 1
    shift: float = 2.0  # the same for the scheduler's
    no_caption: float = 0.1  # how often the caption is dropped, for guidance
    compile: bool = True

    @classmethod
    def smoke(cls) -> Settings:
        """So small that both stages pass in seconds on a CPU."""
        return cls(
            size=(5, 32, 32),
            other_sizes=((9, 32, 48),),
            vae_dim=8,
            vae_encoder_dim=8,
            z_dim=4,
            vae_steps=3,
            vae_batch=2,
            layers=2,
            heads=2,
            head_dim=12,
            ffn_dim=32,
            text_dim=16,
            pool_clips=4,
            steps=4,
            batch=2,
            compile=False,
            vae_compile=False,
            warmup=2,
            log_every=1,
            check_minutes=0.0,
        )


def build_vae(settings: Settings) -> AutoencoderKLWan:
    """4x smaller along each axis of space and time."""
    return AutoencoderKLWan(
        base_dim=settings.vae_encoder_dim,
        decoder_base_dim=settings.vae_dim,
        z_dim=settings.z_dim,
        dim_mult=[1, 2, 4],
        num_res_blocks=settings.vae_blocks,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * settings.z_dim,
        latents_std=[1.0] * settings.z_dim,
        scale_factor_spatial=4,
        scale_factor_temporal=4,
    )


def build_text_encoder(settings: Settings, vocabulary: int) -> UMT5EncoderModel:
    """Two layers: enough to tell which colour goes with which shape."""
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=settings.text_dim,
        d_kv=settings.text_dim // 4,
        d_ff=2 * settings.text_dim,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return UMT5EncoderModel(config)


def build_transformer(settings: Settings) -> WanTransformer3DModel:
    """A Wan transformer that takes every latent as a token, initialised so that captions count from the first step."""
    model = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=settings.heads,
        attention_head_dim=settings.head_dim,
        in_channels=settings.z_dim,
        out_channels=settings.z_dim,
        text_dim=settings.text_dim,
        freq_dim=256,
        ffn_dim=settings.ffn_dim,
        num_layers=settings.layers,
        cross_attn_norm=True,
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.zeros_(model.proj_out.weight)
    # Captions are padded to 512 tokens with zeros. With zero biases the padding adds nothing, and with sharper keys the
    # few real tokens outweigh it; without both, the caption would be a thirtieth of what cross-attention returns.
    for block in model.blocks:
        nn.init.constant_(block.attn2.norm_k.weight, 3.0)
    return model
