"""The small trained model: its data, the colour check, the training script, and the finished folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import check_colours  # noqa: E402
import tiny_wan_data as data  # noqa: E402

MODEL = EXAMPLES / "tiny_wan"


def small_clips(count: int, seed: int = 0) -> tuple[torch.Tensor, list[str]]:
    """Held-out clips small enough for a CPU, and their captions."""
    scenes = data.sample_scenes(count, f"test {seed}", heldout=True)
    return data.render(scenes, seed, frames=5, height=64, width=64), [scene.caption for scene in scenes]


def test_captions_read_as_documented() -> None:
    scene = data.Scene(
        (data.Sprite("red", "circle"), data.Sprite("blue", "square")),
        background="yellow",
        texture="stripes",
        pan="left",
    )
    assert scene.caption == "a red circle and a blue square over yellow stripes, panning left"
    assert scene.colours == data.captioned_colours(scene.caption) == {"red", "blue"}
    assert str(data.Sprite("orange", "star")) == "an orange star"


def test_held_out_captions_are_never_trained_on() -> None:
    def key(scene: data.Scene) -> tuple:
        return frozenset(scene.sprites), scene.background, scene.texture, scene.pan

    trained = {key(scene) for scene in data.sample_scenes(3000, 0)}
    held_out = {key(scene) for scene in data.sample_scenes(300, 0, heldout=True)}
    assert not trained & held_out
    one = data.sample_scenes(20, 1, heldout=True)
    reordered = [data.Scene(s.sprites[::-1], s.background, s.texture, s.pan) for s in one]
    assert all(scene.heldout for scene in reordered)


def test_a_seed_decides_everything() -> None:
    clips, captions = small_clips(3)
    again, captions_again = small_clips(3)
    other, other_captions = small_clips(3, seed=1)
    assert torch.equal(clips, again) and captions == captions_again
    assert captions != other_captions and not torch.equal(clips, other)


@pytest.mark.parametrize("size", [(1, 32, 32), (9, 48, 80), (5, 80, 48)])
def test_clips_of_any_size(size: tuple[int, int, int]) -> None:
    frames, height, width = size
    clips = data.render(data.sample_scenes(2, 0), 0, frames=frames, height=height, width=width)
    assert clips.shape == (2, 3, frames, height, width)
    assert clips.dtype == torch.float32 and clips.min() >= 0 and clips.max() <= 1


def test_things_move() -> None:
    clips, _ = small_clips(8)
    assert (clips.diff(dim=2).abs().flatten(1).mean(1) > 1e-3).all()


def test_the_check_reads_real_clips() -> None:
    clips, captions = small_clips(64)
    assert check_colours.score(clips, captions) >= 0.98


def test_the_check_is_near_chance_on_shuffled_captions() -> None:
    clips, captions = small_clips(64)
    assert check_colours.shuffled_score(clips, captions) <= 0.06
    assert check_colours.score(clips, captions[1:] + captions[:1]) <= 0.15


def test_the_check_wants_every_colour_and_no_other() -> None:
    scene = data.Scene((data.Sprite("red", "square"), data.Sprite("cyan", "ring")), "grey", "dots", "up")
    clip = data.render([scene], 0, frames=5, height=64, width=64)[0]
    assert check_colours.clip_matches(clip, scene.caption)
    assert not check_colours.clip_matches(clip, "a red square over grey dots, panning up")
    assert not check_colours.clip_matches(clip, "a red square, a cyan ring and a white star over grey dots, panning up")
    assert not check_colours.clip_matches(torch.full_like(clip, 0.5), scene.caption)


def test_psnr_of_a_known_error() -> None:
    clip = torch.full((1, 3, 2, 8, 8), 0.5)
    assert check_colours.psnr(clip + 0.1, clip).item() == pytest.approx(20.0, abs=1e-3)


def train(out: Path, *options: str) -> str:
    """Run the training script in a process of its own."""
    command = [sys.executable, str(EXAMPLES / "train_tiny_wan.py"), "--smoke", "--out", str(out), *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow(reason="trains a model twice")
def test_training_runs_saves_and_resumes(tmp_path: Path) -> None:
    from diffusers import WanPipeline

    whole = train(tmp_path / "whole")
    pipe = WanPipeline.from_pretrained(tmp_path / "whole" / "model")
    pipe.set_progress_bar_config(disable=True)
    clips = check_colours.generate(
        pipe, ["a red ring over teal dots, panning up"], steps=2, frames=5, height=32, width=32
    )
    assert clips.shape == (1, 3, 5, 32, 32) and clips.isfinite().all()
    for name in ("loss.png", "settings.json", "checkpoint.pt"):
        assert (tmp_path / "whole" / name).stat().st_size > 0
    # The last checkpoint lies within the second stage; going on from it must end where the whole run ended.
    first = {n: p.clone() for n, p in pipe.transformer.named_parameters()}
    assert "resumed denoiser" in train(tmp_path / "whole", "--resume")
    again = WanPipeline.from_pretrained(tmp_path / "whole" / "model")
    for name, parameter in again.transformer.named_parameters():
        torch.testing.assert_close(parameter, first[name], atol=2e-2, rtol=2e-2)
    assert '"stage": "vae"' in whole


needs_model = pytest.mark.skipif(not (MODEL / "model_index.json").exists(), reason="examples/tiny_wan is not there")


@needs_model
def test_the_model_folder_is_small() -> None:
    assert sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file()) <= 28_000_000


@needs_model
def test_the_model_loads_and_runs_at_other_sizes() -> None:
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(MODEL)
    config = pipe.transformer.config
    assert (config.num_layers, config.num_attention_heads, config.attention_head_dim) == (8, 4, 64)
    assert ((17 - 1) // 4 + 1) * (128 // 4) ** 2 >= 5000  # tokens at the native shape
    pipe.set_progress_bar_config(disable=True)
    caption = (MODEL / "prompts" / "heldout.txt").read_text().splitlines()[0]
    clips = check_colours.generate(pipe, [caption], steps=2, frames=5, height=48, width=64)
    assert clips.shape == (1, 3, 5, 48, 64) and clips.isfinite().all() and clips.std() > 0.02


@needs_model
def test_the_model_reconstructs_held_out_clips() -> None:
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(MODEL / "vae")
    clips = data.render(data.sample_scenes(2, "reconstruction", heldout=True), 0, frames=5)
    assert check_colours.psnr(check_colours.reconstruct(vae, clips), clips).mean() >= 29


@needs_model
def test_the_prompts_are_of_their_split() -> None:
    def lines(name: str) -> list[str]:
        return (MODEL / "prompts" / name).read_text().splitlines()

    calibration, held_out = lines("calibration.txt"), lines("heldout.txt")
    assert len(calibration) == 8 and len(held_out) == 24 and len({*calibration, *held_out}) == 32
    assert calibration == [scene.caption for scene in data.sample_scenes(8, "calibration")]
    assert held_out == [scene.caption for scene in data.sample_scenes(24, "heldout prompts", heldout=True)]


@needs_model
def test_the_card_states_the_measured_figures() -> None:
    metrics = json.loads((MODEL / "metrics.json").read_text())
    card = (MODEL / "README.md").read_text()
    assert metrics["vae_psnr_mean_db"] >= 30
    assert metrics["colours_generated"] >= 0.85
    assert metrics["colours_real"] >= 0.98
    assert metrics["colours_shuffled_captions"] <= 0.06
    assert f"{metrics['vae_psnr_mean_db']:.1f} dB" in card


@needs_model
def test_the_model_ships_a_plan_that_auto_takes() -> None:
    from diffusers import WanPipeline

    import diffsparse
    from diffsparse.grid import TokenGrid

    pipe = WanPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    plan = diffsparse.SparsityPlan.from_pretrained(MODEL / "sparse_plan")
    pipe.scheduler.set_timesteps(20)
    levels = (pipe.scheduler.timesteps / 1000).tolist()
    assert 0.2 < plan.trajectory_density(TokenGrid(5, 32, 32), levels) <= 0.25
    caption = (MODEL / "prompts" / "heldout.txt").read_text().splitlines()[0]
    # Another size than the one that the plan was searched at: bitmaps are carried over.
    with diffsparse.sparse_attention(pipe):
        clips = check_colours.generate(pipe, [caption], steps=2, frames=5, height=64, width=64)
        text = str(pipe.sparse_attention_summary())
    assert clips.isfinite().all() and "shipped with the model" in text
