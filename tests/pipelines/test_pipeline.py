"""Whole pipelines: two transformers, two calls a step, schedules, saving, and ``plan="auto"``."""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffsparse.pipelines import (
    UnsupportedModelError,
    architecture_of,
    cache_folder,
    find_transformers,
    tap_attention,
)
from diffsparse.plan import PlanError
from diffsparse.schedule import Schedule
from tests.pipelines.claims import shows
from tests.pipelines.models import generate, masked_attention, mixed_plan, wan, wan_pipeline
from tests.tolerance import GENERATION, assert_near


@shows("whole pipeline", "WanTransformer3DModel")
def test_sparse_equals_masked_attention_over_a_generation() -> None:
    pipe = wan_pipeline()
    plan = mixed_plan(pipe.transformer, Schedule(sparse_below=0.95, phase_bounds=(0.6,)))
    dense = generate(pipe)
    with tap_attention(pipe, masked_attention(plan)):
        expected = generate(pipe)
    pipe.enable_sparse_attention(plan)
    assert_near(generate(pipe), expected, GENERATION)
    assert (expected - dense).abs().max() > 1e-2
    pipe.disable_sparse_attention()
    assert torch.equal(generate(pipe), dense)


@pytest.mark.parametrize("steps", [20, 4])
def test_schedule_by_noise_level_at_any_number_of_steps(steps: int) -> None:
    pipe = wan_pipeline(layers=1)
    schedule = Schedule(sparse_below=0.9, phase_bounds=(0.6,))
    plan = mixed_plan(pipe.transformer, schedule)
    pipe.enable_sparse_attention(plan)
    generate(pipe, steps)
    levels = [float(t) / 1000 for t in pipe.scheduler.timesteps]
    sparse = [level for level in levels if schedule.phase(level) is not None]
    assert 0 < len(sparse) < steps
    summary = pipe.sparse_attention_summary()
    found = summary.transformers["transformer"]
    assert (found.forwards, found.sparse_calls) == (2 * steps, 2 * len(sparse))  # with guidance, two calls a step
    (grid,) = pipe.transformer._diffsparse_root.grids
    assert summary.density == pytest.approx(plan.trajectory_density(grid, levels))


def test_two_transformers_with_two_plans() -> None:
    pipe = wan_pipeline(stages=2)
    assert list(find_transformers(pipe)) == ["transformer", "transformer_2"]
    dense = generate(pipe)
    plans = {"transformer": mixed_plan(pipe.transformer), "transformer_2": mixed_plan(pipe.transformer_2, shift=2)}
    with tap_attention(pipe, lambda call: masked_attention(plans[call.transformer])(call)):
        expected = generate(pipe)
    with pipe.sparse_attention(plans):
        assert_near(generate(pipe), expected, GENERATION)
        summary = pipe.sparse_attention_summary()
        parts = summary.transformers
        assert all(part.sparse_calls for part in parts.values())
        calls = sum(part.sparse_calls for part in parts.values())
        assert calls == 4 * 2 * 2
        weighted = sum(part.density * part.sparse_calls for part in parts.values()) / calls
        assert summary.density == pytest.approx(weighted)
    assert torch.equal(generate(pipe), dense)
    with pipe.sparse_attention({"transformer_2": "window"}):
        assert list(pipe.sparse_attention_summary().transformers) == ["transformer_2"]
    with pipe.sparse_attention("window"):
        assert len(pipe.sparse_attention_summary().transformers) == 2


def test_refusal_touches_neither_transformer() -> None:
    pipe = wan_pipeline(stages=2)
    with pytest.raises(PlanError, match="transformer_2"):
        pipe.enable_sparse_attention(
            {"transformer": mixed_plan(pipe.transformer), "transformer_2": mixed_plan(wan(layers=3))}
        )
    assert not pipe.sparse_attention_summary().enabled
    pipe.transformer_2.enable = None
    pipe.enable_sparse_attention({"transformer_2": "window"})
    with pytest.raises(RuntimeError, match="already enabled on transformer_2"):
        pipe.enable_sparse_attention("window")
    assert list(pipe.sparse_attention_summary().transformers) == ["transformer_2"]


def test_only_the_second_transformer() -> None:
    pipe = wan_pipeline(stages=2)
    pipe.register_modules(transformer=None)
    assert list(find_transformers(pipe)) == ["transformer_2"]


def test_resolutions_in_turn() -> None:
    """Portrait and landscape have as many tokens."""
    pipe = wan_pipeline()
    plan = mixed_plan(pipe.transformer)
    sizes = [(112, 144), (144, 112), (128, 128)]
    with tap_attention(pipe, masked_attention(plan)):
        expected = [generate(pipe, 2, *size) for size in sizes]
    pipe.enable_sparse_attention(plan)
    for i in (0, 1, 2, 0, 1):
        assert_near(generate(pipe, 2, *sizes[i]), expected[i], GENERATION)


def test_vae_runs_as_before() -> None:
    pipe = wan_pipeline()
    pipe.enable_sparse_attention("dense")
    sparse = generate(pipe, 2, 64, 64, 5, output_type="pt")
    pipe.disable_sparse_attention()
    assert torch.equal(sparse, generate(pipe, 2, 64, 64, 5, output_type="pt"))
    assert not hasattr(pipe.vae, "_diffsparse_root")


