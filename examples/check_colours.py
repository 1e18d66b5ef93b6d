"""Do generated clips show the sprite colours that their captions name?

A pixel counts for the nearest sprite colour if it lies within ``MAX_DISTANCE`` of it; a colour is *found* in a clip if
at least ``MIN_SHARE`` of all its pixels count for it; a clip passes if the colours found are exactly those of its
caption, none missing and none besides.

As a script it measures a trained model on held-out captions:

    python examples/check_colours.py examples/tiny_wan --out out/tiny_wan_check

and writes ``metrics.json``, a contact sheet ``samples.png`` and an animation ``samples.gif``.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tiny_wan_data import SPRITE_COLOURS, captioned_colours, render, sample_scenes

# Half the distance between the two closest sprite colours, so that no pixel could count for two.
MAX_DISTANCE = 0.23
# A share of all pixels of all frames. The smallest sprite covers about 1.5%, blurred borders of others less than 0.2%.
MIN_SHARE = 0.005


def colour_shares(clip: torch.Tensor) -> dict[str, float]:
    """For each sprite colour, its share of the pixels of a clip ``[3, frames, height, width]``, RGB in [0, 1]."""
    pixels = clip.float().flatten(1).T  # [pixels, 3]
    palette = torch.tensor(list(SPRITE_COLOURS.values()), device=pixels.device)
    distance, nearest = torch.cdist(pixels, palette, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    counts = torch.bincount(nearest[distance <= MAX_DISTANCE], minlength=len(palette))
    return dict(zip(SPRITE_COLOURS, (counts / len(pixels)).tolist(), strict=True))


def colours_found(clip: torch.Tensor) -> frozenset[str]:
    """The sprite colours that cover at least ``MIN_SHARE`` of a clip ``[3, frames, height, width]``."""
    return frozenset(name for name, share in colour_shares(clip).items() if share >= MIN_SHARE)


def clip_matches(clip: torch.Tensor, caption: str) -> bool:
    """Whether a clip ``[3, frames, height, width]`` shows exactly the sprite colours that its caption names."""
    return colours_found(clip) == captioned_colours(caption)


def score(clips: torch.Tensor, captions: Sequence[str]) -> float:
    """The share of ``clips`` ``[clips, 3, frames, height, width]`` that match their captions."""
    return sum(clip_matches(clip, caption) for clip, caption in zip(clips, captions, strict=True)) / len(captions)


def shuffled_score(clips: torch.Tensor, captions: Sequence[str]) -> float:
    """What chance would score: the mean score over all ways to shift the captions against the clips."""
    found = [colours_found(clip) for clip in clips]
    named = [captioned_colours(caption) for caption in captions]
    count = len(named)
    hits = sum(found[i] == named[(i + shift) % count] for shift in range(1, count) for i in range(count))
    return hits / (count * (count - 1))


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


def evaluate(
    pipe: Any, out: Path, *, captions: int = 64, steps: int = 20, guidance: float = 5.0, seed: int = 0
) -> dict:
    """Measure a ``WanPipeline`` on held-out captions; write ``metrics.json``, contact sheets and ``samples.gif``."""
    out.mkdir(parents=True, exist_ok=True)
    device = pipe.vae.device
    scenes = sample_scenes(captions, f"check {seed}", heldout=True)
    texts = [scene.caption for scene in scenes]
    real = render(scenes, seed + 1, device=device)
    decoded = reconstruct(pipe.vae, real)
    quality = psnr(decoded, real)
    made = generate(pipe, texts, seed=seed, steps=steps, guidance=guidance)
    metrics = {
        "captions": captions,
        "steps": steps,
        "guidance": guidance,
        "vae_psnr_mean_db": round(quality.mean().item(), 2),
        "vae_psnr_worst_db": round(quality.min().item(), 2),
        "colours_generated": score(made, texts),
        "colours_real": score(real, texts),
        "colours_real_decoded": score(decoded, texts),
        "colours_shuffled_captions": round(shuffled_score(real, texts), 4),
        "captioned_found_generated": sum(
            captioned_colours(t) <= colours_found(c) for c, t in zip(made, texts, strict=True)
        )
        / captions,
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
        other = generate(pipe, texts[: len(few)], seed=seed, steps=steps, guidance=guidance, **size)
        metrics[f"colours_generated_{name}"] = score(other, texts[: len(few)])
        contact_sheet(other[:4]).save(out / f"samples_{name}.png")
    contact_sheet(made[:12]).save(out / "samples.png")
    save_animation(made[:8], out / "samples.gif")
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    return metrics


def main() -> None:
    """Measure the model in a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a WanPipeline folder")
    parser.add_argument("--out", type=Path, default=Path("out/tiny_wan_check"))
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from diffusers import WanPipeline

    cuda = torch.cuda.is_available()
    pipe = WanPipeline.from_pretrained(args.model, dtype=torch.bfloat16 if cuda else torch.float32)
    pipe.to("cuda" if cuda else "cpu")
    pipe.set_progress_bar_config(disable=True)
    options = {name: getattr(args, name) for name in ("captions", "steps", "guidance", "seed")}
    print(json.dumps(evaluate(pipe, args.out, **options), indent=1))


if __name__ == "__main__":
    main()
