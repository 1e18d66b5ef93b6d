"""Text to video with Wan and sparse attention.

    python examples/wan.py --tiny                                 # random weights: a few seconds on a CPU
    python examples/wan.py --model examples/tiny_wan --height 128 --width 128 --num-frames 17 --steps 20
    python examples/wan.py --plan plan                            # Wan 2.1 1.3B, on a GPU

Without ``--plan`` it takes the plan in the model's folder, or else the preset ``online``, which serves any model.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

from diffsparse import PlanError
from diffsparse.search.errors import BadInput
from diffsparse.search.load import check_model_name, choose_device, choose_dtype
from diffsparse.search.report import can_write_videos


def random_pipeline() -> tuple[WanPipeline, dict[str, Any]]:
    """A small pipeline with random weights and no text encoder, and what it takes instead of a prompt."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        scale_factor_spatial=4,
        scale_factor_temporal=4,
    )
    transformer = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=64,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=scheduler)
    words = torch.randn(2, 1, 8, 16)
    inputs = {"prompt_embeds": words[0], "negative_prompt_embeds": words[1]}
    return pipe, {**inputs, "height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 4}


def run(
    model: Annotated[str, typer.Option(help="A Wan pipeline's folder or Hub id.")] = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    plan: Annotated[str, typer.Option(help="A plan's folder or Hub id, or auto, window, radial, ...")] = "auto",
    tiny: Annotated[bool, typer.Option("--tiny", help="Random weights instead of a model.")] = False,
    prompt: Annotated[str, typer.Option(help="What to show.")] = "a red circle over yellow stripes, panning left",
    height: Annotated[int, typer.Option(help="In pixels.")] = 480,
    width: Annotated[int, typer.Option(help="In pixels.")] = 832,
    num_frames: Annotated[int, typer.Option(help="Frames of the clip.")] = 81,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Annotated[Path, typer.Option(help="Where the video goes.")] = Path("out/wan.mp4"),
) -> None:
    """Generate one clip with Wan, attention sparse by a plan."""
    if not can_write_videos():
        raise BadInput("videos need imageio and imageio-ffmpeg: pip install 'diffsparse[viz]'")
    from diffusers.utils import export_to_video

    place = choose_device(device)
    if tiny:
        pipe, inputs = random_pipeline()
    else:
        check_model_name(model)
        pipe = WanPipeline.from_pretrained(model, dtype=choose_dtype("auto", place))
        inputs = {"prompt": prompt, "height": height, "width": width, "num_frames": num_frames}
        inputs["num_inference_steps"] = steps
    pipe.to(place)
    pipe.enable_sparse_attention(plan)
    start = time.perf_counter()
    video = pipe(**inputs, generator=torch.Generator().manual_seed(seed)).frames[0]
    print(f"{time.perf_counter() - start:.1f} s")
    print(pipe.sparse_attention_summary())
    out.parent.mkdir(parents=True, exist_ok=True)
    export_to_video(video, str(out), fps=16)
    print(f"written: {out}")


def main() -> None:
    try:
        typer.run(run)
    except (BadInput, PlanError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
