"""What a pipeline's call takes and needs, its own values, and the one line that it stops with."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from diffsparse.search import evaluate_plan, load
from diffsparse.search.call import call_pipeline, sizes_seen
from diffsparse.search.cli import main
from diffsparse.search.errors import BadInput
from diffsparse.search.generate import MAX_SEED, GenerationSettings, check_seeds, generate_clip
from diffsparse.search.search import SearchConfig, search_plan
from diffsparse.search.signature import check_generates, makes_videos, parameters
from tests.search.plans import make_plan
from tests.search.tiny import PROMPTS, SHAPE, build_pipeline, flux_pipeline

Refused = Callable[..., str]
SIZE = ["--height", "48", "--width", "48"]


def bare(name: str) -> Any:
    """An object with the call of a diffusers pipeline, and nothing else."""
    return type(name, (), {"__call__": getattr(diffusers, name).__call__})()


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Runs a command on a pipeline in memory and gives the one line that it is refused with."""

    def run(pipe: Any, *arguments: object) -> str:
        monkeypatch.setattr(load, "load_pipeline", lambda *args, **kwargs: pipe)
        with pytest.raises(SystemExit) as stopped:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert stopped.value.code == 2, err
        lines = [line for line in err.splitlines() if "clips dense, then as many sparse" not in line]
        assert out == "" and len(lines) == 1 and lines[0].startswith("error: "), err
        return lines[0]

    return run


def no_steps(pipe: Any) -> list[object]:
    """A list that gets an entry at every call of the transformer."""
    seen: list[object] = []
    pipe.transformer.register_forward_pre_hook(lambda *_: seen.append(None))
    return seen


# -- what the signature tells ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("WanImageToVideoPipeline", "its call needs image;"),
        ("HunyuanVideo15ImageToVideoPipeline", "its call needs image;"),
        ("WanAnimatePipeline", "its call needs image, pose_video, face_video;"),
        ("LucyEditPipeline", "its call needs video;"),
        ("WanVideoToVideoPipeline", "its call needs video;"),
        ("CogVideoXVideoToVideoPipeline", "its call needs video;"),
        ("CogVideoXFunControlPipeline", "its call needs control_video;"),
        ("Cosmos2_5_TransferPipeline", "its call needs controls;"),
        ("FluxImg2ImgPipeline", "its call needs image;"),
        ("StableDiffusion3Img2ImgPipeline", "its call needs image;"),
        ("FluxFillPipeline", "its call needs image, mask_image;"),
        ("QwenImageInpaintPipeline", "its call needs image, mask_image;"),
        ("FluxControlPipeline", "its call needs control_image;"),
        ("ZImageControlNetPipeline", "its call needs control_image;"),
        ("DiTPipeline", "takes no prompt (its call takes class_labels)"),
        ("VisualClozePipeline", "takes no prompt (its call takes image)"),
    ],
)
def test_pipelines_that_need_more_than_a_prompt(name: str, message: str) -> None:
    pipe = bare(name)
    with pytest.raises(BadInput) as caught:
        check_generates(pipe)
    assert str(caught.value).startswith(name) and message in str(caught.value)
    kind = "video" if "Video" in name or "Wan" in name or name.startswith(("Lucy", "Cosmos")) else "image"
    assert f"load the model in a text-to-{kind} pipeline" in str(caught.value)
    with pytest.raises(BadInput, match=name):
        GenerationSettings().arguments(pipe)
    with pytest.raises(BadInput, match=name):
        SearchConfig().resolved(pipe)


#: Steps and guidance of the call itself; None: it has no such argument, or no value of its own.
OWN = {
    "WanPipeline": (50, 5.0),
    "WanVACEPipeline": (50, 5.0),
    "HunyuanVideo15Pipeline": (50, None),
    "HunyuanImagePipeline": (50, None),
    "MotifVideoPipeline": (50, None),
    "Flux2KleinKVPipeline": (4, None),
    "LTX2DFRPipeline": (None, None),
    "HeliosPyramidPipeline": (None, 5.0),
    "FluxPipeline": (28, 3.5),
    "FluxKontextPipeline": (28, 3.5),
    "QwenImagePipeline": (50, None),
    "PixArtSigmaPipeline": (20, 4.5),
    "AllegroPipeline": (100, 7.5),
    "LTXConditionPipeline": (50, 3),
    "LTX2ConditionPipeline": (30, 3.0),
    "Cosmos2_5_PredictBasePipeline": (36, 7.0),
}


