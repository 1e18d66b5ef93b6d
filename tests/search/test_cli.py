"""The command line in this process: answers, exit codes, one line for every mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffsparse.kernels import backend_ways
from diffsparse.search import load
from diffsparse.search.cli import main
from diffsparse.search.errors import BadInput
from tests.search.plans import make_plan
from tests.search.tiny import PROMPTS, SHAPE_OPTIONS, Cli

# -- help --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        ["search"],
        ["eval"],
        ["compare"],
        ["show"],
        ["explain"],
        ["bench", "kernels"],
        ["bench", "break-even"],
        ["env"],
        ["models"],
        ["demo"],
    ],
)
def test_help_has_an_example(cli: Cli, command: list[str]) -> None:
    code, out, _ = cli(*command, "--help")
    assert code == 0
    assert f"Example:\n    diffsparse {' '.join(command)}" in out


def test_help_lists_the_commands_and_the_version_is_told(cli: Cli) -> None:
    import diffsparse

    assert all(name in cli("--help")[1] for name in ("search", "eval", "show", "bench", "env", "demo"))
    assert cli("--version") == (0, diffsparse.__version__ + "\n", "")


def test_no_command_gives_the_help_and_fails(cli: Cli) -> None:
    code, out, err = cli()
    assert (code, out) == (2, "") and "Commands:" in err


# -- mistakes ----------------------------------------------------------------------------------------------------------


def refused(cli: Cli, *arguments: object) -> str:
    """The one line that a command is refused with."""
    code, out, err = cli(*arguments)
    assert code == 2, err
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "No such command 'fly'; see `diffsparse --help`"),
        (["eval", "m"], "Missing argument 'PLAN'; see `diffsparse eval --help`"),
        (["eval", "m", "p"], "Missing option '--prompts'"),
        (["show", "p", "--colour", "red"], "No such option: --colour"),
        (["search", "m", "--prompts", "p", "--out", "o", "--steps", "many"], "Invalid value for '--steps'"),
        (["search", "m", "--prompts", "p", "--out", "o", "--budget", "0.4", "--density", "0.3"], "one of the three"),
        (
            ["search", "m", "--prompts", "p", "--out", "o", "--budget", "0.4", "--target", "0.9"],
            "--budget 0.4 and --target 0.9: give one of the three",
        ),
        (["search", "m", "--prompts", "p", "--out", "o", "--target", "0"], "--target 0.0: it is the SSIM"),
        (["search", "m", "--prompts", "p", "--out", "o", "--target", "1.01"], "above 0 and at most 1, as 0.95"),
        (["search", "m", "--prompts", "p", "--out", "o", "--target", "nan"], "--target nan: it is the SSIM"),
        (["search", "m", "--prompts", "p", "--out", "o", "--target", "good"], "Invalid value for '--target'"),
        (["search", "m", "--prompts", "p", "--out", "o", "--points", "0"], "--points 0: it must be at least 1"),
        (["search", "m", "--prompts", "p", "--out", "o", "--budget", "0.4", "--points", "2"], "leave one out"),
        (["search", "m", "--prompts", "p", "--out", "o", "--validate", "0"], "--validate 0: a target is measured"),
        (["search", "m", "--prompts", "p", "--out", "o", "--budget", "0"], "--budget 0.0: it is a share"),
        (["search", "m", "--prompts", "p", "--out", "o", "--budget", "1.5"], "at most 1, for example 0.4"),
        (["search", "m", "--prompts", "p", "--out", "o", "--density", "nan"], "--density nan"),
        (["search", "m", "--prompts", "p", "--out", "o", "--steps", "0"], "--steps 0: it must be at least 1"),
        (["search", "m", "--prompts", "p", "--out", "o", "--seed", "-1"], "--seed -1: it must be at least 0"),
        (["search", "m", "--prompts", "p", "--out", "o", "--validate", "-1"], "--validate -1: it must be at least 0"),
        (["search", "m", "--prompts", "p", "--out", "o", "--samples", "0"], "--samples 0: it must be at least 1"),
        (["search", "m", "--prompts", "p", "--out", "o", "--trace-prompts", "0"], "--trace-prompts 0: it must be"),
        (["search", "m", "--prompts", "p", "--out", "o", "--guidance-scale", "-2"], "--guidance-scale -2.0"),
        (["eval", "m", "p", "--prompts", "f", "--true-cfg-scale", "-2"], "--true-cfg-scale -2.0: it must be at least"),
        (["eval", "m", "p", "--prompts", "f", "--seeds", "0"], "--seeds 0: it must be at least 1"),
        (["eval", "m", "p", "--prompts", "f", "--first-seed", "-3"], "--first-seed -3"),
        (["eval", "m", "p", "--prompts", "f", "--num-frames", "-1"], "--num-frames -1"),
        (["search", "m", "--prompts", "/no/such/file", "--out", "o"], "no prompts file at '/no/such/file'"),
        (["show", "/no/such/plan"], "no plan at '/no/such/plan'"),
        (
            ["show", "window", "--grid", "5,32"],
            "three integers T,H,W in latent tokens, for example 5,32,32; got '5,32'",
        ),
        (["show", "window", "--grid", "0,3,3"], "must be an integer of at least 1"),
        (["show", "window", "--phase", "1", "--grid", "3,8,8"], "--phase 1: the plan has phases 0 to 0"),
        (["show", "window", "--png", "x.png"], "give --grid T,H,W"),
        (["show", "window", "--grid", "3,8,8", "--png", "x.gif"], "must end in .png"),
        (["show", "window", "--grid", "3,8,8", "--png", "/proc/none/x.png"], "choose another --png"),
        (["show", "window", "--html", "x.html"], "give --grid T,H,W"),
        (["show", "window", "--grid", "3,8,8", "--html", "x.png"], "must end in .html"),
        (["show", "window", "--grid", "3,8,8", "--html", "/proc/none/x.html"], "choose another --html"),
        (["explain", "window"], "the size is not known: give --height"),
        (["explain", "window", "--height", "480", "--width", "832"], "how many pixels a token covers"),
        (["explain", "window", "--height", "0"], "--height 0: it must be at least 1"),
        (["explain", "window", "--grid", "3,8,8", "--width", "64"], "--grid and --width both give the size"),
        (["explain", "window", "--model-shape", "NoModel"], "neither a folder nor a transformer class that is known"),
        (["explain", "window", "--model-shape", "WanTransformer3DModel", "--height", "481"], "for example 480 or 496"),
        (["explain", "window", "--model-shape", "WanTransformer3DModel", "--num-frames", "80"], "4k+1 frames"),
        (["explain", "window", "--model-shape", "FluxTransformer2DModel", "--num-frames", "5"], "makes images"),
        (["explain", "window", "--model-shape", "WanAnimateTransformer3DModel"], "does not tell the grid of others"),
        (["explain", "window", "--model-shape", "tests"], "no model_index.json"),
        (["explain", "window", "--grid", "3,8,8", "--backend", "warp"], "unknown backend 'warp'"),
        (["explain", "window", "--grid", "3,8,8", "--dtype", "float8"], "unknown dtype 'float8'"),
        (["bench", "kernels", "--density", "2"], "--density '2': a list of shares"),
        (["bench", "kernels", "--block-size", "77"], "--block-size 77: it is one of 64, 128"),
        (["bench", "kernels", "--tail", "long"], "--tail 'long': it is one of none, mean, moments, centroids"),
        (["bench", "kernels", "--device", "toaster"], "unknown device 'toaster'; use auto, cpu, cuda"),
        (["bench", "kernels", "--device", "meta"], "device 'meta' is not here"),
        (["bench", "kernels", "--dtype", "float8"], "unknown dtype 'float8'; use one of auto, float32"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments(cli: Cli, arguments: list[str], message: str) -> None:
    assert message in refused(cli, *arguments)


def test_a_gpu_that_is_not_there(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "use --device cpu, or see `diffsparse env`" in refused(cli, "bench", "kernels", "--device", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "there are 2 GPUs, cuda:0 to cuda:1" in refused(cli, "bench", "kernels", "--device", "cuda:2")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no prompt"), (b"\n # none\n\n", "holds no prompt"), (b"\xff\xfe\x00", "not UTF-8")],
)
def test_prompt_files(cli: Cli, tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    assert message in refused(cli, "search", "m/m", "--prompts", file, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_prompts_are_read(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffeins\r\n\n# no\n  zwei \neins\n".encode())
    assert load.read_prompts(file) == ["eins", "zwei"]


def test_models_that_cannot_be(cli: Cli, tmp_path: Path, prompts_file: Path) -> None:
    def message(model: object) -> str:
        return refused(cli, "search", model, "--prompts", prompts_file, "--out", tmp_path / "out")

    assert "no model at './nowhere'" in message("./nowhere")
    assert "is a file; name a diffusers pipeline's folder" in message(prompts_file)
    folder = tmp_path / "model"
    folder.mkdir()
    assert "no model_index.json" in message(folder)
    (folder / "model_index.json").write_text("{")
    assert "is not valid JSON" in message(folder)
    (folder / "model_index.json").write_text("{}")
    assert "names no pipeline class" in message(folder)
    (folder / "model_index.json").write_text('{"_class_name": "WanPipeline", "vae": ["diffusers", "AutoencoderKLWan"]}')
    assert "cannot be loaded" in message(folder)


def test_a_model_without_a_known_transformer(cli: Cli, tmp_path: Path, prompts_file: Path) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",), layers_per_block=1,
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "unet")
    line = refused(cli, "search", tmp_path / "unet", "--prompts", prompts_file, "--out", tmp_path / "out")
    assert "DDPMPipeline cannot run sparse attention: its UNet2DModel is not suited: it is a U-Net" in line


def test_damaged_weights(cli: Cli, tmp_path: Path, pipe: Any, prompts_file: Path) -> None:
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"torn")
    line = refused(cli, "search", tmp_path / "model", "--prompts", prompts_file, "--out", tmp_path / "out")
    assert "cannot be loaded" in line


@pytest.mark.usefixtures("once_loaded")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-frames", "10"], "--num-frames 10: this model takes 4k+1 frames, for example 9 or 13"),
        (["--num-frames", "3"], "for example 1 or 5"),
        (["--height", "50"], "--height 50: this model takes multiples of 16, for example 48 or 64"),
        (["--width", "8"], "--width 8: this model takes multiples of 16, for example 16 or 32"),
        (["--backend", "warp"], "unknown backend 'warp'; use auto, "),
    ],
)
def test_what_the_model_cannot_take(
    cli: Cli, arguments: list[str], message: str, model_folder: Path, plan_folder: Path, prompts_file: Path
) -> None:
    assert message in refused(cli, "eval", model_folder, plan_folder, "--prompts", prompts_file, *arguments)


def test_a_backend_that_cannot_run(
    cli: Cli, model_folder: Path, prompts_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffsparse.kernels.available_backends", lambda: {"triton": "no GPU"})
    line = refused(cli, "eval", model_folder, "window", "--prompts", prompts_file, "--backend", "triton")
    assert "backend 'triton' cannot run here: no GPU" in line


def test_an_image_model_makes_no_frames() -> None:
    from types import SimpleNamespace

    from diffsparse.search.load import ShapeRule, check_shape

    rule = ShapeRule(16, 16, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "shape_rule", lambda pipe: rule)
        check_shape(SimpleNamespace(), 32, 32, None)
        with pytest.raises(BadInput, match="makes images; leave it out"):
            check_shape(SimpleNamespace(), 32, 32, 5)


@pytest.mark.usefixtures("once_loaded")
def test_plans_that_do_not_fit(cli: Cli, tmp_path: Path, model_folder: Path, prompts_file: Path) -> None:
    def message(plan: Path) -> str:
        return refused(cli, "eval", model_folder, plan, "--prompts", prompts_file, *SHAPE_OPTIONS)

    other = make_plan(layers=3, heads=4).save_pretrained(tmp_path / "other")
    line = message(other)
    assert "the plan is for another model" in line and "heads: the plan has 4, the model 2" in line
    assert "layers: the plan has 3, the model 2" in line
    torn = make_plan().save_pretrained(tmp_path / "torn")
    file = torn / "sparse_plan.json"
    file.write_text(file.read_text()[:200])
    assert "is not valid JSON" in message(torn)
    file.unlink()
    assert "it has no sparse_plan.json" in message(torn)
    assert "neither a folder nor a plan" in refused(cli, "show", "no-such-owner/no-such-plan")


def test_a_folder_that_cannot_be_written(cli: Cli, model_folder: Path, prompts_file: Path) -> None:
    out = prompts_file / "below-a-file"
    line = refused(cli, "search", model_folder, "--prompts", prompts_file, "--out", out)
    assert "choose another --out" in line
    line = refused(cli, "eval", model_folder, "window", "--prompts", prompts_file, "--out", out)
    assert "choose another --out" in line


def test_an_error_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(load, "load_plan", fail)
    with pytest.raises(ZeroDivisionError, match="a defect"):
        main(["show", "window"])


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["search", "m/m", "--prompts", "p", "--out", "o"], "run the same command again to go on"),
        (["eval", "m/m", "window", "--prompts", "p"], "run the command again"),
    ],
)
def test_interrupted(cli: Cli, arguments: list[str], hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("diffsparse.search.inputs.read_inputs", interrupt)
    code, out, err = cli(*arguments)
    assert (code, out, err.count("\n")) == (130, "", 1)
    assert err.startswith("interrupted: ") and hint in err


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("once_loaded")
def test_search_passes_on_what_was_asked(
    cli: Cli, tmp_path: Path, model_folder: Path, prompts_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def search_plan(pipe: Any, prompts: Any, config: Any, out: Path, **options: Any) -> Any:
        print("a library prints this")
        seen.append((prompts, config, out))
        return make_plan()

    monkeypatch.setattr("diffsparse.search.search.search_plan", search_plan)
    common = ["search", model_folder, "--prompts", prompts_file, "--out", tmp_path / "plan", *SHAPE_OPTIONS]
    code, out, err = cli(
        *common, "--density", "0.3", "--seed", "7", "--guidance-scale", "4", "--validate", "0", "--json"
    )
    assert code == 0 and "a library prints this" in err
    data = json.loads(out)
    assert data["plan"] == str(tmp_path / "plan") and len(data["layers"]) == 4
    prompts, config, folder = seen[0]
    assert [one.name for one in prompts] == PROMPTS and folder == tmp_path / "plan"
    assert (config.budget, config.density, config.seed, config.guidance_scale) == (None, 0.3, 7, 4.0)
    assert (config.height, config.width, config.num_frames, config.steps) == (48, 48, 9, 2)
    code, out, _ = cli(*common)
    assert code == 0 and f"diffsparse eval {model_folder} {tmp_path / 'plan'}" in out
    assert (seen[1][1].budget, seen[1][1].density) == (None, None)
    assert (seen[1][1].goal, seen[1][1].clips, seen[1][1].tries) == (0.95, 2, 4)
    assert (config.goal, config.clips) == (None, 0)
    assert cli(*common, "--target", "0.8", "--points", "6", "--validate", "3")[0] == 0
    assert (seen[2][1].goal, seen[2][1].clips, seen[2][1].points) == (0.8, 3, 6)
    assert cli(*common, "--budget", "0.3")[0] == 0
    assert (seen[3][1].goal, seen[3][1].budget, seen[3][1].clips) == (None, 0.3, 1)


@pytest.mark.usefixtures("once_loaded")
def test_a_folder_with_another_search(
    cli: Cli, tmp_path: Path, model_folder: Path, prompts_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffsparse.search.store import StoreMismatch

    def search_plan(*args: Any, **kwargs: Any) -> None:
        raise StoreMismatch("the folder holds\nanother search")

    monkeypatch.setattr("diffsparse.search.search.search_plan", search_plan)
    line = refused(cli, "search", model_folder, "--prompts", prompts_file, "--out", tmp_path, *SHAPE_OPTIONS)
    assert "the folder holds another search" in line


@pytest.mark.usefixtures("once_loaded")
def test_eval_takes_sizes_from_the_plan_and_writes_files(
    cli: Cli, tmp_path: Path, model_folder: Path, plan_folder: Path, prompts_file: Path
) -> None:
    code, out, err = cli(
        "eval", model_folder, plan_folder, "--prompts", prompts_file, "--seeds", 1, "--out", tmp_path, "--json"
    )
    assert code == 0, err
    data = json.loads(out)
    assert data["settings"] == {
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "height": 48,
        "width": 48,
        "num_frames": 9,
        "negative_prompt": None,
        "true_cfg_scale": None,
    }
    assert [c["prompt"] for c in data["clips"]] == PROMPTS and {c["seed"] for c in data["clips"]} == {1000}
    assert data["other_seed_psnr"] is not None and 0 < data["trajectory_density"] < 1
    names = {Path(f).name for f in data["files"]}
    assert {"eval.json", "contact_sheet.png", "clip_00.mp4", "clip_01.mp4"} == names
    assert all(Path(f).stat().st_size > 500 for f in data["files"])


@pytest.mark.usefixtures("once_loaded")
def test_eval_fails_on_broken_clips(
    cli: Cli, model_folder: Path, prompts_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffsparse.search import metrics

    monkeypatch.setattr(metrics, "find_defects", lambda clip, reference=None: [] if reference is None else ["frozen"])
    code, out, err = cli("eval", model_folder, "window", "--prompts", prompts_file, "--seeds", 1, *SHAPE_OPTIONS)
    assert code == 1
    assert f"BROKEN: sparse clip of {PROMPTS[0]!r}, seed 1000: frozen" in out
    last = err.strip().splitlines()[-1]
    assert last == f"failed: sparse clip of {PROMPTS[0]!r}, seed 1000: frozen, and 1 more"


def test_env(cli: Cli) -> None:
    code, out, _ = cli("env")
    assert code == 0 and "attention backends" in out and f"torch{' ' * 12}{torch.__version__}" in out
    data = json.loads(cli("env", "--json")[1])
    assert data["backends"]["reference"] is None and data["packages"]["diffusers"]
    assert data["backend_ways"] == backend_ways() and "kernel" in data["backend_ways"]["cpu"]
    assert f"available: {data['backend_ways']['cpu']}" in " ".join(out.split())


def test_bench(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffsparse.search.bench._seconds", lambda function: function() is None or 0.5)
    arguments = ["bench", "kernels", "--grid", "2,8,8", "--heads", "2", "--head-dim", "32", "--density", "0.5,1"]
    data = json.loads(cli(*arguments, "--device", "cpu", "--json")[1])
    assert [r["backend"] for r in data["sparse"]].count("cpu") == 2
    assert data["sparse"][-1]["density"] == 1.0 and "reference" not in str(data["sparse"])
    assert "dense: flash_attention" in cli(*arguments, "--device", "cpu")[1]


def test_bench_break_even(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFSPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("diffsparse.search.break_even.DENSITIES", (0.5, 1.0))
    arguments = ["bench", "break-even", "--heads", "1", "--head-dim", "16", "--block-size", "64", "--device", "cpu"]
    code, out, err = cli(*arguments, "--tokens", "128,256", "--out", tmp_path / "a" / "table.json")
    assert code == 0, err
    assert "share of kept blocks up to which sparse attention is faster" in out and "256 tokens: dense" in err
    assert json.loads((tmp_path / "a" / "table.json").read_text())["tables"][0]["tokens"] == [128, 256]
    assert not list((tmp_path / "cache").rglob("*.json"))  # a compiled kernel may be there
    data = json.loads(cli(*arguments, "--tokens", "128", "--json")[1])
    assert Path(data["file"]).is_relative_to(tmp_path / "cache") and data["about"]["command"].startswith("diffsparse")
    assert "--tokens '2,1': a rising list" in refused(cli, *arguments, "--tokens", "2,1")
    assert "--block-size 77: it is one of 64, 128" in refused(cli, "bench", "break-even", "--block-size", "77")


def test_show_writes_the_page_and_the_table_is_plain_where_it_is_piped(
    cli: Cli, tmp_path: Path, plan_folder: Path
) -> None:
    page = tmp_path / "deep" / "plan.html"
    code, out, err = cli("show", plan_folder, "--html", page, "--phase", 1)
    assert code == 0, err
    assert f"written: {page}" in out and "\x1b" not in out
    assert '"start":1' in page.read_text("utf-8")
    data = json.loads(cli("show", plan_folder, "--html", page, "--json")[1])
    assert data["html"] == str(page) and '"start":0' in page.read_text("utf-8")


def test_show_tells_the_errors_that_a_search_recorded(cli: Cli, tmp_path: Path) -> None:
    from tests.search.plans import with_attention

    plan = make_plan()
    folder = plan.save_pretrained(tmp_path / "plan")
    assert json.loads(cli("show", folder, "--json")[1])["layers"][0]["error"] is None
    with_attention(folder, plan, figures=True)
    assert "mean (worst head)" in cli("show", folder)[1]
    rows = json.loads(cli("show", folder, "--json")[1])["layers"]
    assert all(0 < row["error"] <= row["worst_error"] and 0 < row["kept_mass"] < 1 for row in rows)
    assert json.loads(cli("show", folder, "--grid", "3,16,9", "--json")[1])["layers"][0]["error"] is None


def test_explain(cli: Cli, plan_folder: Path, model_folder: Path) -> None:
    code, out, err = cli("explain", plan_folder)
    assert code == 0, err
    assert "432 (3x12x12)" in out and "no predicted times" in out
    code, out, err = cli("explain", plan_folder, "--height", 64, "--model-shape", model_folder, "--json")
    assert code == 0, err
    data = json.loads(out)
    assert data["grid"] == "3x16x12" and data["model_class"] == "WanTransformer3DModel"
    assert [layer["layer"] for layer in data["layers"]] == ["blocks.0.attn1", "blocks.1.attn1"]
    assert "heads: the plan has 4, the model 2" in refused(
        cli, "explain", make_plan(heads=4).save_pretrained(plan_folder.parent / "four"), "--model-shape", model_folder
    )
