"""How good are a trained model's clips? Its autoencoder, and whether sprites have the captioned colours and shapes.

    python examples/check_clips.py examples/tiny_wan --out out/tiny_wan_check

measures a model on held-out captions and writes ``metrics.json``, a contact sheet ``samples.png`` and an animation
``samples.gif``. With ``--generation-only`` it measures the generated clips alone, for all combinations of several step
counts, shifts and guidance scales, and prints one JSON:

    python examples/check_clips.py examples/tiny_wan --generation-only --steps 4 8 20 --shift 2 3
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from check_colours import clip_matches, colours_found, score, shuffled_score
from check_shapes import shape_score
from PIL import Image
from tiny_wan_data import captioned_colours, render, sample_scenes


def psnr(clips: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """PSNR of each clip in dB, ``[clips]``, for clips ``[clips, 3, frames, height, width]`` in [0, 1]."""
    error = (clips.float() - reference.float()).square().flatten(1).mean(1)
    return -10 * error.clamp_min(1e-10).log10()


@torch.no_grad()
def reconstruct(vae: Any, clips: torch.Tensor, batch: int = 16) -> torch.Tensor:
    """Encode to the mean latent and decode clips ``[clips, 3, frames, height, width]`` in [0, 1]."""
    out = []
    for part in clips.split(batch):
        latents = vae.encode((part * 2 - 1).to(vae.device, vae.dtype)).latent_dist.mode()
        out.append((vae.decode(latents, return_dict=False)[0].float() / 2 + 0.5).to(clips.device))
    return torch.cat(out)


@torch.no_grad()
def generate(
    pipe: Any,
    captions: Sequence[str],
    *,
    seed: int = 0,
    steps: int = 20,
    guidance: float = 5.0,
    frames: int = 17,
    height: int = 128,
    width: int = 128,
    batch: int = 32,
) -> torch.Tensor:
    """Clips ``[captions, 3, frames, height, width]`` in [0, 1] on the CPU; caption ``i`` gets noise of ``seed + i``."""
    clips = []
    for start in range(0, len(captions), batch):
        part = list(captions[start : start + batch])
        clips.append(
            pipe(
                part,
                height=height,
                width=width,
                num_frames=frames,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[torch.Generator().manual_seed(seed + start + i) for i in range(len(part))],
                output_type="pt",
            ).frames.cpu()
        )
    return torch.cat(clips).float().transpose(1, 2)  # the pipeline returns [clips, frames, 3, height, width]


def to_uint8(clips: torch.Tensor) -> torch.Tensor:
    """Clips or frames in [0, 1] as bytes."""
    return (clips.clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def contact_sheet(clips: torch.Tensor, columns: int = 2, shown: int = 5, gap: int = 4) -> Image.Image:
    """``shown`` frames of each clip ``[clips, 3, frames, height, width]`` in a row, ``columns`` clips abreast."""
    count, _, frames, height, width = clips.shape
    picked = [round(i * (frames - 1) / (shown - 1)) for i in range(shown)]
    strips = to_uint8(clips[:, :, picked]).permute(0, 3, 2, 4, 1).reshape(count, height, shown * width, 3)
    rows = math.ceil(count / columns)
    sheet = torch.full((rows * (height + gap), columns * (shown * width + gap), 3), 255, dtype=torch.uint8)
    for i, strip in enumerate(strips):
        top, left = (i // columns) * (height + gap), (i % columns) * (shown * width + gap)
        sheet[top : top + height, left : left + shown * width] = strip
    return Image.fromarray(sheet.numpy()).quantize(128)  # a third of the size on disk


def save_animation(clips: torch.Tensor, path: Path, columns: int = 4) -> None:
    """Write clips ``[clips, 3, frames, height, width]`` side by side as an animated gif."""
    count, _, frames, height, width = clips.shape
    rows = math.ceil(count / columns)
    tiled = to_uint8(clips[: rows * columns]).permute(2, 0, 3, 4, 1)  # [frames, clips, height, width, 3]
    tiled = tiled.reshape(frames, rows, columns, height, width, 3).transpose(2, 3)
    images = [Image.fromarray(f.reshape(rows * height, columns * width, 3).numpy()) for f in tiled]
    images = [image.quantize(64) for image in images]
    images[0].save(path, save_all=True, append_images=images[1:], duration=90, loop=0)


def with_shift(pipe: Any, shift: float | None) -> Any:
    """The pipeline with a scheduler whose noise levels lean towards 1 by ``shift``; None leaves it as it is."""
    if shift is not None:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=shift)
    return pipe


def sweep(
    pipe: Any,
    *,
    captions: int = 64,
    steps: Sequence[int] = (20,),
    shifts: Sequence[float | None] = (None,),
    guidances: Sequence[float] = (5.0,),
    seed: int = 0,
    batch: int = 32,
    out: Path | None = None,
) -> list[dict[str, Any]]:
    """Colours and shapes of a ``WanPipeline``'s clips of held-out captions, for each combination of the settings.

    ``out``: a folder for a contact sheet of each. The pipeline's scheduler is afterwards what it was before.
    """
    texts = [scene.caption for scene in sample_scenes(captions, f"check {seed}", heldout=True)]
    rows, scheduler = [], pipe.scheduler
    for count, shift, guidance in itertools.product(steps, shifts, guidances):
        made = generate(with_shift(pipe, shift), texts, seed=seed, steps=count, guidance=guidance, batch=batch)
        used, pipe.scheduler = pipe.scheduler.config.shift, scheduler
        rows.append({"steps": count, "shift": used, "guidance": guidance, "captions": captions} | figures(made, texts))
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            contact_sheet(made[:12]).save(out / f"samples_steps{count}_shift{used:g}_guidance{guidance:g}.png")
    return rows


def figures(clips: torch.Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Shares in [0, 1]: clips with just the captioned colours, clips with at least them, sprites of the right shape."""
    named = [captioned_colours(caption) <= colours_found(clip) for clip, caption in zip(clips, captions, strict=True)]
    return {
        "colours_generated": score(clips, captions),
        "captioned_found_generated": sum(named) / len(named),
        "shapes_generated": shape_score(clips, captions),
    }