@pytest.mark.parametrize("name", OWN)
def test_what_is_not_given_is_the_pipelines_own(name: str) -> None:
    pipe = bare(name)
    own = GenerationSettings().resolved(pipe)
    assert (own.num_inference_steps, own.guidance_scale) == OWN[name]
    assert GenerationSettings().arguments(pipe) == {}
    known = parameters(pipe)
    assert set(own.arguments(pipe)) <= set(known)
    asked = GenerationSettings(height=64, width=96).resolved(pipe)
    assert (asked.height, asked.width, asked.num_inference_steps) == (64, 96, OWN[name][0])


def test_true_guidance_is_not_switched_on_by_its_default() -> None:
    assert parameters(bare("QwenImagePipeline"))["true_cfg_scale"].default == 4.0
    assert GenerationSettings().resolved(bare("QwenImagePipeline")).true_cfg_scale is None


def test_every_pipeline_of_a_known_model_runs_with_its_own_values_or_is_refused_in_one_line() -> None:
    from diffsparse.pipelines.families.sizes import USUAL_SIZES

    generating = set()
    for name in dir(diffusers):
        cls = getattr(diffusers, name) if name.endswith("Pipeline") else None
        if not isinstance(cls, type) or not any(known in str(inspect.signature(cls)) for known in USUAL_SIZES):
            continue
        try:
            check_generates(bare(name))
        except BadInput as error:
            assert "\n" not in str(error) and str(error).startswith(name)
            continue
        settings = GenerationSettings().resolved(bare(name))
        assert set(settings.arguments(bare(name))) <= set(parameters(bare(name)))
        generating.add(name)
    assert {*OWN, "MochiPipeline", "HiDreamImagePipeline"} <= generating


def test_a_search_says_what_it_cannot_do_without() -> None:
    with pytest.raises(BadInput, match=r"HeliosPyramidPipeline takes no num_inference_steps.*another pipeline"):
        SearchConfig().resolved(bare("HeliosPyramidPipeline"))
    config = SearchConfig(height=64).resolved(bare("WanPipeline"))
    assert (config.steps, config.guidance_scale, config.height, config.num_frames) == (50, 5.0, 64, 81)
    assert [config.for_heads(d).block for d in (64, 72, 128, 256)] == [64, 64, 128, 64] and config.block == 64
    assert replace(config, block_size=64).for_heads(128).block == 64
    with pytest.raises(BadInput, match="block_size is 64 or 128, got 32"):
        replace(config, block_size=32)
    with pytest.raises(BadInput, match="dense_steps lies between 0 and 3, got 4"):
        SearchConfig(dense_steps=4).resolved(bare("Flux2KleinKVPipeline"))


def test_which_pipelines_make_videos() -> None:
    videos = ("WanPipeline", "WanVideoToVideoPipeline", "CogVideoXVideoToVideoPipeline", "EasyAnimatePipeline")
    images = ("FluxPipeline", "DiTPipeline", "Cosmos2TextToImagePipeline", "QwenImageEditPipeline")
    assert all(makes_videos(bare(name)) for name in videos) and not any(makes_videos(bare(name)) for name in images)


