"""Video families: extra tokens, noise levels of every pipeline, and what has to run dense."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import diffusers
import pytest
import torch

from diffsparse.grid import TokenGrid
from diffsparse.pipelines import (
    AttentionCall,
    UnsupportedModelError,
    enable_sparse_attention,
    sparse_attention,
    sparse_attention_summary,
    tap_attention,
)
from diffsparse.pipelines.families import UNSUITABLE
from diffsparse.pipelines.family import family_by_class
from diffsparse.pipelines.summary import TransformerSummary
from tests.pipelines import zoo_video as zoo
from tests.pipelines.case import TEXT, VIDEO_SHAPES, Inputs
from tests.pipelines.claims import shows
from tests.pipelines.models import masked_attention, mixed_plan, run
from tests.pipelines.zoo_video import (
    allegro,
    allegro_inputs,
    anyflow,
    anyflow_inputs,
    chronoedit,
    cosmos,
    cosmos_inputs,
    helios,
    helios_inputs,
    kandinsky5,
    kandinsky5_inputs,
    kandinsky6,
    kandinsky6_inputs,
    ltx,
    ltx2,
    ltx2_inputs,
    ltx_inputs,
    skyreels_v2,
    wan_like_inputs,
)
from tests.tolerance import MODEL, assert_near, near

SHAPE, PORTRAIT = VIDEO_SHAPES


def check_sparse(model: torch.nn.Module, inputs: Inputs, grid: TokenGrid) -> None:
    """Everything runs sparse, on this grid, and as the plan says."""
    plan = mixed_plan(model)
    calls: list[AttentionCall] = []
    with tap_attention(model, calls.append):
        dense = run(model, inputs)
    assert {call.grid for call in calls} == {grid}
    with tap_attention(model, masked_attention(plan)):
        expected = run(model, inputs)
    with sparse_attention(model, plan):
        assert_near(run(model, inputs), expected, MODEL)
        summary = sparse_attention_summary(model).transformers["transformer"]
    assert summary.dense_calls == 0 and summary.grids == {str(grid): 1}
    assert not near(expected, dense, MODEL)


def check_dense(model: torch.nn.Module, inputs: Inputs) -> str:
    """Everything runs dense, bitwise, for one reason, which is returned."""
    dense = run(model, inputs)
    with sparse_attention(model, mixed_plan(model)):
        assert torch.equal(run(model, inputs), dense)
        summary: TransformerSummary = sparse_attention_summary(model).transformers["transformer"]
    assert summary.sparse_calls == 0 and summary.dense_calls == len(summary.layers)
    (reason,) = summary.dense_reasons
    return reason


def levels(model: torch.nn.Module, inputs: Inputs) -> set[float]:
    calls: list[AttentionCall] = []
    with tap_attention(model, calls.append):
        run(model, inputs)
    return {round(call.noise_level, 6) for call in calls}


# -- image-to-video ------------------------------------------------------------------------------------------------

IMAGE_TO_VIDEO: dict[str, tuple[Callable[[], torch.nn.Module], Callable[..., Inputs]]] = {
    "wan i2v": (partial(zoo.wan, **zoo.I2V), zoo.wan_i2v_inputs),
    "wan first and last frame": (
        partial(zoo.wan, **zoo.I2V, pos_embed_seq_len=6),
        partial(zoo.wan_i2v_inputs, images=2),
    ),
    "wan 2.2 5b": (zoo.wan, zoo.wan_ti2v_inputs),
    "skyreels": (partial(zoo.skyreels_v2, **zoo.I2V), zoo.wan_i2v_inputs),
    "chronoedit": (partial(zoo.chronoedit, **zoo.I2V), zoo.wan_i2v_inputs),
    "cosmos video2world": (partial(zoo.cosmos, in_channels=5), zoo.cosmos_video2world_inputs),
    "cosmos 2.5 transfer": (zoo.cosmos25_transfer, zoo.cosmos25_transfer_inputs),
    "kandinsky5": (partial(zoo.kandinsky5, visual_cond=True), zoo.kandinsky5_i2v_inputs),
}


@shows("ControlNet", "CosmosTransformer3DModel")
@pytest.mark.parametrize("shape", VIDEO_SHAPES)
@pytest.mark.parametrize("name", IMAGE_TO_VIDEO)
def test_image_to_video(name: str, shape: tuple[int, int, int]) -> None:
    """Given pictures come as channels, as keys of cross-attention, as clean timesteps: the sequence is the clip's."""
    build, inputs = IMAGE_TO_VIDEO[name]
    model, given = build(), inputs(*shape)
    assert levels(model, given) == {0.5}
    check_sparse(model, given, TokenGrid(*shape))


