"""``diffsparse.search_plan`` and ``evaluate_plan``: on pipelines set up in many ways, which they leave as they were."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models import attention_dispatch

import diffsparse
from diffsparse.search.errors import BadInput
from tests.search.conditioned import PIPELINES, picture
from tests.search.tiny import PROMPTS, SHAPE, build_pipeline, fix_costs

SHORT: dict[str, Any] = {
    "density": 0.6, "num_inference_steps": 3, "trace_steps": 3, "samples": 2, "trace_prompts": 1, "validate": 1,
    "candidates": 1, "guidance_scale": 3.0, "repair": False, "progress": False, **SHAPE,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _fixed_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    fix_costs(monkeypatch)


# -- what a pipeline is, before and after ------------------------------------------------------------------------------


def state_of(pipe: Any) -> dict[str, Any]:
    """All of a pipeline that somebody may have set: hooks, processors, forwards, modes, schedulers, random numbers."""
    found: dict[str, Any] = {}
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            found[name] = type(part)
            for path, module in part.named_modules():
                found[f"{name}.{path}"] = {
                    "class": type(module),
                    "training": module.training,
                    "hooks": [list(hooks) for hooks in (module._forward_pre_hooks, module._forward_hooks)],
                    "forward": type(vars(module).get("forward")),
                    "compiled": getattr(module, "_compiled_call_impl", None),
                    "processor": id(getattr(module, "processor", None)),
                    "backend": getattr(getattr(module, "processor", None), "_attention_backend", None),
                    "registry": type(getattr(module, "_diffusers_hook", None)),
                    "attributes": sorted(vars(module)),
                    "device": {p.device for p in module.parameters(recurse=False)},
                }
        elif hasattr(part, "set_timesteps"):
            found[name] = (type(part), dict(part.config), {n: id(v) for n, v in vars(part).items()})
    kept = {n: id(v) for n, v in vars(pipe).items() if n not in ("_all_hooks", *pipe.components)}
    active = attention_dispatch._AttentionBackendRegistry._active_backend
    generators = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    return {**found, "pipe": kept, "offloaded": len(getattr(pipe, "_all_hooks", [])), "backend": active,
            "random": generators}  # fmt: skip


def with_lora(pipe: Any) -> None:
    from peft import LoraConfig

    torch.manual_seed(3)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))


def group_offloaded(pipe: Any) -> None:
    pipe.transformer.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")


def compiled_blocks(pipe: Any) -> None:
    pipe.transformer.compile_repeated_blocks(backend="eager")


def compiled_whole(pipe: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


def in_training(pipe: Any) -> None:
    pipe.transformer.train()
    pipe.text_encoder.train()


SET_UPS: dict[str, Callable[[Any], None]] = {
    "plain": lambda pipe: None,
    "LoRA": with_lora,
    "model offload": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "group offload": group_offloaded,
    "compiled blocks": compiled_blocks,
    "compiled whole": compiled_whole,
    "attention backend": lambda pipe: pipe.transformer.set_attention_backend("_native_math"),
    "in training": in_training,
    "tiled decoding": lambda pipe: pipe.vae.enable_tiling(),
}
FAST = ("model offload", "in training")


@pytest.fixture
def no_global_backend() -> Any:
    """``set_attention_backend`` sets the process's as well."""
    before = attention_dispatch._AttentionBackendRegistry._active_backend
    yield
    attention_dispatch._AttentionBackendRegistry._active_backend = before