# -- the commands on such pipelines ------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["search", "eval"])
@pytest.mark.parametrize(
    ("name", "message"),
    [("WanImageToVideoPipeline", "its call needs image"), ("WanVideoToVideoPipeline", "its call needs video")],
)
def test_commands_refuse_before_anything_runs(
    refused: Refused, tmp_path: Path, model_folder: Path, prompts_file: Path, pipe: Any, command: str, name: str,
    message: str,
) -> None:  # fmt: skip
    parts = {n: pipe.components[n] for n in ("tokenizer", "text_encoder", "vae", "transformer", "scheduler")}
    more = {"image_encoder": None, "image_processor": None} if "Image" in name else {}
    other = getattr(diffusers, name)(**parts, **more)
    rest = ["window"] if command == "eval" else ["--out", tmp_path]
    line = refused(other, command, model_folder, *rest, "--prompts", prompts_file, *SIZE, "--num-frames", 9)
    assert f"{name} cannot generate from a prompt alone: {message}" in line and "makes images" not in line


def test_frames_of_a_pipeline_that_takes_no_number_of_them(pipe: Any) -> None:
    parts = {n: pipe.components[n] for n in ("tokenizer", "text_encoder", "vae", "transformer", "scheduler")}
    other = diffusers.WanVideoToVideoPipeline(**parts)
    with pytest.raises(BadInput, match="WanVideoToVideoPipeline takes no number of frames; leave it out"):
        load.check_shape(other, None, None, 9)


def test_a_package_that_a_pipeline_lacks(
    refused: Refused, tmp_path: Path, model_folder: Path, prompts_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.pipelines.wan import pipeline_wan_vace

    monkeypatch.delattr(pipeline_wan_vace, "ftfy", raising=False)
    monkeypatch.setattr("diffsparse.search.call.find_spec", lambda name: None)
    tiny = build_pipeline()
    vace = diffusers.WanVACETransformer3DModel(
        patch_size=(1, 1, 1), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=64, num_layers=2, vace_layers=[0], vace_in_channels=8,
    )  # fmt: skip
    pipe = diffusers.WanVACEPipeline(tiny.tokenizer, tiny.text_encoder, tiny.vae, tiny.scheduler, vace)
    pipe.set_progress_bar_config(disable=True)
    seen = no_steps(pipe)
    size = [*SIZE, "--num-frames", 9]
    wanted = "error: WanVACEPipeline needs the package ftfy, which is not installed: pip install ftfy"
    assert refused(pipe, "search", model_folder, "--prompts", prompts_file, "--out", tmp_path, *size) == wanted
    assert refused(pipe, "eval", model_folder, "window", "--prompts", prompts_file, *size) == wanted
    assert not seen


@pytest.mark.parametrize(
    ("parts", "boundary", "missing"),
    [
        ({"transformer": None}, 0.9, "transformer is None"),
        ({"transformer": None}, None, "transformer is None"),
        ({"transformer_2": None}, 0.9, "transformer_2 is None"),
    ],
)
def test_one_of_two_transformers_is_missing(
    refused: Refused, model_folder: Path, prompts_file: Path, pipe: Any, parts: Any, boundary: Any, missing: str
) -> None:
    given = {n: pipe.components[n] for n in ("tokenizer", "text_encoder", "vae", "transformer", "scheduler")}
    both = {**given, "transformer_2": given["transformer"], **parts}
    other = diffusers.WanPipeline(**both, boundary_ratio=boundary)
    line = refused(other, "eval", model_folder, "window", "--prompts", prompts_file, *SIZE, "--num-frames", 9)
    assert f"WanPipeline cannot generate: its {missing}; load the pipeline with all its transformers" in line


def test_the_second_transformer_alone_where_it_does_every_step(pipe: Any) -> None:
    given = {n: pipe.components[n] for n in ("tokenizer", "text_encoder", "vae", "scheduler")}
    other = diffusers.WanPipeline(**given, transformer=None, transformer_2=pipe.transformer, boundary_ratio=1.5)
    other.set_progress_bar_config(disable=True)
    settings = GenerationSettings(2, 3.0, **SHAPE)
    assert torch.equal(
        generate_clip(other, PROMPTS[0], 0, settings).frames, generate_clip(pipe, PROMPTS[0], 0, settings).frames
    )


# -- what the pipeline itself says -------------------------------------------------------------------------------------


class Stub:
    """A pipeline that raises ``error`` before or in its first step."""

    def __init__(self, error: Exception, within: bool = False) -> None:
        self.error, self.within = error, within
        self.components = {"transformer": torch.nn.Identity()}

    def __call__(
        self, prompt: str, generator: Any, output_type: str, image: Any = None, image_scale: float = 1.0
    ) -> None:
        if self.within:
            self.components["transformer"](torch.zeros(1))
        raise self.error


def test_what_a_pipeline_says_of_its_inputs_is_one_line() -> None:
    pipe = Stub(ValueError("Input is in\nincorrect format" + " !" * 1000))
    with pytest.raises(BadInput) as caught:
        call_pipeline(pipe, "a", 0, GenerationSettings(), "pt")
    line = str(caught.value)
    assert line.startswith("Stub stopped before its first step: ValueError: Input is in incorrect format ! !")
    assert line.endswith(". Its call also takes image: inputs in JSON lines can give them")
    assert len(line) < 500 and "\n" not in line and isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize("error", [IndexError("list index out of range"), RuntimeError("a defect")])
def test_what_goes_wrong_later_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)):
        call_pipeline(Stub(error, within=True), "a", 0, GenerationSettings(), "pt")
    with pytest.raises(torch.OutOfMemoryError):
        call_pipeline(Stub(torch.OutOfMemoryError("full")), "a", 0, GenerationSettings(), "pt")