# -- Wan's kin -----------------------------------------------------------------------------------------------------


def test_skyreels_causal_in_frames_runs_dense() -> None:
    model = skyreels_v2(num_frame_per_block=3)
    assert check_dense(model, wan_like_inputs(*SHAPE)) == "a mask that is not a key-padding mask"


def test_skyreels_diffusion_forcing() -> None:
    """Every frame has its own timestep: the noisiest counts."""
    model = skyreels_v2(inject_sample_info=True)
    inputs = {
        **wan_like_inputs(*SHAPE),
        "timestep": torch.tensor([[0.0, 300.0, 800.0]]),
        "enable_diffusion_forcing": True,
        "fps": [0],
    }
    assert levels(model, inputs) == {0.8}
    check_sparse(model, inputs, TokenGrid(*SHAPE))


def test_chronoedit_goes_on_with_two_frames() -> None:
    model = chronoedit()
    enable_sparse_attention(model, mixed_plan(model))
    inputs = wan_like_inputs(*SHAPE)
    run(model, inputs)
    run(model, {**inputs, "hidden_states": inputs["hidden_states"][:, :, [0, -1]]})
    summary = sparse_attention_summary(model).transformers["transformer"]
    assert summary.dense_calls == 0
    assert summary.grids == {str(TokenGrid(*SHAPE)): 1, str(TokenGrid(2, *SHAPE[1:])): 1}


def test_anyflow_of_given_frames_only() -> None:
    inputs = anyflow_inputs(*SHAPE)
    inputs["timestep"] = torch.zeros_like(inputs["timestep"])
    assert levels(anyflow(), inputs) == {0.0}


# -- LTX -----------------------------------------------------------------------------------------------------------


def ltx_positions(frames: int, height: int, width: int, frame_index: int = 0) -> torch.Tensor:
    """Positions as ``LTXConditionPipeline`` makes them, in frames."""
    from diffusers import LTXConditionPipeline

    ids = LTXConditionPipeline._prepare_video_ids(1, frames, height, width)
    return LTXConditionPipeline._scale_video_ids(ids, frame_index=frame_index).float()


def ltx_by_positions(shape: tuple[int, int, int], *parts: torch.Tensor) -> Inputs:
    positions = torch.cat(parts, dim=2).repeat(2, 1, 1)
    positions[:, 0] /= 25
    inputs = ltx_inputs(*shape)
    for name in ("num_frames", "height", "width", "rope_interpolation_scale"):
        del inputs[name]
    tokens = positions.shape[2]
    inputs["hidden_states"] = torch.randn(2, tokens, 4)
    # Given tokens are held at another noise level.
    inputs["timestep"] = torch.full((2, tokens), 250.0)
    inputs["timestep"][:, :5] = 0
    return {**inputs, "video_coords": positions}


@pytest.mark.parametrize("shape", VIDEO_SHAPES)
def test_ltx_grid_from_positions(shape: tuple[int, int, int]) -> None:
    """The pipeline with conditions passes positions only: portrait and landscape differ in their values alone."""
    model = ltx()
    inputs = ltx_by_positions(shape, ltx_positions(*shape))
    assert levels(model, inputs) == {0.25}
    check_sparse(model, inputs, TokenGrid(*shape))


@pytest.mark.parametrize("shape", VIDEO_SHAPES)
def test_ltx_conditions_stand_before_the_clip(shape: tuple[int, int, int]) -> None:
    _, height, width = shape
    later, earlier = ltx_positions(2, height, width, frame_index=16), ltx_positions(1, height, width, frame_index=8)
    inputs = ltx_by_positions(shape, later, earlier, ltx_positions(*shape))
    check_sparse(ltx(), inputs, TokenGrid(*shape, text_before=3 * height * width))


