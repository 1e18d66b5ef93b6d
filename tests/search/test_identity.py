"""A record is of one model: weights, precision, scheduler. Another one with the same architecture is told."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from diffsparse.search import search as searches
from diffsparse.search.identity import model_identity
from diffsparse.search.search import SearchConfig, search_plan
from diffsparse.search.store import StoreMismatch
from tests.search.tiny import PROMPTS, SHAPE, build_pipeline

CONFIG = SearchConfig(budget=None, density=0.5, steps=6, trace_steps=4, samples=2, **SHAPE)


@pytest.fixture(scope="module")
def known(pipe: Any) -> dict[str, str]:
    return model_identity(pipe)


def differing(pipe: Any, known: dict[str, str]) -> set[str]:
    return {name for name, value in model_identity(pipe).items() if known[name] != value}


def test_the_same_model_is_the_same_after_a_generation_and_from_a_folder(
    pipe: Any, known: dict[str, str], model_folder: Path
) -> None:
    from diffsparse.search.load import load_pipeline

    assert not differing(build_pipeline(), known)
    loaded = load_pipeline(str(model_folder), device=torch.device("cpu"), dtype=torch.float32)
    assert not differing(loaded, known)
    with torch.no_grad():
        loaded(prompt=PROMPTS[0], num_inference_steps=1, output_type="latent", **SHAPE)
    assert not differing(loaded, known)


def test_what_differs_is_named(pipe: Any, known: dict[str, str]) -> None:
    assert differing(build_pipeline(seed=1), known) == {"weights"}
    for part in ("transformer", "text_encoder", "vae"):
        other = build_pipeline()
        with torch.no_grad():
            for parameter in getattr(other, part).parameters():
                parameter.mul_(1.01)
        assert differing(other, known) == {"weights"}, part
    other = build_pipeline()
    with torch.no_grad():  # one head of one layer
        other.transformer.blocks[1].attn1.to_out[0].weight[:, :32] = 0
    assert differing(other, known) == {"weights"}
    other = build_pipeline()
    other.transformer.to(torch.bfloat16)
    assert differing(other, known) == {"weights", "dtype"}
    for scheduler in (FlowMatchEulerDiscreteScheduler(shift=5.0), UniPCMultistepScheduler()):
        other = build_pipeline()
        other.scheduler = scheduler
        assert differing(other, known) == {"scheduler"}
    other = build_pipeline()
    other.register_to_config(boundary_ratio=0.9)
    assert differing(other, known) == {"pipeline"}


def test_weights_that_are_elsewhere_or_in_parts(pipe: Any, known: dict[str, str]) -> None:
    other = copy.copy(pipe)
    other.transformer = copy.deepcopy(pipe.transformer).to("meta")
    assert differing(other, known) == {"weights"}

    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    found = []
    for seed in (0, 0, 1):
        other = build_pipeline(seed=seed)
        quantize_(other.transformer, Int8WeightOnlyConfig())
        found.append(model_identity(other)["weights"])
    assert found[0] == found[1] and len(set(found)) == 2 and known["weights"] not in found


def test_a_record_of_another_model_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to where the search would begin to measure."""

    class Began(Exception):
        pass

    def begins(search: Any, out: Path, about: Any) -> None:
        raise Began

    monkeypatch.setattr(searches, "_run", begins)

    def search(pipe: Any) -> None:
        search_plan(pipe, PROMPTS, CONFIG, tmp_path, progress=False, say=lambda line: None)

    for _ in range(2):
        with pytest.raises(Began):
            search(build_pipeline())
    with pytest.raises(StoreMismatch, match=r"other settings \(weights\); use the same settings"):
        search(build_pipeline(seed=1))
    other = build_pipeline()
    other.transformer.to(torch.bfloat16)
    with pytest.raises(StoreMismatch, match=r"other settings \(dtype, weights\)"):
        search(other)
    other = build_pipeline()
    other.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    with pytest.raises(StoreMismatch, match=r"other settings \(scheduler\)"):
        search(other)