def evaluate(
    pipe: Any,
    out: Path,
    *,
    captions: int = 64,
    steps: int = 20,
    guidance: float = 5.0,
    seed: int = 0,
    batch: int = 32,
) -> dict[str, Any]:
    """Measure a ``WanPipeline`` on held-out captions; write ``metrics.json``, contact sheets and ``samples.gif``."""
    out.mkdir(parents=True, exist_ok=True)
    device = pipe.vae.device
    scenes = sample_scenes(captions, f"check {seed}", heldout=True)
    texts = [scene.caption for scene in scenes]
    real = render(scenes, seed + 1, device=device)
    decoded = reconstruct(pipe.vae, real)
    quality = psnr(decoded, real)
    made = generate(pipe, texts, seed=seed, steps=steps, guidance=guidance, batch=batch)
    metrics: dict[str, Any] = {
        "captions": captions,
        "steps": steps,
        "shift": pipe.scheduler.config.shift,
        "guidance": guidance,
        "vae_psnr_mean_db": round(quality.mean().item(), 2),
        "vae_psnr_worst_db": round(quality.min().item(), 2),
        **figures(made, texts),
        "colours_real": score(real, texts),
        "colours_real_decoded": score(decoded, texts),
        "colours_shuffled_captions": round(shuffled_score(real, texts), 4),
        "shapes_real": round(shape_score(real, texts), 4),
        "shapes_real_decoded": round(shape_score(decoded, texts), 4),
        "failed": [
            {"caption": t, "found": sorted(colours_found(c))}
            for c, t in zip(made, texts, strict=True)
            if not clip_matches(c, t)
        ],
        "sheet": texts[:12],
    }
    # Other sizes and lengths, fewer clips: [frames, height, width].
    for frames, height, width in ((9, 96, 160), (25, 160, 128)):
        few = scenes[: max(2, captions // 4)]
        size = {"frames": frames, "height": height, "width": width}
        real = render(few, seed + 2, device=device, **size)
        name = f"{frames}x{height}x{width}"
        metrics[f"vae_psnr_mean_db_{name}"] = round(psnr(reconstruct(pipe.vae, real), real).mean().item(), 2)
        other = generate(pipe, texts[: len(few)], seed=seed, steps=steps, guidance=guidance, batch=batch, **size)
        metrics[f"colours_generated_{name}"] = score(other, texts[: len(few)])
        metrics[f"shapes_generated_{name}"] = round(shape_score(other, texts[: len(few)]), 4)
        contact_sheet(other[:4]).save(out / f"samples_{name}.png")
    contact_sheet(made[:12]).save(out / "samples.png")
    save_animation(made[:8], out / "samples.gif")
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    return metrics


def main() -> None:
    """Measure the model in a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a WanPipeline folder")
    parser.add_argument("--out", type=Path, help="out/tiny_wan_check; with --generation-only nothing unless named")
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--steps", type=int, nargs="+", default=[20])
    parser.add_argument("--shift", type=float, nargs="+", help="of the noise levels; the scheduler's own by default")
    parser.add_argument("--guidance", type=float, nargs="+", default=[5.0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32, help="captions at a time")
    parser.add_argument("--generation-only", action="store_true", help="only the clips' colours and shapes")
    args = parser.parse_args()
    shifts = args.shift or [None]
    for name, least in (("captions", 2), ("steps", 1), ("shift", 1e-3), ("guidance", 0.0), ("batch", 1)):
        given = getattr(args, name)
        if any(value < least for value in (given if isinstance(given, list) else [given]) if value is not None):
            parser.error(f"--{name}: at least {least:g}")
    if not args.generation_only and max(len(args.steps), len(shifts), len(args.guidance)) > 1:
        parser.error("several --steps, --shift or --guidance need --generation-only")
    if not (args.model / "model_index.json").is_file():
        parser.error(f"{args.model} is no pipeline's folder: it has no model_index.json")
    from diffusers import WanPipeline

    cuda = torch.cuda.is_available()
    pipe = WanPipeline.from_pretrained(args.model, dtype=torch.bfloat16 if cuda else torch.float32)
    pipe.to("cuda" if cuda else "cpu")
    pipe.set_progress_bar_config(disable=True)
    options = {name: getattr(args, name) for name in ("captions", "seed", "batch")}
    found: Any
    if args.generation_only:
        found = sweep(pipe, steps=args.steps, shifts=shifts, guidances=args.guidance, out=args.out, **options)
    else:
        with_shift(pipe, shifts[0])
        out = args.out or Path("out/tiny_wan_check")
        found = evaluate(pipe, out, steps=args.steps[0], guidance=args.guidance[0], **options)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