def test_ltx_long_video_pipeline_appends_frames() -> None:
    """It passes 1 for each of num_frames, height and width beside the positions."""
    from diffusers.pipelines.ltx.pipeline_ltx_i2v_long_multi_prompt import build_video_coords_for_window

    latents = torch.zeros(2, 4, 5, 7, 9)
    positions = build_video_coords_for_window(latents, 1, 0, 1, (8, 32, 32), 25)
    inputs = {
        **ltx_by_positions((5, 7, 9), ltx_positions(5, 7, 9)),
        "video_coords": positions,
        "num_frames": 1,
        "height": 1,
        "width": 1,
    }
    check_sparse(ltx(), inputs, TokenGrid(3, 7, 9, text_after=2 * 7 * 9))


def test_ltx_without_a_grid_runs_dense() -> None:
    model = ltx()
    positions = ltx_positions(*SHAPE)
    shuffled = ltx_by_positions(SHAPE, positions[:, :, torch.randperm(189, generator=torch.Generator().manual_seed(0))])
    assert "tokens are not one clip of" in check_dense(model, shuffled)
    missing = {**ltx_by_positions(SHAPE, positions), "num_frames": 3, "height": 7, "width": 10, "video_coords": None}
    missing["hidden_states"] = torch.randn(2, 210, 4)
    missing["timestep"] = torch.full((2, 210), 250.0)
    check_sparse(model, missing, TokenGrid(3, 7, 10))
    family = family_by_class("LTXVideoTransformer3DModel")
    with pytest.raises(ValueError, match="num_frames, height and width are missing"):
        family.grid(model.config, {"hidden_states": torch.zeros(1, 189, 4)})
    with pytest.raises(ValueError, match="189 video tokens, but positions of 63"):
        family.grid(model.config, {"hidden_states": torch.zeros(1, 189, 4), "video_coords": torch.zeros(1, 3, 63)})


def ltx2_with(model: torch.nn.Module, shape: tuple[int, int, int], *extra: torch.Tensor) -> Inputs:
    """A clip, and more tokens at positions ``[1, 3, S, 2]`` after it."""
    coordinates = torch.cat([model.rope.prepare_video_coords(1, *shape, torch.device("cpu")), *extra], dim=2)
    tokens = coordinates.shape[2]
    return {
        **ltx2_inputs(*shape),
        "hidden_states": torch.randn(2, tokens, 4),
        "timestep": torch.full((2, tokens), 250.0),
        "audio_timestep": torch.full((2,), 250.0),
        "video_coords": coordinates.repeat(2, 1, 1, 1),
    }


def keyframe(model: torch.nn.Module, height: int, width: int, frame: int) -> torch.Tensor:
    """Positions of one picture at a pixel frame: it lasts one pixel frame."""
    coordinates = model.rope.prepare_video_coords(1, 1, height, width, torch.device("cpu"))
    coordinates[:, 0] += frame / 24
    return coordinates


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("shape", VIDEO_SHAPES)
def test_ltx2_keyframes_stand_after_the_clip(shape: tuple[int, int, int], told: bool) -> None:
    """The second keyframe is of the last moment (17 pixel frames), so its position follows on the clip's."""
    model = ltx2()
    _, height, width = shape
    for frames in ((8,), (16,), (8, 16)):
        inputs = ltx2_with(model, shape, *(keyframe(model, height, width, frame) for frame in frames))
        if not told:  # as LTX-2.5's pipeline with tiles
            inputs.update(num_frames=None, height=None, width=None)
        check_sparse(model, inputs, TokenGrid(*shape, text_after=len(frames) * height * width))


@pytest.mark.parametrize("told", [True, False])
def test_ltx2_reference_of_another_size(told: bool) -> None:
    model = ltx2()
    reference = model.rope.prepare_video_coords(1, 3, 3, 4, torch.device("cpu"))
    reference[:, 1:] *= 2
    inputs = ltx2_with(model, SHAPE, reference)
    if not told:
        inputs.update(num_frames=None, height=None, width=None)
    check_sparse(model, inputs, TokenGrid(*SHAPE, text_after=36))