@pytest.fixture(scope="module")
def plain_plan(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        fix_costs(patch)
        return diffsparse.search_plan(build_pipeline(), PROMPTS, out=tmp_path_factory.mktemp("plain"), **SHORT)


@pytest.mark.usefixtures("no_global_backend")
@pytest.mark.parametrize(
    "set_up",
    [pytest.param(n, marks=() if n in FAST else pytest.mark.slow(reason="searches and evaluates")) for n in SET_UPS],
)
def test_a_pipeline_is_taken_as_it_is_and_left_so(set_up: str, tmp_path: Path, plain_plan: Any) -> None:
    pipe = build_pipeline()
    SET_UPS[set_up](pipe)
    pipe(PROMPTS[0], num_inference_steps=2, **SHAPE)  # as somebody has who works with it
    before = state_of(pipe)
    plan = diffsparse.search_plan(pipe, PROMPTS, out=tmp_path, **SHORT)
    assert state_of(pipe) == before
    if set_up != "LoRA":
        assert plan.entries == plain_plan.entries and np.array_equal(plan.index, plain_plan.index)
    report = diffsparse.evaluate_plan(pipe, plan, PROMPTS[:1], seeds=(5,), noise_floor=False, progress=False)
    assert state_of(pipe) == before
    assert report.settings.num_inference_steps == 3 and report.settings.height == SHAPE["height"]
    assert report.trajectory_density == pytest.approx(plan.record["search"]["trajectory_density"])
    assert report.dense is not None and list(report.dense.clips) == [(PROMPTS[0], 5)]


class Stopped(Exception):
    pass


@pytest.mark.usefixtures("no_global_backend")
@pytest.mark.parametrize(
    ("set_up", "calls"),
    [
        ("model offload", 5),
        *(
            pytest.param(set_up, calls, marks=pytest.mark.slow(reason="as much of a search again"))
            for set_up in ("model offload", "compiled blocks", "in training")
            for calls in (1, 5, 14)
            if (set_up, calls) != ("model offload", 5)
        ),
    ],
)
def test_a_pipeline_is_left_as_it_was_where_it_fails(set_up: str, calls: int, tmp_path: Path) -> None:
    """In the first model call, within the probe, and while errors are put into recorded steps."""
    pipe = build_pipeline()
    SET_UPS[set_up](pipe)
    pipe(PROMPTS[0], num_inference_steps=2, **SHAPE)
    left = [calls]

    def stop(*_: Any) -> None:
        left[0] -= 1
        if left[0] <= 0:
            raise Stopped

    handle = pipe.transformer.proj_out.register_forward_pre_hook(stop)
    before = state_of(pipe)
    with pytest.raises(Stopped):
        diffsparse.search_plan(pipe, PROMPTS, out=tmp_path, **SHORT)
    assert state_of(pipe) == before
    left[0] = calls
    with pytest.raises(Stopped):
        diffsparse.evaluate_plan(pipe, "window", PROMPTS, num_inference_steps=3, progress=False, **SHAPE)
    assert state_of(pipe) == before
    handle.remove()


def test_a_search_that_was_stopped_goes_on(tmp_path: Path, plain_plan: Any) -> None:
    pipe = build_pipeline()

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "sensitivity":
            raise Stopped

    with pytest.raises(Stopped):
        diffsparse.search_plan(pipe, PROMPTS, out=tmp_path, on_stage=stop, **SHORT)
    lines: list[str] = []
    plan = diffsparse.search_plan(pipe, PROMPTS, out=tmp_path, say=lines.append, **SHORT)
    assert lines[0] == f"going on with the search in {tmp_path}" and plan.entries == plain_plan.entries


@pytest.mark.slow(reason="a whole search")
def test_a_modular_pipeline_is_left_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe, size = PIPELINES["modular_wan"].build(), {"height": 112, "width": 144, "num_frames": 9}
    pipe(prompt=PROMPTS[0], num_inference_steps=2, **size)
    before = state_of(pipe)
    capsys.readouterr()
    asked = SHORT | {"guidance_scale": None, **size}
    diffsparse.search_plan(pipe, PROMPTS, out=tmp_path, **asked)
    assert state_of(pipe) == before
    assert "it/s]" not in capsys.readouterr().err


def test_pictures_in_memory(tmp_path: Path) -> None:
    pipe = PIPELINES["flux_img2img"].build()
    inputs = [{"prompt": "a", "image": picture(n), "strength": 0.5} for n in range(2)]
    asked = SHORT | {"height": 208, "width": 256, "num_frames": None, "num_inference_steps": 4, "trace_steps": 2}
    plan = diffsparse.search_plan(pipe, inputs, out=tmp_path, **asked)
    assert plan.record["search"]["of_steps"] == 2
    report = diffsparse.evaluate_plan(pipe, plan, inputs, seeds=(1,), noise_floor=False, progress=False)
    assert len({clip.prompt for clip in report.clips}) == 2


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_what_cannot_work_is_said_before_anything_runs(pipe: Any, tmp_path: Path) -> None:
    calls: list[None] = []
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(None))

    def refused(run: Callable[..., Any], *arguments: Any, **options: Any) -> str:
        with pytest.raises(BadInput) as caught:
            run(pipe, *arguments, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    search, evaluate = diffsparse.search_plan, diffsparse.evaluate_plan
    assert refused(search, [], out=tmp_path) == "a search needs at least one prompt"
    assert "inputs are a list" in refused(search, "a prompt", out=tmp_path)
    assert "WanPipeline takes no image" in refused(search, [{"prompt": "a", "image": picture(0)}], out=tmp_path)
    assert "give a budget, a density or a target" in refused(search, ["a"], out=tmp_path, budget=0.4, target=0.9)
    assert "--height 50: this model takes multiples of 16" in refused(search, ["a"], out=tmp_path, height=50)
    assert "takes no true_cfg_scale" in refused(search, ["a"], out=tmp_path, true_cfg_scale=2.0)
    assert refused(evaluate, "window", []) == "there is no input to generate; give at least one prompt"
    assert "seeds must be distinct" in refused(evaluate, "window", ["a"], seeds=(1, 1))
    one = {"prompt": "a", "negative_prompt": "b"}
    assert "leave one out" in refused(evaluate, "window", [one], negative_prompt="c")
    with diffsparse.sparse_attention(pipe, "window"):
        assert "sparse attention is enabled on this WanPipeline: disable it first" in refused(
            search, ["a"], out=tmp_path
        )
        assert "disable it first" in refused(evaluate, "window", ["a"])
    handle.remove()
    assert not calls and not list(tmp_path.iterdir())
