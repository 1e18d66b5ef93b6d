"""Do generated pictures show the sprite colours that their captions name? The same check as ``check_colours.py``.

As a script it measures a trained ``FluxPipeline`` on held-out captions:

    python examples/check_pictures.py examples/tiny_flux --out out/tiny_flux_check

and writes ``metrics.json`` and a contact sheet ``samples.png``.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from check_clips import psnr, reconstruct, to_uint8
from check_colours import clip_matches, colours_found, score, shuffled_score
from PIL import Image
from tiny_wan_data import Scene, render, sample_scenes


def picture_caption(scene: Scene) -> str:
    """A scene's caption without its motion: ``a red circle and a blue square over yellow stripes``."""
    return scene.caption.rsplit(", panning", 1)[0]


@torch.no_grad()
def generate(
    pipe: Any,
    captions: Sequence[str],
    *,
    seed: int = 0,
    steps: int = 20,
    true_cfg_scale: float = 3.0,
    height: int = 256,
    width: int = 256,
    batch: int = 32,
) -> torch.Tensor:
    """Pictures as clips ``[captions, 3, 1, height, width]`` in [0, 1] on the CPU; caption ``i`` has seed ``seed + i``.

    ``true_cfg_scale``: classifier-free guidance towards the caption and away from no caption; 1 is none.
    """
    pictures = []
    for start in range(0, len(captions), batch):
        part = list(captions[start : start + batch])
        guided = {"negative_prompt": [""] * len(part), "true_cfg_scale": true_cfg_scale} if true_cfg_scale > 1 else {}
        pictures.append(
            pipe(
                part,
                height=height,
                width=width,
                num_inference_steps=steps,
                generator=[torch.Generator().manual_seed(seed + start + i) for i in range(len(part))],
                output_type="pt",
                **guided,
            ).images.cpu()
        )
    return torch.cat(pictures).float().clamp(0, 1)[:, :, None]


def contact_sheet(clips: torch.Tensor, columns: int = 6, gap: int = 4) -> Image.Image:
    """Clips of one frame ``[clips, 3, 1, height, width]`` in rows."""
    count, _, _, height, width = clips.shape
    rows = math.ceil(count / columns)
    sheet = torch.full((rows * (height + gap), columns * (width + gap), 3), 255, dtype=torch.uint8)
    for i, picture in enumerate(to_uint8(clips[:, :, 0]).permute(0, 2, 3, 1)):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    return Image.fromarray(sheet.numpy()).quantize(128)  # a third of the size on disk


def evaluate(
    pipe: Any, out: Path, *, captions: int = 64, steps: int = 20, true_cfg_scale: float = 3.0, seed: int = 0
) -> dict[str, Any]:
    """Measure a ``FluxPipeline`` on held-out captions; write ``metrics.json`` and ``samples.png``."""
    out.mkdir(parents=True, exist_ok=True)
    scenes = sample_scenes(captions, f"check {seed}", heldout=True, still=True)
    texts = [picture_caption(scene) for scene in scenes]
    real = render(scenes, seed + 1, frames=1, height=256, width=256, device=pipe.vae.device)
    decoded = reconstruct(pipe.vae, real[:, :, 0])[:, :, None]
    quality = psnr(decoded, real)
    made = generate(pipe, texts, seed=seed, steps=steps, true_cfg_scale=true_cfg_scale)
    unguided = generate(pipe, texts, seed=seed, steps=steps, true_cfg_scale=1.0)
    metrics = {
        "captions": captions,
        "steps": steps,
        "true_cfg_scale": true_cfg_scale,
        "vae_psnr_mean_db": round(quality.mean().item(), 2),
        "vae_psnr_worst_db": round(quality.min().item(), 2),
        "colours_generated": score(made, texts),
        "colours_generated_without_guidance": score(unguided, texts),
        "colours_real": score(real, texts),
        "colours_real_decoded": score(decoded, texts),
        "colours_shuffled_captions": round(shuffled_score(real, texts), 4),
        "failed": [
            {"caption": t, "found": sorted(colours_found(c))}
            for c, t in zip(made, texts, strict=True)
            if not clip_matches(c, t)
        ],
        "sheet": texts[:12],
    }
    contact_sheet(made[:12]).save(out / "samples.png")
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    return metrics


def main() -> None:
    """Measure the model in a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a FluxPipeline folder")
    parser.add_argument("--out", type=Path, default=Path("out/tiny_flux_check"))
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--true-cfg-scale", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from diffusers import FluxPipeline

    cuda = torch.cuda.is_available()
    pipe = FluxPipeline.from_pretrained(args.model, dtype=torch.bfloat16 if cuda else torch.float32)
    pipe.to("cuda" if cuda else "cpu")
    pipe.set_progress_bar_config(disable=True)
    options = {name: getattr(args, name) for name in ("captions", "steps", "true_cfg_scale", "seed")}
    print(json.dumps(evaluate(pipe, args.out, **options), indent=1))


if __name__ == "__main__":
    main()
