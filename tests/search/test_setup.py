"""``--lora``, ``--scheduler``, ``--offload`` and ``--quantize``: set up, searched so, and written down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from diffsparse.search import load
from diffsparse.search.errors import BadInput
from diffsparse.search.identity import model_identity
from diffsparse.search.setup import Lora, Setup
from tests.search.tiny import PROMPTS, SHAPE, SHAPE_OPTIONS, Cli, build_pipeline, fix_costs

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def lora_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA weights for the tiny pipeline, as a trainer writes them."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = build_pipeline()
    torch.manual_seed(1)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    folder = tmp_path_factory.mktemp("lora")
    pipe.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    return next(folder.glob("*.safetensors"))


def loaded(model_folder: Path, **options: Any) -> Any:
    return load.load_pipeline(str(model_folder), device=CPU, dtype=torch.float32, setup=Setup.parse(**options))


def latents(pipe: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe(PROMPTS[0], num_inference_steps=2, generator=generator, output_type="latent", **SHAPE).frames


# -- what each does ----------------------------------------------------------------------------------------------------


def test_lora_by_its_weight(model_folder: Path, lora_file: Path) -> None:
    plain = latents(loaded(model_folder))
    pipes = [loaded(model_folder, loras=[f"{lora_file}{weight}"]) for weight in ("", ":0.5", ":0")]
    whole, half, none = (latents(pipe) for pipe in pipes)
    assert not torch.equal(whole, plain) and not torch.equal(half, whole)
    assert (none - plain).abs().max() <= 1e-5
    # A record is of one weight.
    assert len({model_identity(pipe)["weights"] for pipe in pipes}) == 3
    twice = loaded(model_folder, loras=[f"{lora_file}:0.25", f"{lora_file}:0.25"])
    assert (latents(twice) - half).abs().max() <= 1e-4


def test_int8(model_folder: Path, lora_file: Path) -> None:
    plain, found = latents(loaded(model_folder)), loaded(model_folder, quantize="int8")
    weight = found.transformer.blocks[0].attn1.to_q.weight
    assert hasattr(weight, "__tensor_flatten__")
    small = latents(found)
    assert not torch.equal(small, plain) and (small - plain).norm() < 0.2 * plain.norm()
    both = loaded(model_folder, quantize="int8", loras=[str(lora_file)])
    assert not torch.equal(latents(both), small)
    assert not hasattr(both.transformer.blocks[0].attn1.to_q.lora_A["lora_0"].weight, "__tensor_flatten__")


@pytest.mark.parametrize("offload", ["model", "group"])
def test_offloading_changes_no_value(model_folder: Path, offload: str) -> None:
    found, plain = latents(loaded(model_folder, offload=offload)), latents(loaded(model_folder))
    assert (found - plain).abs().max() <= 1e-5  # tensors at other addresses may be summed up in another order


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "UniPC", "unipc"])
def test_a_scheduler_of_flow_matching(model_folder: Path, name: str) -> None:
    pipe = loaded(model_folder, scheduler=name)
    assert type(pipe.scheduler) is UniPCMultistepScheduler
    assert pipe.scheduler.config.use_flow_sigmas and pipe.scheduler.config.flow_shift == 3.0
    assert torch.isfinite(latents(pipe)).all()
    pipe.scheduler.register_to_config(flow_shift=5.0)
    Setup.parse(scheduler="FlowMatchEuler").apply(pipe, CPU)
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler and pipe.scheduler.config.shift == 5.0


# -- a search and an evaluation ----------------------------------------------------------------------------------------


def test_the_plan_says_how_the_model_was_set_up(
    cli: Cli, model_folder: Path, prompts_file: Path, lora_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fix_costs(monkeypatch)
    setup = ["--lora", f"{lora_file}:0.5", "--scheduler", "UniPC", "--offload", "model", "--quantize", "int8"]
    few = ["--density", 0.7, "--trace-prompts", 1, "--samples", 1, "--validate", 0, "--no-repair", *SHAPE_OPTIONS]
    out = tmp_path / "plan"
    code, _, err = cli("search", model_folder, "--prompts", prompts_file, "--out", out, *setup, *few)
    assert code == 0, err
    model = load.load_plan(str(out)).record["model"]
    assert model["pipeline"] == "WanPipeline" and model["scheduler"] == "UniPCMultistepScheduler"
    assert (model["offload"], model["quantize"]) == ("model", "int8")
    (lora,) = model["lora"]
    assert (lora["file"], lora["weight"], len(lora["sha256"])) == (lora_file.name, 0.5, 64)
    run = ["eval", model_folder, out, "--prompts", prompts_file, "--seeds", 1, "--json"]
    code, text, err = cli(*run, *setup)
    assert code == 0 and "searched with another" not in err and json.loads(text)["clips"]
    assert "the plan was searched with another lora and another quantize than it" in cli(*run, *setup[2:4])[2]
    line = cli("search", model_folder, "--prompts", prompts_file, "--out", out, *setup[2:], *few)[2]
    assert "weights" in line.splitlines()[-1]  # it is the record of another model


def test_a_plan_that_was_not_searched_says_nothing() -> None:
    assert Setup().differs({}) is None and Setup().differs({"model": {"pipeline": "WanPipeline"}}) is None
    assert Setup(quantize="int8").differs({"model": {"pipeline": "WanPipeline"}}) is not None


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lora", "none.safetensors"], "--lora none.safetensors: no file at 'none.safetensors'; give a .safetensors"),
        (["--lora", "none.safetensors:0.5"], "no file at 'none.safetensors'"),
        (["--lora", "none.safetensors:much"], "the weight after the colon is a number, as 0.8, got 'much'"),
        (["--scheduler", "UniPCC"], "--scheduler UniPCC: diffusers has none of this name; "),
        (["--scheduler", "Solver"], "--scheduler Solver: diffusers has none of this name; "),
        (["--offload", "disk"], "--offload disk: use one of none, model, group"),
        (["--quantize", "int4"], "--quantize int4: use one of none, int8"),
    ],
)
def test_wrong_names_are_one_line(
    cli: Cli, prompts_file: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    for command in (["search", "no/model", "--out", tmp_path / "out"], ["eval", "no/model", "window"]):
        code, out, err = cli(*command, "--prompts", prompts_file, *options)
        assert (code, out, err.count("\n")) == (2, "", 1) and message in err, err
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_lora(model_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    broken, other = tmp_path / "broken.safetensors", tmp_path / "other.safetensors"
    broken.write_bytes(b"no tensors")
    save_file({"transformer.nowhere.lora_A.weight": torch.ones(2, 4)}, other)
    for file in (broken, other):
        with pytest.raises(BadInput, match=f"--lora {file}: ") as caught:
            loaded(model_folder, loras=[str(file)])
        assert "\n" not in str(caught.value)
    strange = tmp_path / "a:b"
    strange.write_bytes(b"")
    assert Lora.parse(str(strange)) == Lora(strange) and Lora.parse(f"{strange}:2") == Lora(strange, 2.0)
    with pytest.raises(BadInput, match=r"the weight is a number, as 0\.8, got 'nan'"):
        Lora.parse(f"{strange}:nan")


def test_a_scheduler_of_another_kind() -> None:
    pipe = build_pipeline()
    with pytest.raises(BadInput, match="--scheduler DDIMScheduler: this model is of flow matching, which it does not"):
        Setup.parse(scheduler="DDIM").apply(pipe, CPU)
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(BadInput, match="FlowMatchEulerDiscreteScheduler: this model is of no flow matching, which"):
        Setup.parse(scheduler="FlowMatchEuler").apply(pipe, CPU)


def test_packages_that_are_not_here(monkeypatch: pytest.MonkeyPatch, lora_file: Path) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(BadInput, match=r"--quantize int8: needs the package torchao .*: pip install torchao"):
        Setup.parse(quantize="int8")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(BadInput, match=r"--lora .*: needs the package peft: pip install peft"):
        Setup.parse(loras=[str(lora_file)])


def test_the_output_projection_of_weights_in_8_bits(model_folder: Path) -> None:
    from diffsparse.search.projection import output_projection

    small = loaded(model_folder, quantize="int8").transformer
    found = output_projection(small, "blocks.0.attn1")
    want = small.blocks[0].attn1.to_out[0].weight.dequantize()
    assert found is not None and (found - want).abs().max() <= 1e-5