def test_copies_of_a_pipeline() -> None:
    from diffusers import WanPipeline

    pipe = wan_pipeline()
    dense = generate(pipe)
    pipe.enable_sparse_attention(mixed_plan(pipe.transformer))
    sparse = generate(pipe)
    twin = copy.deepcopy(pipe)
    shared = WanPipeline.from_pipe(pipe)
    shared.set_progress_bar_config(disable=True)
    assert torch.equal(generate(shared), sparse)
    pipe.disable_sparse_attention()
    assert torch.equal(generate(pipe), dense)
    assert torch.equal(generate(shared), dense)  # the same modules
    assert torch.equal(generate(twin), sparse)


def test_interrupted_generation() -> None:
    pipe = wan_pipeline()
    pipe.enable_sparse_attention(mixed_plan(pipe.transformer))
    sparse = generate(pipe)

    def stop(pipe: object, step: int, timestep: torch.Tensor, values: dict) -> dict:
        if step == 1:
            raise RuntimeError("stop")
        return values

    with pytest.raises(RuntimeError, match="stop"):
        generate(pipe, callback_on_step_end=stop)
    assert torch.equal(generate(pipe), sparse)


def test_model_cpu_offload_and_group_offload() -> None:
    pipe = wan_pipeline()
    plan = mixed_plan(pipe.transformer)
    pipe.enable_sparse_attention(plan)
    sparse = generate(pipe)
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    assert torch.equal(generate(pipe), sparse)
    assert pipe.sparse_attention_summary().transformers["transformer"].dense_calls == 0


def test_first_block_cache_skips_what_it_skips() -> None:
    from diffusers import FirstBlockCacheConfig

    pipe = wan_pipeline(layers=3)
    pipe.enable_sparse_attention(mixed_plan(pipe.transformer))
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    generate(pipe)
    layers = pipe.sparse_attention_summary().transformers["transformer"].layers
    assert [layer.sparse_calls for layer in layers] == [8, 2, 2]
    assert pipe.sparse_attention_summary().transformers["transformer"].dense_calls == 0


def test_a_pipeline_without_a_known_transformer() -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, SanaTransformer2DModel, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    pipe = DDPMPipeline(unet, DDPMScheduler())
    with pytest.raises(UnsupportedModelError, match="its UNet2DModel is not suited: it is a U-Net"):
        pipe.enable_sparse_attention()
    pipe.unet = torch.nn.Linear(1, 1)
    with pytest.raises(
        UnsupportedModelError, match=r"its Linear has no family. `diffsparse models` lists the \d+ trans"
    ):
        pipe.enable_sparse_attention()
    sana = SanaTransformer2DModel(
        num_layers=1, num_attention_heads=1, attention_head_dim=4, num_cross_attention_heads=1,
        cross_attention_head_dim=4, cross_attention_dim=4, caption_channels=4, sample_size=4,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match=r"SanaTransformer2DModel is not suited: .*linear"):
        find_transformers(sana)


# -- plan="auto" -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIFFSPARSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _took(pipe: object, caplog: pytest.LogCaptureFixture) -> str:
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="diffsparse"), pipe.sparse_attention():  # type: ignore[attr-defined]
        found = pipe.sparse_attention_summary().transformers["transformer"].plan  # type: ignore[attr-defined]
    (line,) = [r.getMessage() for r in caplog.records if "plan 'auto' took" in r.getMessage()]
    return f"{found} | {line}"


def test_auto(tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    from diffusers import WanPipeline

    pipe = wan_pipeline()
    assert "preset 'online'" in _took(pipe, caplog)

    architecture = architecture_of(pipe.transformer)
    assert cache_folder(architecture.fingerprint) == cache / "plans" / architecture.fingerprint
    mixed_plan(pipe.transformer).save_pretrained(cache_folder(architecture.fingerprint))
    assert "cached for this architecture" in _took(pipe, caplog)

    folder = tmp_path / "model"
    pipe.save_pretrained(folder)
    mixed_plan(pipe.transformer).save_pretrained(folder / "sparse_plan")
    loaded = WanPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None)
    assert f"shipped with the model in {folder / 'sparse_plan'}" in _took(loaded, caplog)
    # a transformer taken from the pipeline still knows its folder
    from diffsparse.pipelines import sparse_attention, sparse_attention_summary

    with sparse_attention(loaded.transformer):
        assert "shipped" in sparse_attention_summary(loaded.transformer).transformers["transformer"].plan

    # a plan for another model is passed over, and so is a damaged one
    mixed_plan(wan(layers=3)).save_pretrained(folder / "sparse_plan")
    took = _took(loaded, caplog)
    assert "cached for this architecture" in took and "is for another architecture" in took
    (folder / "sparse_plan" / "sparse_plan.json").write_text("{")
    took = _took(loaded, caplog)
    assert "cached for this architecture" in took and "not valid JSON" in took
    mixed_plan(pipe.transformer, shift=1).save_pretrained(folder / "sparse_plan" / "transformer")
    assert str(folder / "sparse_plan" / "transformer") in _took(loaded, caplog)


def test_auto_takes_no_plan_without_a_signature(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = wan_pipeline()
    plan = replace(mixed_plan(pipe.transformer), architecture=None)
    plan.save_pretrained(cache_folder(architecture_of(pipe.transformer).fingerprint))
    assert "preset 'online'" in _took(pipe, caplog)


def test_summary_of_a_pipeline_is_json() -> None:
    pipe = wan_pipeline(stages=2)
    pipe.enable_sparse_attention("window")
    generate(pipe, 2)
    assert set(json.loads(json.dumps(pipe.sparse_attention_summary().to_dict()))["transformers"]) == {
        "transformer",
        "transformer_2",
    }
