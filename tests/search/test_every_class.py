"""A search of two steps with every transformer class that docs/models.md lists as supported.

Through diffusers' own pipeline for the classes in ``zoo.OWN``. The others are searched in a stand-in for theirs: the
real transformer with the arguments of its forward that the tests of families use, and a real scheduler.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffsparse.pipelines import architecture_of, find_transformers, sparse_attention, sparse_attention_summary
from diffsparse.pipelines.matrix import model_rows
from diffsparse.pipelines.policy import DENSE_ENTRIES, FULL
from diffsparse.search.errors import BadInput
from diffsparse.search.observe import final_latents
from diffsparse.search.search import SearchConfig, search_plan
from tests.pipelines.models import CASES
from tests.search import zoo

PROMPTS = ["a red circle", "a blue square on a hill"]
SUPPORTED = sorted(row.model_class for row in model_rows())
#: Searched on each change; the others with the slow tests.
FAST = ("MochiTransformer3DModel", "QwenImageTransformer2DModel", "SD3Transformer2DModel", "WanVACETransformer3DModel")
#: With a history as long as the clip, which is always attended.
DENSER: dict[str, dict[str, Any]] = {"HunyuanVideoFramepackTransformer3DModel": {"density": 0.85}}
#: Classes that cannot be searched, and the line that says so.
REFUSED = {"ChromaTransformer2DModel": "no layer can be searched: a mask that is not a key-padding mask"}


def case_of(model_class: str) -> str:
    """The zoo's case of a class: the first one, by the name of what it builds."""
    return next(name for name, case in CASES.items() if type(case.build()).__name__ == model_class)


def build(model_class: str) -> tuple[Any, dict[str, Any]]:
    """A pipeline for the class, and the arguments of a search with it."""
    if model_class in zoo.OWN:
        make, arguments = zoo.OWN[model_class]
        return make(), arguments
    return zoo.StandIn(CASES[case_of(model_class)]), DENSER.get(model_class, {})


def search(pipe: Any, out: Path, lines: list[str] | None = None, **arguments: Any) -> Any:
    config = SearchConfig(
        **{"budget": None, "density": 0.6, "steps": 2, "trace_steps": 2, "samples": 2, "trace_prompts": 1}
        | {"validation_prompts": 0, "guidance_scale": 3.0, "dense_steps": 0}
        | arguments
    )
    say = (lambda line: None) if lines is None else lines.append
    return search_plan(pipe, PROMPTS, config, out, progress=False, say=say), config


@pytest.fixture(autouse=True)
def _few_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffsparse.search.stages import compose as module

    monkeypatch.setattr(module, "measure_costs", partial(module.measure_costs, seconds=0.0))


@pytest.mark.parametrize(
    "model_class",
    [pytest.param(n, marks=() if n in FAST else pytest.mark.slow(reason="a whole search each")) for n in SUPPORTED],
)
def test_every_supported_class_can_be_searched(model_class: str, tmp_path: Path) -> None:
    pipe, arguments = build(model_class)
    if model_class in REFUSED:
        with pytest.raises(BadInput) as raised:
            search(pipe, tmp_path, **arguments)
        assert REFUSED[model_class] in str(raised.value) and "\n" not in str(raised.value)
        return
    plan, config = search(pipe, tmp_path, **arguments)
    transformers = find_transformers(pipe)
    assert {type(t).__name__ for t in transformers.values()} == {model_class}
    layers = architecture_of(next(iter(transformers.values()))).layers
    assert plan.layers == layers
    assert 0.3 < plan.record["search"]["trajectory_density"] <= config.density
    with sparse_attention(pipe, plan):
        latents = final_latents(pipe, PROMPTS[1], 1, config.settings(2))
        summary = sparse_attention_summary(pipe)
    assert np.isfinite(latents.numpy()).all()
    ran = [layer for part in summary.transformers.values() for layer in part.layers]
    assert {layer.name for layer in ran if layer.sparse_calls}
    # No layer is dense but by the plan's word: its entries fit the grid of every call.
    assert {reason for layer in ran for reason in layer.dense_reasons} <= {DENSE_ENTRIES, FULL}
    # What it was to compute is what it computes, whatever the layers' grids; the texts differ by a few tokens.
    assert summary.density == pytest.approx(plan.record["search"]["trajectory_density"], abs=0.03)


def test_a_pipeline_that_runs_fewer_steps_than_it_is_asked_for(tmp_path: Path) -> None:
    class Hasty(zoo.StandIn):
        """Two steps at most."""

        def __call__(
            self,
            prompt: str,
            num_inference_steps: int = 2,
            guidance_scale: float = 1.0,
            generator: Any = None,
            output_type: str = "latent",
        ) -> Any:
            return super().__call__(prompt, min(num_inference_steps, 2), guidance_scale, generator, output_type)

    plan, _ = search(Hasty(CASES["flux"]), tmp_path, trace_steps=8, trace_prompts=2, steps=4)
    assert plan.record["search"]["of_steps"] == 2


def test_a_generation_of_two_sizes_is_refused(tmp_path: Path) -> None:
    class Growing(zoo.StandIn):
        """The second step is made on a larger grid."""

        def size(self, step: int) -> tuple[int, int, int]:
            return (1, 13, 16) if step == 0 else (1, 16, 16)

    with pytest.raises(BadInput, match=r"attends on grids of 1x13x16 and of 1x16x16 tokens; a search needs one size"):
        search(Growing(CASES["flux"]), tmp_path)
