"""Text to video with HunyuanVideo and sparse attention.

    python examples/hunyuan_video.py --tiny                       # random weights: a few seconds on a CPU
    python examples/hunyuan_video.py --plan plan --offload        # on a GPU that the whole model does not fit

Text and video share one sequence there; text is always attended exactly.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)

from diffsparse import PlanError
from diffsparse.search.errors import BadInput
from diffsparse.search.load import check_model_name, choose_device, choose_dtype
from diffsparse.search.report import can_write_videos


def random_pipeline() -> tuple[HunyuanVideoPipeline, dict[str, Any]]:
    """A small pipeline with random weights and no text encoders, and what it takes instead of a prompt."""
    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    )
    pipe = HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )
    inputs = {
        "prompt_embeds": torch.randn(1, 8, 16),
        "pooled_prompt_embeds": torch.randn(1, 8),
        # the last three words are padding
        "prompt_attention_mask": torch.tensor([[True] * 5 + [False] * 3]),
    }
    return pipe, {**inputs, "height": 96, "width": 128, "num_frames": 9, "num_inference_steps": 4}


def run(
    model: Annotated[
        str, typer.Option(help="A HunyuanVideo pipeline's folder or Hub id.")
    ] = "hunyuanvideo-community/HunyuanVideo",
    plan: Annotated[str, typer.Option(help="A plan's folder or Hub id, or auto, window, radial, ...")] = "auto",
    tiny: Annotated[bool, typer.Option("--tiny", help="Random weights instead of a model.")] = False,
    prompt: Annotated[str, typer.Option(help="What to show.")] = "a cat walks on the grass, realistic",
    height: Annotated[int, typer.Option(help="In pixels.")] = 720,
    width: Annotated[int, typer.Option(help="In pixels.")] = 1280,
    num_frames: Annotated[int, typer.Option(help="Frames of the clip.")] = 129,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    offload: Annotated[bool, typer.Option("--offload", help="Keep on the GPU only the part that runs.")] = False,
    out: Annotated[Path, typer.Option(help="Where the video goes.")] = Path("out/hunyuan_video.mp4"),
) -> None:
    """Generate one clip with HunyuanVideo, attention sparse by a plan."""
    if not can_write_videos():
        raise BadInput("videos need imageio and imageio-ffmpeg: pip install 'diffsparse[viz]'")
    from diffusers.utils import export_to_video

    place = choose_device(device)
    if offload and place.type != "cuda":
        raise BadInput(f"--offload moves parts between a GPU and the CPU; the device is {place}")
    if tiny:
        pipe, inputs = random_pipeline()
    else:
        check_model_name(model)
        pipe = HunyuanVideoPipeline.from_pretrained(model, dtype=choose_dtype("auto", place))
        inputs = {"prompt": prompt, "height": height, "width": width, "num_frames": num_frames}
        inputs["num_inference_steps"] = steps
        pipe.vae.enable_tiling()
    if offload:
        pipe.enable_model_cpu_offload(device=place)
    else:
        pipe.to(place)
    pipe.enable_sparse_attention(plan)
    start = time.perf_counter()
    video = pipe(**inputs, generator=torch.Generator().manual_seed(seed)).frames[0]
    print(f"{time.perf_counter() - start:.1f} s")
    print(pipe.sparse_attention_summary())
    out.parent.mkdir(parents=True, exist_ok=True)
    export_to_video(video, str(out), fps=15)
    print(f"written: {out}")


def main() -> None:
    try:
        typer.run(run)
    except (BadInput, PlanError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
