"""Pipelines that are given pictures, clips, masks and controls: searched, evaluated and explained from JSON lines."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffsparse.pipelines import find_transformers
from diffsparse.search import load
from diffsparse.search.errors import BadInput
from diffsparse.search.evaluate import compare, generate_dense
from diffsparse.search.explain import explain, shape_for
from diffsparse.search.generate import GenerationSettings, generate_clip
from diffsparse.search.inputs import as_input, check_inputs, read_inputs
from diffsparse.search.recompose import compose_plan
from diffsparse.search.search import SearchConfig, search_plan
from diffsparse.search.shortened import steps_to_ask
from tests.search.conditioned import PIPELINES, write_files

STEPS = 4
#: Searched on each change; the others with the slow tests.
FAST = ("wan_v2v", "flux_controlnet", "flux_img2img")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_files(folder)
    for name, one in PIPELINES.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in one.inputs()), "utf-8")
    return folder


@pytest.fixture(autouse=True)
def _few_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffsparse.search.stages import compose as module

    monkeypatch.setattr(module, "measure_costs", partial(module.measure_costs, seconds=0.0))


def config(name: str, **changes: Any) -> SearchConfig:
    asked = {
        "density": PIPELINES[name].density, "steps": STEPS, "trace_steps": 2, "samples": 2, "trace_prompts": 1,
        "validation_prompts": 1, "candidates": 1, "guidance_scale": 3.0, "repair": False,
    }  # fmt: skip
    return SearchConfig(**asked | PIPELINES[name].settings | changes)


def quiet(_: str) -> None:
    """Takes what a search says."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in FAST else pytest.mark.slow(reason="a whole search each")) for n in PIPELINES],
)
def test_searched_evaluated_and_explained(name: str, files: Path, tmp_path: Path) -> None:
    pipe, inputs, asked = PIPELINES[name].build(), read_inputs(files / f"{name}.jsonl"), config(name)
    plan = search_plan(pipe, inputs, asked, tmp_path, progress=False, say=quiet)
    given = sorted({argument for one in inputs for argument in one.arguments})
    assert plan.record["calibration"]["inputs"] == given and "prompts_sha256" not in plan.record["calibration"]
    ran = PIPELINES[name].ran.get(STEPS, STEPS)
    assert plan.record["search"]["of_steps"] == ran

    dense = generate_dense(
        pipe, inputs, [5], asked.settings(STEPS), noise_floor=False, other_seed=False, progress=False
    )
    assert len(dense.noise_levels) == ran
    report = compare(pipe, plan, dense, progress=False)
    assert not report.notes  # nothing is dense but by the plan's word
    assert report.trajectory_density == pytest.approx(plan.record["search"]["trajectory_density"], abs=0.03)
    assert [clip.prompt for clip in report.clips] == [one.name for one in inputs]
    assert report.psnr is not None and 20 < report.psnr.mean < 140

    again = compose_plan(tmp_path, density=asked.density, out=tmp_path / "again", progress=False, say=quiet)
    assert again.entries == plan.entries and np.array_equal(again.index, plan.index)
    assert again.record["calibration"] == plan.record["calibration"]

    found = explain(plan, shape_for(plan, folder=str(tmp_path)), device=torch.device("cpu"), dtype=torch.float32)
    assert str(found.shape.grid) == plan.record["calibration"]["grid"]
    assert {layer.layer for layer in found.layers} == set(plan.layers)


@pytest.mark.parametrize("name", [n for n in PIPELINES if n in FAST])
def test_what_is_given_reaches_the_model(name: str, files: Path) -> None:
    """The same prompt and seed with another picture or clip make another result; equal ones an equal one."""
    pipe, settings = PIPELINES[name].build(), config(name).settings(2)
    first, other = PIPELINES[name].inputs()
    same, changed = dict(first), dict(first) | {n: v for n, v in other.items() if n != "prompt"}
    made = [generate_clip(pipe, as_input(x, files), 0, settings).frames for x in (first, same, changed)]
    assert torch.equal(made[0], made[1])
    assert (made[0] - made[2]).abs().max() > 1e-3


# -- a share of the steps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "strength"), [(2, 0.6), (3, 0.3), (7, 0.29), (8, 0.95), (5, 1.0), (1, 0.05)])
def test_as_many_steps_run_as_are_needed(files: Path, steps: int, strength: float) -> None:
    pipe = PIPELINES["wan_v2v"].build()
    one = as_input({"prompt": "a", "video": "clip0.gif", "strength": strength}, files)
    settings = GenerationSettings(steps_to_ask(pipe, one, steps), 1.0, 112, 144)
    calls: list[None] = []
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(None))
    clip = generate_clip(pipe, one, 0, settings)
    handle.remove()
    assert steps <= len(calls) <= steps + 1 and len(clip.noise_levels) == len(calls)


