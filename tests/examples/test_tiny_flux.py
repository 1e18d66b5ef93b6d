"""The small text-to-image model: its training script, its check, and the command line on an image pipeline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.house.process import ROOT

EXAMPLES = ROOT / "examples"
MODEL = EXAMPLES / "tiny_flux"
sys.path.insert(0, str(EXAMPLES))

import check_pictures  # noqa: E402
import tiny_wan_data as data  # noqa: E402
import train_tiny_flux  # noqa: E402


def run(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**{k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}, "CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_captions_of_pictures_do_not_move() -> None:
    scenes = data.sample_scenes(50, "stills")
    captions = [check_pictures.picture_caption(scene) for scene in scenes]
    assert not any("panning" in caption for caption in captions)
    assert [check_pictures.clip_matches(*pair) for pair in zip(render(scenes), captions)].count(False) <= 1


def render(scenes: list[data.Scene]) -> torch.Tensor:
    return data.render(scenes, 0, frames=1, height=128, width=128)


def test_held_out_captions_are_never_trained_on_whichever_way_the_clip_pans() -> None:
    trained = {check_pictures.picture_caption(scene) for scene in data.sample_scenes(5000, 0, still=True)}
    held_out = data.sample_scenes(500, 0, heldout=True, still=True)
    assert not trained & {check_pictures.picture_caption(scene) for scene in held_out}
    assert len({scene.pan for scene in held_out}) == len(data.PANS)
    assert {replace(scene, pan="left").still_heldout for scene in held_out} == {True}


def test_scaling_the_latents_leaves_the_pictures_alone() -> None:
    torch.manual_seed(0)
    vae = train_tiny_flux.build_vae(train_tiny_flux.Settings.smoke())
    pictures = torch.rand(2, 3, 32, 32)
    before = check_pictures.reconstruct(vae, pictures)
    with torch.no_grad():
        latents = vae.encode(pictures).latent_dist
        factors = torch.tensor([0.2, 1.0, 3.0, 20.0])
        train_tiny_flux.scale_latents(vae, factors)
        scaled = vae.encode(pictures).latent_dist
    torch.testing.assert_close(scaled.mode(), latents.mode() * factors.view(1, -1, 1, 1))
    torch.testing.assert_close(scaled.std, latents.std * factors.view(1, -1, 1, 1))
    torch.testing.assert_close(check_pictures.reconstruct(vae, pictures), before, atol=1e-5, rtol=1e-4)


def test_the_prompts_are_of_their_split() -> None:
    def lines(name: str) -> list[str]:
        return (MODEL / "prompts" / name).read_text().splitlines()

    def captions(*arguments: object, **options: bool) -> list[str]:
        return [
            check_pictures.picture_caption(scene) for scene in data.sample_scenes(*arguments, still=True, **options)
        ]

    calibration, held_out = lines("calibration.txt"), lines("heldout.txt")
    assert len(calibration) == 8 and len(held_out) == 24 and len({*calibration, *held_out}) == 32
    assert calibration == captions(8, "picture calibration")
    assert held_out == captions(24, "picture heldout prompts", heldout=True)


def test_tokens_are_packed_as_the_pipeline_does() -> None:
    from diffusers import FluxPipeline

    latents = torch.randn(2, 4, 8, 12)
    assert torch.equal(train_tiny_flux.pack(latents), FluxPipeline._pack_latents(latents, 2, 4, 8, 12))
    ids = FluxPipeline._prepare_latent_image_ids(2, 4, 6, "cpu", torch.float32)
    assert torch.equal(train_tiny_flux.positions(4, 6, torch.device("cpu")), ids)


def test_training_feeds_the_transformer_what_the_pipeline_feeds_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = train_tiny_flux.Settings.smoke()
    trainer = train_tiny_flux.FluxTrainer(settings, tmp_path, resume=False)
    pipe = trainer.pipeline(trainer.denoiser)
    pipe.set_progress_bar_config(disable=True)
    seen: list[dict[str, torch.Tensor]] = []

    def note(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        assert not args
        seen.append({name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor)})

    caption = "a red ring and a blue star over an olive gradient"
    with trainer.denoiser.transformer.register_forward_pre_hook(note, with_kwargs=True), torch.no_grad():
        pipe(caption, height=32, width=48, num_inference_steps=3, output_type="latent")
        assert len(seen) == 3
        for theirs in list(seen):
            place = train_tiny_flux.positions(8, 12, trainer.device)
            ids = trainer.tokens([caption])
            trainer.denoiser(theirs["hidden_states"], theirs["timestep"], ids, place)
            assert seen[-1].keys() == theirs.keys()
            for name, value in seen[-1].items():
                torch.testing.assert_close(value, theirs[name], msg=lambda text, name=name: f"{name}: {text}")
    assert 0.999 <= seen[0]["timestep"].item() <= 1.0  # noise levels, from noise alone


def test_the_full_model_fits_its_bounds() -> None:
    settings = train_tiny_flux.Settings()
    words = len(train_tiny_flux.build_tokenizer())
    parts = [
        train_tiny_flux.build_vae(settings),
        train_tiny_flux.build_clip(settings, words),
        train_tiny_flux.build_t5(settings, words),
        train_tiny_flux.build_transformer(settings),
    ]
    assert sum(2 * p.numel() for part in parts for p in part.parameters()) <= 11_800_000  # of 12 MB
    height, width = settings.size
    assert (height // 4) * (width // 4) >= 4096  # image tokens


@pytest.mark.slow
def test_training_search_and_eval_of_an_image_pipeline(tmp_path: Path) -> None:
    from diffusers import FluxPipeline

    run(EXAMPLES / "train_tiny_flux.py", "--smoke", "--out", tmp_path)
    model = tmp_path / "model"
    pipe = FluxPipeline.from_pretrained(model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.default_sample_size * pipe.vae_scale_factor == 256
    pictures = check_pictures.generate(pipe, ["a red ring over teal dots"], steps=2, height=32, width=48)
    assert pictures.shape == (1, 3, 1, 32, 48) and pictures.isfinite().all()
    # With fresh weights the output layer is zero, and sparse attention would change nothing.
    torch.manual_seed(0)
    torch.nn.init.normal_(pipe.transformer.proj_out.weight, std=0.1)
    for name, parameter in pipe.transformer.named_parameters():
        if ".norm" in name and name.endswith(".linear.weight"):
            torch.nn.init.normal_(parameter, std=0.1)
    pipe.save_pretrained(model)

    prompts, plan = tmp_path / "prompts.txt", tmp_path / "plan"
    prompts.write_text("a red circle over grey dots\na blue square over teal waves\n")
    command = ("-m", "diffsparse.search")
    shape = ("--height", 64, "--width", 96, "--steps", 4, "--true-cfg-scale", 2.0)
    found = json.loads(
        run(*command, "search", model, "--prompts", prompts, "--out", plan, "--density", 0.9, *shape, "--json")
    )
    assert found["architecture"]["model_class"] == "FluxTransformer2DModel"
    report = json.loads(run(*command, "eval", model, plan, "--prompts", prompts, "--seeds", 1, "--json"))
    assert report["passed"] and len(report["clips"]) == 2
    assert report["settings"]["true_cfg_scale"] == 2.0
    # Two calls a step, and in eval two generations with the plan and one that warms it up
    assert report["attention"]["transformers"]["transformer"]["forwards"] >= 2 * 2 * 4
    assert 0 < report["trajectory_density"] <= 0.95
    assert all(20 < clip["psnr"] < 115 for clip in report["clips"])  # pictures like dense's, and not the same ones
    shown = run(*command, "show", plan, "--grid", "1,16,24")
    assert "FluxTransformer2DModel" in shown and "single_transformer_blocks.0.attn" in shown