def test_ltx2_tile_has_positions_of_its_own() -> None:
    """A tile's positions begin at its own first token; tokens outside the tile are left out."""
    model = ltx2()
    inputs = ltx2_with(model, (3, 9, 9), keyframe(model, 9, 9, 8))
    keep = torch.arange(324)[(torch.arange(324) % 81) < 63]  # the upper 7 rows of every frame
    for name in ("hidden_states", "timestep"):
        inputs[name] = inputs[name][:, keep]
    inputs["video_coords"] = inputs["video_coords"][:, :, keep] - 1.0
    inputs.update(num_frames=None, height=None, width=None)
    check_sparse(model, inputs, TokenGrid(3, 7, 9, text_after=63))


def test_ltx2_self_attention_mask_runs_dense() -> None:
    model = ltx2()
    mask = torch.ones(2, 189, 189)
    mask[:, :, 100:] = 0.5
    reason = check_dense(model, {**ltx2_inputs(*SHAPE), "video_self_attention_mask": mask})
    assert reason == "a mask that is not a key-padding mask"


def test_ltx2_too_few_tokens_runs_dense() -> None:
    model = ltx2()
    inputs = {**ltx2_with(model, SHAPE), "num_frames": 4}
    assert "189 video tokens, fewer than" in check_dense(model, inputs)


def test_ltx2_perturbed_layers_skip_attention() -> None:
    """Spatio-temporal guidance leaves attention out in some layers of some forwards."""
    model = ltx2(perturbed_attn=True)
    inputs = {**ltx2_inputs(*SHAPE), "spatio_temporal_guidance_blocks": [1]}
    plan = mixed_plan(model)
    with tap_attention(model, masked_attention(plan)):
        expected = run(model, inputs)
    with sparse_attention(model, plan):
        assert_near(run(model, inputs), expected, MODEL)
        summary = sparse_attention_summary(model).transformers["transformer"]
    assert (summary.sparse_calls, summary.dense_calls) == (1, 0)


def test_ltx2_newer_kinds() -> None:
    """LTX-2.3: gates, modulated cross-attention, no prompt projection."""
    model = ltx2(
        gated_attn=True,
        cross_attn_mod=True,
        audio_gated_attn=True,
        audio_cross_attn_mod=True,
        rope_type="split",
        use_prompt_embeddings=False,
        perturbed_attn=True,
    )
    inputs = {
        **ltx2_inputs(*SHAPE),
        "encoder_hidden_states": torch.randn(2, TEXT, 48),
        "audio_encoder_hidden_states": torch.randn(2, TEXT, 24),
        "sigma": torch.full((2,), 250.0),
        "use_cross_timestep": True,
    }
    check_sparse(model, inputs, TokenGrid(*SHAPE))


# -- Cosmos --------------------------------------------------------------------------------------------------------


def cosmos1(sigma: float) -> tuple[float, object]:
    scheduler = diffusers.EDMEulerScheduler(sigma_max=80.0)
    return float(scheduler.precondition_noise(torch.tensor(sigma))), scheduler


def cosmos2(sigma: float) -> tuple[float, object]:
    return sigma / (sigma + 1), diffusers.FlowMatchEulerDiscreteScheduler()


@pytest.mark.parametrize("pipeline", [cosmos1, cosmos2])
def test_cosmos_noise_levels(pipeline: Callable[[float], tuple[float, object]]) -> None:
    family = family_by_class("CosmosTransformer3DModel")
    for sigma, level in ((80.0, 80 / 81), (1.0, 0.5), (0.25, 0.2), (0.002, 0.002 / 1.002)):
        value, scheduler = pipeline(sigma)
        assert family.noise_level(value, 1000, scheduler) == pytest.approx(level, rel=1e-4)


def test_cosmos_scheduler_of_the_pipeline_tells_the_unit() -> None:
    """Cosmos 1 by its pipeline: noise falls from nearly 1 to nearly 0, and a plan's range means the same everywhere."""
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    scheduler.set_timesteps(8)
    family = family_by_class("CosmosTransformer3DModel")
    found = [family.noise_level(float(t), 1000, scheduler) for t in scheduler.timesteps]
    assert found[0] > 0.98 and found[-1] < 0.01
    assert found == sorted(found, reverse=True)


