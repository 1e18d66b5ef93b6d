"""The small trained model: its data, the checks of colours and shapes, the training script, and the finished folder."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import check_clips  # noqa: E402
import check_colours  # noqa: E402
import check_shapes  # noqa: E402
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


def test_a_caption_names_its_sprites_in_order() -> None:
    for scene in data.sample_scenes(50, "names"):
        assert tuple(data.captioned_sprites(scene.caption)) == scene.sprites


@pytest.mark.parametrize("size", [(5, 64, 64), (9, 72, 104), (1, 112, 80)])
def test_the_shape_check_reads_real_clips(size: tuple[int, int, int]) -> None:
    frames, height, width = size
    scenes = data.sample_scenes(48, f"shapes {size}", heldout=True)
    clips = data.render(scenes, height, frames=frames, height=height, width=width)
    captions = [scene.caption for scene in scenes]
    assert check_shapes.shape_score(clips, captions) >= 0.97
    # Of six shapes a wrong caption names the right one by chance, and it must name the colour as well.
    assert check_shapes.shape_score(clips, captions[1:] + captions[:1]) <= 0.2


@pytest.mark.parametrize("shape", data.SHAPES)
@pytest.mark.parametrize("over", data.SHAPES)
def test_the_shape_check_looks_past_a_sprite_that_covers_another(shape: str, over: str) -> None:
    height, width, radius = 70, 90, torch.tensor(13.0)
    clip = torch.full((3, 7, height, width), 0.5)
    y, x = torch.arange(height)[:, None] + 0.5, torch.arange(width)[None] + 0.5
    # The one on top passes across the other, which it hides in part in most frames.
    for frame in range(clip.shape[1]):
        for name, colour, at in ((shape, "red", 45.0), (over, "cyan", 15.0 + 10 * frame)):
            inside = data.signed_distance(name, x - at, y - 35.0, radius) < 0
            clip[:, frame, inside] = torch.tensor(data.SPRITE_COLOURS[colour])[:, None]
    assert check_shapes.read_shape(clip, "red") == shape
    assert check_shapes.read_shape(clip, "cyan") == over


def test_the_shape_check_reads_nothing_where_nothing_is() -> None:
    clip = torch.full((3, 3, 48, 64), 0.5)
    assert check_shapes.read_shape(clip, "red") is None
    dust = torch.rand(3, 48, 64, generator=torch.Generator().manual_seed(0)) < 0.1
    clip[:, dust] = torch.tensor(data.SPRITE_COLOURS["red"])[:, None]
    assert check_shapes.read_shape(clip, "red") is None  # one part of it is a few pixels of no shape
    assert check_shapes.shape_score(clip[None], ["a red star over grey dots, panning up"]) == 0.0


def test_psnr_of_a_known_error() -> None:
    clip = torch.full((1, 3, 2, 8, 8), 0.5)
    assert check_clips.psnr(clip + 0.1, clip).item() == pytest.approx(20.0, abs=1e-3)


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
    clips = check_clips.generate(
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
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--steps", "4", "8"], "need --generation-only"),
        (["--steps", "0"], "--steps: at least 1"),
        (["--generation-only", "--shift", "-1"], "--shift: at least 0.001"),
    ],
)
def test_the_check_script_refuses_in_one_line(
    options: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["check_clips.py", str(MODEL), *options])
    with pytest.raises(SystemExit):
        check_clips.main()
    assert says in capsys.readouterr().err.splitlines()[-1]


def test_a_sweep_generates_with_every_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    class Pipe:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)

    ran = []

    def generate(pipe: Pipe, captions: list[str], *, steps: int, guidance: float, **_: int) -> torch.Tensor:
        ran.append((steps, pipe.scheduler.config.shift, guidance))
        scenes = data.sample_scenes(len(captions), "check 3", heldout=True)
        return data.render(scenes, 0, frames=3, height=64, width=64)

    monkeypatch.setattr(check_clips, "generate", generate)
    pipe = Pipe()
    rows = check_clips.sweep(pipe, captions=6, steps=(4, 8), shifts=(None, 3.0), guidances=(5.0,), seed=3)
    assert ran == [(4, 2.0, 5.0), (4, 3.0, 5.0), (8, 2.0, 5.0), (8, 3.0, 5.0)]
    assert [(row["steps"], row["shift"], row["guidance"]) for row in rows] == ran
    assert all(row["colours_generated"] == row["shapes_generated"] == 1.0 for row in rows)
    assert pipe.scheduler.config.shift == 2.0


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
    clips = check_clips.generate(pipe, [caption], steps=2, frames=5, height=48, width=64)
    assert clips.shape == (1, 3, 5, 48, 64) and clips.isfinite().all() and clips.std() > 0.02


@needs_model
def test_the_model_reconstructs_held_out_clips() -> None:
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(MODEL / "vae")
    clips = data.render(data.sample_scenes(2, "reconstruction", heldout=True), 0, frames=5)
    assert check_clips.psnr(check_clips.reconstruct(vae, clips), clips).mean() >= 29


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
        clips = check_clips.generate(pipe, [caption], steps=2, frames=5, height=64, width=64)
        text = str(pipe.sparse_attention_summary())
    assert clips.isfinite().all() and "shipped with the model" in text


@needs_model
@pytest.mark.slow(reason="sixteen clips of the small model")
@pytest.mark.parametrize("plan", ["sparse_plan", "conservative"])
def test_edges_and_the_last_frame_are_no_worse_than_the_rest(plan: str) -> None:
    """Of the searched plan, and of a rule that treats all places alike: what a clip does at its end is in both."""
    from diffusers import WanPipeline

    from diffsparse.search import evaluate_plan

    pipe = WanPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    captions = (MODEL / "prompts" / "heldout.txt").read_text().splitlines()[:4]
    found = evaluate_plan(
        pipe, str(MODEL / plan) if plan == "sparse_plan" else plan, captions, seeds=(7,), num_inference_steps=6,
        height=96, width=96, num_frames=9, backend="cpu", noise_floor=False, progress=False,
    )  # fmt: skip
    edges, last = ([getattr(c, name) for c in found.clips] for name in ("border_error", "last_frame_error"))
    assert max(edges) <= 1.5
    assert math.prod(last) ** (1 / len(last)) <= 1.5  # one clip may end with the motion that is hardest
    assert found.frame_errors is not None and len(found.frame_errors) == 9
