"""A complete WanPipeline with random weights, small enough to generate a clip in a fraction of a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from diffsparse.entry import TAILS
from diffsparse.kernels.costs import CostTable
from diffsparse.search.search import SearchConfig

#: The smallest shape that the tests use: 3 x 12 x 12 = 432 tokens, ragged in tiles of 8.
SHAPE = {"height": 48, "width": 48, "num_frames": 9}
#: The same and two steps, as options of ``diffsparse search`` and ``eval``.
SHAPE_OPTIONS = ["--height", "48", "--width", "48", "--num-frames", "9", "--steps", "2"]
PROMPTS = ["a red circle", "a blue square"]
#: The fixture ``cli``: runs a command and gives its exit code, stdout and stderr.
Cli = Callable[..., tuple[int, str, str]]


def build_tokenizer() -> Any:
    """One token a word of :data:`PROMPTS`, ``</s>`` at the end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "circle", "square"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def build_pipeline(layers: int = 2, heads: int = 2, head_dim: int = 32, seed: int = 0) -> Any:
    """Random weights from ``seed``; fp32 on the CPU; 4x4x4 pixels a token."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0,
            pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
        )
    ).eval()  # fmt: skip
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4, scale_factor_spatial=4, scale_factor_temporal=4,
    ).eval()  # fmt: skip
    transformer = WanTransformer3DModel(
        patch_size=(1, 1, 1), num_attention_heads=heads, attention_head_dim=head_dim, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=32, ffn_dim=64, num_layers=layers, cross_attn_norm=True, rope_max_seq_len=64,
    ).eval()  # fmt: skip
    pipe = WanPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux_pipeline(name: str) -> Any:
    """A tiny pipeline of Flux with its text encoders; images of 128 x 128 by itself, where it does not resize."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    from tests.pipelines.models import flux

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=512, projection_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    t5 = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=1, norm_num_groups=1, use_quant_conv=False,
        use_post_quant_conv=False, shift_factor=0.0, scaling_factor=1.0,
    ).eval()  # fmt: skip
    pipe = getattr(diffusers, name)(
        diffusers.FlowMatchEulerDiscreteScheduler(), vae, CLIPTextModel(clip).eval(), tokenizer,
        T5EncoderModel(t5).eval(), tokenizer, flux(),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    pipe.default_sample_size = 16
    return pipe


def config(**changes: Any) -> SearchConfig:
    """A short search of the tiny pipeline."""
    return SearchConfig(
        **{"budget": None, "density": 0.5, "steps": 6, "trace_steps": 4, "samples": 2, "repair": False, **SHAPE}
        | changes
    )


#: What a search goes by in the place of measured costs: calls this small take so little time that those are noise.
COSTS = CostTable.of_call("cpu", 1.0, (0.02, 0.1, 0.3, 0.6), {tail: (0.1, 0.2, 0.4, 0.7) for tail in TAILS})


def fix_costs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("diffsparse.search.stages.compose.measure_costs", lambda *args: COSTS)