def test_cosmos_timestep_of_every_frame() -> None:
    model = cosmos()
    inputs = cosmos_inputs(*SHAPE)
    inputs["timestep"] = torch.full((2, 1, 3, 1, 1), 0.4)
    inputs["timestep"][:, :, 0] = 0.0001
    assert levels(model, inputs) == {0.4}
    check_sparse(model, inputs, TokenGrid(*SHAPE))


# -- others --------------------------------------------------------------------------------------------------------


def test_allegro_self_attention_mask_runs_dense() -> None:
    mask = torch.ones(2, 3, 14, 18)
    mask[1, :, 6:] = 0
    inputs = {**allegro_inputs(*SHAPE), "attention_mask": mask}
    assert check_dense(allegro(), inputs) == "a mask that is not a key-padding mask"


def test_kandinsky5_nabla_runs_dense() -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName

    model = kandinsky5()
    for block in model.visual_transformer_blocks:
        # As set_attention_backend("flex") does, which would hold for the whole process.
        block.self_attention.processor._attention_backend = AttentionBackendName.FLEX
    inputs = kandinsky5_inputs(2, 8, 16)
    inputs["sparse_params"] = {"sta_mask": torch.eye(4, dtype=torch.bool)[None, None], "to_fractal": True, "P": 0.5}
    assert "its own sparse attention (NABLA)" in check_dense(model, inputs)


def test_kandinsky6_without_sound() -> None:
    inputs = {**kandinsky6_inputs(*SHAPE), "audio_hidden_states": None}
    check_sparse(kandinsky6(), inputs, TokenGrid(*SHAPE))


def test_kandinsky6_picture_to_begin_with() -> None:
    """The pipeline appends it as one more frame at the first one's position."""
    inputs = kandinsky6_inputs(4, 7, 9)
    inputs["visual_token_type_ids"] = torch.tensor([[0, 0, 0, 1]]).repeat(2, 1)
    inputs["visual_rope_pos"] = (torch.tensor([0, 1, 2, 0]), torch.arange(7), torch.arange(9))
    check_sparse(kandinsky6(visual_token_type_num_embeddings=2), inputs, TokenGrid(*SHAPE, text_after=63))


@pytest.mark.parametrize(
    ("parts", "tokens"), [((), 0), (("short",), 63), (("short", "mid"), 63 + 20), (("short", "long"), 63 + 12)]
)
def test_helios_counts_the_past_it_gets(parts: tuple[str, ...], tokens: int) -> None:
    inputs = helios_inputs(*SHAPE)
    for name in {"short", "mid", "long"} - set(parts):
        inputs[f"latents_history_{name}"] = None
    check_sparse(helios(), inputs, TokenGrid(*SHAPE, text_before=tokens))


def test_helios_past_of_other_sizes() -> None:
    inputs = helios_inputs(*PORTRAIT)
    inputs["latents_history_mid"] = torch.randn(1, 4, 4, 18, 14)
    inputs["indices_latents_history_mid"] = torch.arange(5, 9)[None]
    check_sparse(helios(), inputs, TokenGrid(*PORTRAIT, text_before=63 + 2 * 5 * 4 + 2 * 3 * 2))


@pytest.mark.parametrize(
    "name",
    [
        "WanAnimate2Transformer3DModel",
        "AnyFlowFARTransformer3DModel",
        "SanaVideoTransformer3DModel",
        "LatteTransformer3DModel",
        "Cosmos3OmniTransformer",
        "Kandinsky6SRTransformer3DModel",
        "MiniMaxH3Transformer3DModel",
    ],
)
def test_unsuitable_says_why(name: str) -> None:
    assert hasattr(diffusers, name)
    model = type(name, (torch.nn.Module,), {})()
    with pytest.raises(UnsupportedModelError, match=f"{name} is not suited: ") as error:
        enable_sparse_attention(model, "window")
    assert UNSUITABLE[name] in str(error.value)
