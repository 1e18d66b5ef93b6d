"""The small text-to-image model: its training script, its check, and the command line on an image pipeline."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tests.helpers.process import ROOT, run_script

if TYPE_CHECKING:
    from diffusers import FluxPipeline

EXAMPLES = ROOT / "examples"
MODEL = EXAMPLES / "tiny_flux"
sys.path.insert(0, str(EXAMPLES))

import check_pictures  # noqa: E402
import tiny_wan_data as data  # noqa: E402
import train_tiny_flux  # noqa: E402

from tests import tolerance  # noqa: E402
from tests.tolerance import Work, assert_near  # noqa: E402


def run(*arguments: object) -> str:
    done = run_script(*arguments, CUDA_VISIBLE_DEVICES="")
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


#: The small autoencoder: two dozen convolutions of 3 x 3 pixels of at most 32 channels.
AUTOENCODER = Work(length=9 * 32, sums=24)


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
    for i, factor in enumerate(factors):  # one by one: the small ones are not to hide behind the large ones
        assert_near(scaled.mode()[:, i], latents.mode()[:, i] * factor, AUTOENCODER)
        assert_near(scaled.std[:, i], latents.std[:, i] * factor, AUTOENCODER)
    assert_near(check_pictures.reconstruct(vae, pictures), before, AUTOENCODER)


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
                assert_near(value, theirs[name], tolerance.MODEL)
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


@pytest.mark.slow(reason="trains a model, searches a plan and evaluates it")
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


def load() -> FluxPipeline:
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(MODEL, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_model_folder_is_small() -> None:
    files = {path: path.stat().st_size for path in MODEL.rglob("*") if path.is_file()}
    parts = json.loads((MODEL / "model_index.json").read_text())
    pipeline = {path: size for path, size in files.items() if path.relative_to(MODEL).parts[0] in parts}
    assert len(pipeline) >= 10
    assert sum(pipeline.values()) + files[MODEL / "model_index.json"] <= 12_000_000
    assert sum(files.values()) <= 13_000_000


def test_the_model_loads_without_a_warning() -> None:
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    ear = Ear(logging.WARNING)
    libraries = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [library.level for library in libraries]
    for library in libraries:
        library.addHandler(ear)
        library.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pipe = load()
        libraries[0].warning("this is heard")
    finally:
        for library, level in zip(libraries, levels):
            library.removeHandler(ear)
            library.setLevel(level)
    assert heard == ["this is heard"]
    assert not [str(w.message) for w in caught if not issubclass(w.category, DeprecationWarning)]
    config = pipe.transformer.config
    assert (config.num_layers, config.num_single_layers, config.num_attention_heads) == (2, 4, 3)
    # image tokens at the size that the pipeline takes by itself
    assert pipe.default_sample_size * pipe.vae_scale_factor == 256
    assert (256 // (2 * pipe.vae_scale_factor)) ** 2 == 4096


def test_the_model_reconstructs_held_out_pictures() -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(MODEL / "vae")
    scenes = data.sample_scenes(2, "reconstruction", heldout=True, still=True)
    pictures = data.render(scenes, 0, frames=1, height=256, width=256)
    decoded = check_pictures.reconstruct(vae, pictures[:, :, 0])
    assert check_pictures.psnr(decoded[:, :, None], pictures).mean() >= 33


def test_the_card_states_the_measured_figures() -> None:
    metrics = json.loads((MODEL / "metrics.json").read_text())
    card = (MODEL / "README.md").read_text()
    assert metrics["captions"] == 64 and metrics["vae_psnr_mean_db"] >= 34
    assert metrics["colours_generated"] >= 0.85
    assert metrics["colours_real"] >= 0.98 and metrics["colours_shuffled_captions"] <= 0.06
    assert f"{metrics['vae_psnr_mean_db']:.1f} dB ({metrics['vae_psnr_worst_db']:.1f})" in card
    for key in ("colours_generated", "colours_generated_without_guidance"):
        assert f"{round(64 * metrics[key])} of 64 ({metrics[key]:.1%})" in card
    plan = json.loads((MODEL / "sparse_plan" / "sparse_plan.json").read_text())
    assert f"density {plan['record']['search']['trajectory_density']:.3f}" in card


def test_the_model_ships_a_plan_that_auto_takes() -> None:
    import diffsparse

    pipe = load()
    plan = diffsparse.SparsityPlan.from_pretrained(MODEL / "sparse_plan")
    record = plan.record["search"]
    assert plan.record["calibration"]["grid"] == "512+1x64x64" and record["of_steps"] == 20
    # The noise levels of the pipeline, whose shift depends on the number of image tokens
    pipe.scheduler.set_timesteps(sigmas=[1 - i / 20 for i in range(20)], mu=pipe.scheduler.config.max_shift)
    levels = (pipe.scheduler.timesteps / pipe.scheduler.config.num_train_timesteps).tolist()
    density = plan.trajectory_density(diffsparse.TokenGrid(1, 64, 64, text_before=512), levels)
    assert density == pytest.approx(record["trajectory_density"], abs=0.01)
    assert 0.15 < round(density, 3) <= record["density"] <= 0.5
    caption = (MODEL / "prompts" / "heldout.txt").read_text().splitlines()[0]
    # Another size than the one that the plan was searched at: bitmaps are carried over.
    with diffsparse.sparse_attention(pipe):
        pictures = check_pictures.generate(pipe, [caption], steps=2, height=64, width=96)
        summary = pipe.sparse_attention_summary()
    assert pictures.shape == (1, 3, 1, 64, 96) and pictures.isfinite().all() and pictures.std() > 0.02
    assert "shipped with the model" in str(summary) and summary.transformers["transformer"].sparse_calls > 0


@pytest.mark.slow(reason="generates pictures of 256 x 256 pixels in twelve steps, dense and sparse")
def test_the_model_draws_what_captions_say_dense_and_sparse() -> None:
    import diffsparse

    pipe = load()
    captions = (MODEL / "prompts" / "heldout.txt").read_text().splitlines()[:2]

    def passed() -> int:
        pictures = check_pictures.generate(pipe, captions, steps=12)
        return sum(check_pictures.clip_matches(*pair) for pair in zip(pictures, captions))

    assert passed() == len(captions)
    with diffsparse.sparse_attention(pipe):
        assert passed() == len(captions)
        assert pipe.sparse_attention_summary().transformers["transformer"].sparse_calls > 0


@pytest.mark.slow(reason="a search on the small model, and two evaluations")
def test_search_eval_and_show_on_the_model(tmp_path: Path) -> None:
    command = ("-m", "diffsparse.search")
    prompts, plan = tmp_path / "prompts.txt", tmp_path / "plan"
    prompts.write_text("\n".join((MODEL / "prompts" / "heldout.txt").read_text().splitlines()[:1]))
    few = ("--height", 128, "--width", 128, "--steps", 4)
    calibration = MODEL / "prompts" / "calibration.txt"
    found = json.loads(
        run(*command, "search", MODEL, "--prompts", calibration, "--out", plan, "--density", 0.7, *few, "--json")
    )
    assert found["architecture"]["model_class"] == "FluxTransformer2DModel"
    for name, at in ((plan, ()), (MODEL / "sparse_plan", ("--steps", 3))):
        report = json.loads(run(*command, "eval", MODEL, name, "--prompts", prompts, "--seeds", 1, *at, "--json"))
        assert report["passed"] and report["trajectory_density"] < 0.75
        assert all(12 < clip["psnr"] < 115 for clip in report["clips"])
    shown = run(*command, "show", MODEL / "sparse_plan")
    assert "FluxTransformer2DModel, 6 layers, 3 heads of 64" in shown and "single_transformer_blocks.3.attn" in shown