def test_what_a_hook_raises_is_not_the_pipelines(pipe: Any) -> None:
    class Cancelled(Exception):
        pass

    def cancel(*_: Any) -> None:
        raise Cancelled

    handle = pipe.transformer.register_forward_pre_hook(cancel)
    try:
        with pytest.raises(Cancelled):
            generate_clip(pipe, PROMPTS[0], 0, GenerationSettings(1, 1.0, **SHAPE))
    finally:
        handle.remove()
    assert not pipe.transformer._forward_pre_hooks and "prepare_latents" not in vars(pipe)


# -- sizes that do not hold --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kontext() -> Any:
    """A tiny pipeline that makes a megapixel of every size."""
    return flux_pipeline("FluxKontextPipeline")


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (
            ("--height", 256, "--width", 256),
            "would make 1024 x 1024 pixels (width x height) of it; ask for --height 1024",
        ),
        (("--height", 256), "--height 256: FluxKontextPipeline chooses its size by itself"),
        # What 256 x 480 becomes is not kept either: the line names one that is.
        (
            ("--height", 256, "--width", 480),
            "would make 1392 x 736 pixels (width x height) of it; ask for --height 736 --width 1408",
        ),
    ],
    ids=str,
)
def test_a_size_that_the_pipeline_changes(
    refused: Refused, tmp_path: Path, model_folder: Path, prompts_file: Path, kontext: Any, size: Any, message: str
) -> None:
    seen = no_steps(kontext)
    for rest in (["eval", model_folder, "window"], ["search", model_folder, "--out", tmp_path]):
        line = refused(kontext, *rest, "--prompts", prompts_file, *size)
        assert message in line
    assert not seen
    height, width = (int(v) for v in line.split("ask for --height ")[1].split(",")[0].split(" --width "))
    reached: list[None] = []

    def stop(*_: Any) -> None:
        reached.append(None)
        raise RuntimeError("reached")

    handle = kontext.transformer.register_forward_pre_hook(stop)
    try:
        with pytest.raises(RuntimeError, match="reached"):
            generate_clip(kontext, PROMPTS[0], 0, GenerationSettings(1, height=height, width=width))
    finally:
        handle.remove()
    assert reached


def test_a_pipeline_that_is_watched_twice(kontext: Any) -> None:
    seen: list[tuple[int, int]] = []
    with sizes_seen(kontext, lambda height, width: seen.append((height, width))):
        with pytest.raises(BadInput, match="would make 1024 x 1024 pixels"):
            generate_clip(kontext, PROMPTS[0], 0, GenerationSettings(1, height=512, width=512))
    assert not seen  # the inner watch stops the call first
    assert "prepare_latents" not in vars(kontext)