def test_inputs_of_another_strength_are_refused(files: Path) -> None:
    pipe = PIPELINES["flux_img2img"].build()
    two = [as_input({"prompt": p, "image": "picture0.png", "strength": s}, files) for p, s in (("a", 0.5), ("b", 0.7))]
    with pytest.raises(BadInput, match=r"strength is 0\.7, and 0\.5 in the first input; all inputs must go through"):
        check_inputs(pipe, two)
    with pytest.raises(BadInput, match=r"strength is a share above 0 and at most 1, got 1\.5"):
        check_inputs(pipe, [as_input({"prompt": "a", "image": "picture0.png", "strength": 1.5}, files)])


def test_a_strength_that_leaves_too_few_steps_is_said_before_the_search(files: Path, tmp_path: Path) -> None:
    pipe = PIPELINES["wan_v2v"].build()
    inputs = read_inputs(files / "wan_v2v.jsonl")
    with pytest.raises(BadInput, match=r"WanVideoToVideoPipeline runs 2 of 4 steps, and 2 are to be dense; ask for"):
        search_plan(pipe, inputs, config("wan_v2v", dense_steps=2), tmp_path, progress=False, say=quiet)
    weak = [as_input({"prompt": "a", "video": "clip0.gif", "strength": 0.1}, files)]
    with pytest.raises(BadInput, match="runs 0 of 4 steps; ask for more steps, or give the inputs a larger strength"):
        search_plan(pipe, weak, config("wan_v2v"), tmp_path / "weak", progress=False, say=quiet)


def test_a_pipeline_that_is_given_too_little_or_too_much(files: Path) -> None:
    def refused(name: str, **given: Any) -> str:
        with pytest.raises(BadInput) as caught:
            check_inputs(PIPELINES[name].build(), [as_input({"prompt": "a", **given}, files)])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert refused("wan_i2v").startswith("WanImageToVideoPipeline cannot generate from a prompt alone: its call needs")
    line = refused("wan_i2v", negative_prompt="b")
    assert "cannot generate from negative_prompt, prompt: its call needs image; give inputs as JSON lines" in line
    assert refused("wan_i2v", imgae="picture0.png") == "WanImageToVideoPipeline takes no imgae; did you mean image?"
    line = refused("flux_controlnet", control_image="picture0.png", sound="c.wav")
    assert line.startswith("FluxControlNetPipeline takes no sound; its call takes prompt, control_image, ")
    assert refused("flux_controlnet").endswith("load the model in a text-to-image pipeline and search there: a plan "
                                               "fits every pipeline with the same transformer")  # fmt: skip


def test_a_condition_with_an_unknown_member(files: Path) -> None:
    pipe = PIPELINES["ltx_condition"].build()
    one = as_input({"prompt": "a", "conditions": [{"image": "picture0.png", "frame": 0}]}, files)
    with pytest.raises(BadInput, match="a condition takes no frame; it takes image, video, frame_index, strength"):
        generate_clip(pipe, one, 0, config("ltx_condition").settings(2))


def test_the_command_line_takes_json_lines(
    files: Path, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffsparse.search.cli import main

    pipe = PIPELINES["flux_img2img"].build()
    monkeypatch.setattr(load, "load_pipeline", lambda *args, **kwargs: pipe)

    def run(*arguments: object) -> Any:
        with pytest.raises(SystemExit) as stopped:
            main([str(a) for a in (*arguments, "--prompts", files / "flux_img2img.jsonl", "--json")])
        out, err = capsys.readouterr()
        assert not stopped.value.code, err
        return json.loads(out)

    few = ["--trace-prompts", 1, "--samples", 1, "--validate", 0, "--density", 0.7, "--no-repair"]
    run("search", model_folder, "--out", tmp_path / "plan", "--height", 208, "--width", 256, "--steps", 4, *few)
    data = run("eval", model_folder, tmp_path / "plan", "--seeds", 1, "--out", tmp_path / "report")
    assert [clip["prompt"] for clip in data["clips"]] == [
        "a red circle [image: picture0.png, strength: 0.5]",
        "a blue square on a hill [image: picture1.png, strength: 0.5]",
    ]
    assert (tmp_path / "report" / "eval.json").is_file()
    assert {type(t).__name__ for t in find_transformers(pipe).values()} == {"FluxTransformer2DModel"}


@pytest.mark.slow(reason="pictures of a megapixel")
def test_pictures_of_two_shapes_are_one_line(files: Path, tmp_path: Path) -> None:
    """The pipeline makes its result in the shape of the picture, and a search needs one size."""
    pipe = PIPELINES["qwen_edit"].build()
    inputs = [as_input({"prompt": "a", "image": f"{name}0.png"}, files) for name in ("picture", "square")]
    with pytest.raises(BadInput, match="tokens; a search needs one size"):
        search_plan(pipe, inputs, config("qwen_edit", trace_prompts=2), tmp_path, progress=False, say=quiet)
