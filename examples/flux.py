"""Text to image with Flux and sparse attention.

    python examples/flux.py --tiny                                # random weights: a few seconds on a CPU
    python examples/flux.py --plan plan --height 2048 --width 2048

Images have far fewer tokens than videos: try it at high resolution, and let `diffsparse eval` tell what it gains.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from diffsparse import PlanError
from diffsparse.search.errors import BadInput
from diffsparse.search.load import check_model_name, choose_device, choose_dtype


def random_pipeline() -> tuple[FluxPipeline, dict[str, Any]]:
    """A small pipeline with random weights and no text encoders, and what it takes instead of a prompt."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    pipe = FluxPipeline(
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    inputs = {"prompt_embeds": torch.randn(1, 8, 16), "pooled_prompt_embeds": torch.randn(1, 8)}
    return pipe, {**inputs, "height": 128, "width": 96, "num_inference_steps": 4}


def run(
    model: Annotated[str, typer.Option(help="A Flux pipeline's folder or Hub id.")] = "black-forest-labs/FLUX.1-dev",
    plan: Annotated[str, typer.Option(help="A plan's folder or Hub id, or auto, window, radial, ...")] = "auto",
    tiny: Annotated[bool, typer.Option("--tiny", help="Random weights instead of a model.")] = False,
    prompt: Annotated[str, typer.Option(help="What to show.")] = "a lighthouse in a storm, oil on canvas",
    height: Annotated[int, typer.Option(help="In pixels.")] = 1024,
    width: Annotated[int, typer.Option(help="In pixels.")] = 1024,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 28,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Annotated[Path, typer.Option(help="Where the image goes.")] = Path("out/flux.png"),
) -> None:
    """Generate one image with Flux, attention sparse by a plan."""
    place = choose_device(device)
    if tiny:
        pipe, inputs = random_pipeline()
    else:
        check_model_name(model)
        pipe = FluxPipeline.from_pretrained(model, dtype=choose_dtype("auto", place))
        inputs = {"prompt": prompt, "height": height, "width": width, "num_inference_steps": steps}
    pipe.to(place)
    pipe.enable_sparse_attention(plan)
    start = time.perf_counter()
    image = pipe(**inputs, generator=torch.Generator().manual_seed(seed)).images[0]
    print(f"{time.perf_counter() - start:.1f} s")
    print(pipe.sparse_attention_summary())
    out.parent.mkdir(parents=True, exist_ok=True)
    image.save(out)
    print(f"written: {out}")


def main() -> None:
    try:
        typer.run(run)
    except (BadInput, PlanError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