@pytest.mark.slow(reason="a whole search, and clips at the pipeline's own size")
def test_a_search_records_the_pipelines_own_values_and_eval_takes_them(
    tmp_path: Path, prompts_file: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Flux has its size from its model: nobody gives one, and the plan says which it was."""
    pipe = flux_pipeline("FluxPipeline")
    config = SearchConfig(
        budget=1.0, trace_steps=2, steps=2, samples=1, trace_prompts=1, validation_prompts=0, candidates=1
    )
    search_plan(pipe, PROMPTS[:1], config, tmp_path / "plan", progress=False)
    record = load.load_plan(str(tmp_path / "plan")).record["calibration"]
    assert (record["guidance_scale"], record["height"], record["width"]) == (3.5, 128, 128)
    pipe.default_sample_size = 32
    monkeypatch.setattr(load, "load_pipeline", lambda *args, **kwargs: pipe)
    with pytest.raises(SystemExit) as stopped:
        main(["eval", str(model_folder), str(tmp_path / "plan"), "--prompts", str(prompts_file), "--json"])
    out, err = capsys.readouterr()
    assert not stopped.value.code, err
    settings = json.loads(out)["settings"]
    assert (settings["height"], settings["width"], settings["num_inference_steps"]) == (128, 128, 2)
    assert settings["guidance_scale"] == 3.5


def test_a_size_in_latents_is_the_size() -> None:
    class InLatents(Stub):
        def prepare_latents(self, height: int, width: int) -> None: ...

        def __call__(  # type: ignore[override]
            self, prompt: str, generator: Any, output_type: str, height: int = 64, width: int = 64, factor: int = 8
        ) -> str:
            self.prepare_latents(height // factor, width=width // factor)
            return "made"

    pipe = InLatents(ValueError())
    assert call_pipeline(pipe, "a", 0, GenerationSettings(height=64, width=96), "pt") == "made"
    with pytest.raises(BadInput, match=r"would make 48 x 32 pixels \(width x height\) of it; leave the size out"):
        call_pipeline(pipe, "a", 0, GenerationSettings(height=64, width=96), "pt", factor=2)


# -- the plan first ----------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    def generated(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a clip was generated")

    monkeypatch.setattr("diffsparse.search.evaluate.generate_clip", generated)
    monkeypatch.setattr("diffsparse.search.evaluate.generate_clips", generated)


def edited(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A plan for the tiny pipeline whose file was changed by hand."""
    plan = make_plan().save_pretrained(folder)
    file = plan / "sparse_plan.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return plan


@pytest.mark.usefixtures("nothing_generated")
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("guidance_scale", [5.0], "guidance_scale: [5.0]; it must be a number of at least 0"),
        ("guidance_scale", -1, "guidance_scale: -1; it must be"),
        ("height", "48", "height: '48'; it must be a whole number of at least 1"),
        ("steps", "3", "steps: '3'; it must be a whole number of at least 1"),
        ("steps", True, "steps: True; it must be"),
        ("num_frames", 9.5, "num_frames: 9.5; it must be"),
        ("width", "x" * 5000, "width: 'xxx"),
        ("width", "\x1b[31m", "it must be a whole number"),
        ("true_cfg_scale", {}, None),  # this pipeline takes none
    ],
)
def test_a_calibration_that_holds_no_numbers(
    refused: Refused, tmp_path: Path, model_folder: Path, prompts_file: Path, pipe: Any, name: str, value: Any,
    message: str | None,
) -> None:  # fmt: skip
    plan = edited(tmp_path / "plan", lambda content: content["record"]["calibration"].update({name: value}))
    run = ["eval", model_folder, plan, "--prompts", prompts_file]
    if message is None:
        with pytest.raises(AssertionError, match="a clip was generated"):
            refused(pipe, *run)
        return
    line = refused(pipe, *run)
    assert f"the plan's calibration has {name}: " in line and message in line
    assert len(line) < 300 and "\x1b" not in line and "search the plan again" in line.lower()


@pytest.mark.usefixtures("nothing_generated")
def test_a_calibration_that_is_no_object(
    refused: Refused, tmp_path: Path, model_folder: Path, prompts_file: Path, pipe: Any
) -> None:
    plan = edited(tmp_path / "plan", lambda content: content["record"].update(calibration=[1, 2]))
    line = refused(pipe, "eval", model_folder, plan, "--prompts", prompts_file)
    assert "record.calibration must be an object, got [1, 2]" in line


@pytest.mark.usefixtures("nothing_generated")
def test_a_plan_with_a_layer_that_the_model_lacks(
    refused: Refused, tmp_path: Path, model_folder: Path, prompts_file: Path, pipe: Any
) -> None:
    plan = edited(tmp_path / "plan", lambda content: content["schedule"].update(dense_layers=["blocks.9.attn1"]))
    run = ["eval", model_folder, plan, "--prompts", prompts_file]
    assert "it names blocks.9.attn1, which the model lacks" in refused(pipe, *run)
    with pytest.raises(ValueError, match=r"blocks\.9\.attn1"):
        evaluate_plan(pipe, load.load_plan(str(plan)), PROMPTS)


@pytest.mark.usefixtures("nothing_generated")
def test_a_backend_that_cannot_run_is_said_before_the_clips(pipe: Any) -> None:
    with pytest.raises(ValueError, match="no-such-backend"):
        evaluate_plan(pipe, make_plan(), PROMPTS, backend="no-such-backend")


# -- prompts and seeds -------------------------------------------------------------------------------------------------


def test_prompts_are_cut_at_newlines_alone(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("one\u2028two\r\nthree\x0bfour\x0cfive\n\x85six\u2029seven\x1c\n".encode())
    assert load.read_prompts(file) == ["one\u2028two", "three\x0bfour\x0cfive", "six\u2029seven"]


@pytest.mark.parametrize("seed", [2**64, 10**40])
def test_seeds_beyond_64_bits(
    refused: Refused, tmp_path: Path, model_folder: Path, prompts_file: Path, pipe: Any, seed: int
) -> None:
    line = refused(pipe, "search", model_folder, "--prompts", prompts_file, "--out", tmp_path, "--seed", seed)
    assert f"--seed {seed}"[:40] in line and "it must be at most" in line
    line = refused(pipe, "eval", model_folder, "window", "--prompts", prompts_file, "--first-seed", seed)
    assert "--first-seed" in line and "it must be at most" in line
    with pytest.raises(BadInput, match=f"the seed is an integer from 0 to {MAX_SEED}"):
        SearchConfig(seed=seed)
    with pytest.raises(BadInput, match="seeds must be distinct integers from 0 to"):
        check_seeds([seed])
    assert check_seeds([MAX_SEED]) == (MAX_SEED,) and torch.Generator().manual_seed(MAX_SEED)


# -- the demo and the prompts of its page ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("WanImageToVideoPipeline", "cannot generate from a prompt alone: its call needs image"),
        ("HeliosPyramidPipeline", "takes no num_inference_steps, which the demo asks for; name another model"),
    ],
)
def test_the_demo_opens_no_pipeline_that_it_cannot_show(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, name: str, message: str
) -> None:
    from diffsparse.search.demo.studio import Studio

    monkeypatch.setattr(load, "load_pipeline", lambda *args, **kwargs: bare(name))
    with pytest.raises(BadInput, match=f"{name} {message}"):
        Studio.open(str(model_folder))


def test_the_demo_starts_with_the_pipelines_own_values(pipe: Any) -> None:
    from diffsparse.search.demo.studio import Studio

    own = Studio(pipe, "tiny").defaults()
    assert (own.num_inference_steps, own.guidance_scale, own.height, own.num_frames) == (50, 5.0, 480, 81)
    without = Studio(bare("HunyuanImagePipeline"), "tiny")
    assert without.defaults().guidance_scale is None and not without.takes("guidance_scale")


def test_prompts_of_the_page_are_cut_at_newlines_alone(pipe: Any) -> None:
    from diffsparse.search.demo.search_plan import _prompts
    from diffsparse.search.demo.studio import Studio

    assert _prompts(Studio(pipe, "tiny"), "one\u2028two\r\n\nthree\x0bfour") == ["one two", "three four"]
