"""What a search reads of a running pipeline: every guidance branch, every expert by its own weights, every step."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from diffsparse.grid import TokenGrid
from diffsparse.order import TokenOrder
from diffsparse.pipelines import sparse_attention, tap_attention
from diffsparse.search.errors import BadInput
from diffsparse.search.generate import GenerationSettings
from diffsparse.search.layers import common_architecture, merged_grid, switch_level
from diffsparse.search.observe import Tracer, final_latents, first_step, record, replaying, watched_updates
from diffsparse.search.scored import CallScores
from diffsparse.search.search import SearchConfig, search_plan
from diffsparse.search.steps import StepCounter
from tests.pipelines.models import wan
from tests.search import zoo


class Kept:
    """Means over a step's calls of every head's errors and energies: ``steps[s][layer]``."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, dict[str, np.ndarray]]] = {}
        self.calls: Counter[tuple[int, str, int]] = Counter()

    def wants(self, step: int, layer: str) -> bool:
        return True

    def add(
        self, step: int, layer: str, order: TokenOrder, heads: Sequence[int], scores: CallScores, items: int
    ) -> None:
        arrays = self.steps.setdefault(step, {}).setdefault(layer, {})
        for i, head in enumerate(heads):
            self.calls[step, layer, head] += items
            share = items / self.calls[step, layer, head]
            for name, new in (("error", scores.error[:, i].numpy()), ("energy", scores.energy[i].numpy())):
                old = arrays.get(f"{name}{head}", 0.0 * new)
                arrays[f"{name}{head}"] = old + share * (new - old)

    def add_drift(self, step: int, layer: str, drift: np.ndarray) -> None:
        self.steps[step][layer] |= {f"drift{head}": value for head, value in enumerate(drift)}

    def flush(self) -> None:
        pass


def traced(pipe: Any, prompt: str, settings: GenerationSettings) -> tuple[Tracer, Kept]:
    kept = Kept()
    tracer = Tracer(pipe, 64, 0, 4, branches=2, sink=kept)
    record(pipe, prompt, 0, settings, tracer)
    assert {step: set(layers) for step, layers in kept.steps.items()} == tracer.steps
    return tracer, kept


def step_0(pipe: Any, prompt: str, settings: GenerationSettings) -> dict[str, np.ndarray]:
    layers = traced(pipe, prompt, settings)[1].steps[0]
    return {f"{layer}/{name}": array for layer, arrays in layers.items() for name, array in arrays.items()}


def differ(one: dict[str, np.ndarray], other: dict[str, np.ndarray], names: tuple[str, ...]) -> bool:
    """Whether all arrays of these names do."""
    found = [key for key in one if key.split("/")[1].startswith(names)]
    assert found and one.keys() == other.keys()
    return all(not np.allclose(one[key], other[key], rtol=1e-3, atol=0) for key in found)


@pytest.mark.parametrize("guided", ["in one batch, the negative prompt first", "in two calls"])
def test_the_prompt_and_the_negative_prompt_both_count_at_step_0(guided: str) -> None:
    """The latent is the same noise for all: only the texts differ."""
    in_one = guided.startswith("in one")
    pipe = zoo.sd35() if in_one else zoo.qwenimage()
    common: dict[str, Any] = {**zoo.IMAGE, "guidance_scale": 4.0} | ({} if in_one else {"true_cfg_scale": 4.0})
    settings = GenerationSettings(2, negative_prompt="a dog", **common)
    first = step_0(pipe, "a red circle", settings)
    again = step_0(pipe, "a red circle", settings)
    assert all(np.array_equal(first[key], again[key], equal_nan=True) for key in first)
    # Layers without text do not see it before the second layer.
    seen = tuple(f"{name}{head}" for name in ("error", "energy") for head in range(3))
    joint = {k: v for k, v in first.items() if "attn2" not in k}
    for prompt, negative in (("a blue square", "a dog"), ("a red circle", "two cats")):
        other = step_0(pipe, prompt, GenerationSettings(2, negative_prompt=negative, **common))
        assert differ(joint, {k: other[k] for k in joint}, seen), (prompt, negative)


def test_every_expert_is_scored_through_its_own_projection() -> None:
    pipe = zoo.wan_experts()
    dead = {"transformer": 0, "transformer_2": 1}
    for name, head in dead.items():
        for block in getattr(pipe, name).blocks:
            block.attn1.to_out[0].weight.data[:, 16 * head : 16 * head + 16] = 0
    tracer, kept = traced(pipe, "a red circle", GenerationSettings(4, 3.0, **zoo.VIDEO))
    experts = [sorted(tracer.parts[step]) for step in range(4)]
    assert experts[0] == ["transformer"] and experts[-1] == ["transformer_2"]
    for step, (expert,) in enumerate(experts):
        for arrays in kept.steps[step].values():
            energy = [float(arrays[f"energy{head}"]) for head in range(3)]
            assert [e < 1e-9 for e in energy] == [head == dead[expert] for head in range(3)], (expert, energy)


def test_no_head_is_left_out_that_one_of_the_experts_needs(tmp_path: Path) -> None:
    """Head 0 puts out nothing in the first expert and head 1 in the second: with those left out all else has room."""
    pipe = zoo.wan_experts()
    for name, head in (("transformer", 0), ("transformer_2", 1)):
        for block in getattr(pipe, name).blocks:
            block.attn1.to_out[0].weight.data[:, 16 * head : 16 * head + 16] = 0
    settings: dict[str, Any] = {"guidance_scale": 3.0, **zoo.VIDEO}
    config = SearchConfig(
        budget=None, density=0.69, steps=4, trace_steps=4, samples=2, trace_prompts=1, validation_prompts=0, **settings
    )
    plan = search_plan(pipe, ["a red circle"], config, tmp_path, progress=False, say=lambda line: None)
    skipped = 0
    experts: dict[float, str] = {}
    with torch.no_grad(), tap_attention(pipe, lambda call: experts.update({call.noise_level: call.transformer})):
        dense = final_latents(pipe, "a blue square", 1, GenerationSettings(4, **settings))
    for level, expert in experts.items():
        phase = plan.schedule.phase(level)
        for layer in plan.layers if phase is not None else ():
            entries = plan.layer_entries(phase, layer, 3)
            assert entries is not None
            left_out = {head for head in range(3) if entries[head].execution.mode == "skip"}
            assert left_out <= {0 if expert == "transformer" else 1}, (level, expert, layer, left_out)
            skipped += len(left_out)
    assert skipped >= 4
    with sparse_attention(pipe, plan, backend="reference"):
        sparse = final_latents(pipe, "a blue square", 1, GenerationSettings(4, **settings))
    assert (sparse - dense).abs().max() < 1e-3 * dense.abs().max()


def test_experts_of_different_shapes_are_refused() -> None:
    pipe = zoo.wan_experts()
    pipe.register_modules(transformer_2=wan(1, 3))
    with pytest.raises(BadInput, match=r"transformer and transformer_2 of WanPipeline differ \(.*layers"):
        common_architecture(pipe)


def call(forward: int, level: float, layer: str = "blocks.0.attn1", grid: TokenGrid | None = None) -> Any:
    return SimpleNamespace(forward=forward, noise_level=level, layer=layer, grid=grid or TokenGrid(1, 8, 8))


def test_steps_are_told_by_forwards_whichever_layer_runs_first() -> None:
    counter = StepCounter()
    levels = [(0, 1.0), (1, 1.0), (2, 0.6), (3, 0.6), (4, 0.3), (5, 0.3)]
    found = [counter.update(call(f, level, layer)) for f, level in levels for layer in ("control.0", "blocks.0")]
    assert found == [0] * 4 + [1] * 4 + [2] * 4
    assert counter.levels == [1.0, 0.6, 0.3] and counter.calls == 2 and counter.changes == 2


def test_sections_of_a_long_clip_come_back_to_their_steps() -> None:
    counter = StepCounter()
    found = [counter.update(call(i, level)) for i, level in enumerate([1.0, 0.6, 0.3] * 2)]
    assert found == [0, 1, 2, 0, 1, 2] and counter.calls == 1 and counter.changes == 5
    with pytest.raises(BadInput, match=r"goes from 0\.300 up to 0\.800"):
        counter.update(call(6, 0.8))


def test_calls_of_a_layer_may_differ_in_text_alone() -> None:
    short, long = TokenGrid(1, 8, 8, text_before=7), TokenGrid(1, 8, 8, text_before=9)
    assert merged_grid(None, call(0, 1.0, grid=short)) == short
    assert merged_grid(short, call(0, 1.0, grid=long)) == long == merged_grid(long, call(0, 1.0, grid=short))
    with pytest.raises(BadInput, match=r"blocks\.0\.attn1 attends on grids of 1x8x8 and of 1x4x4 tokens"):
        merged_grid(short, call(0, 1.0, grid=TokenGrid(1, 4, 4)))


def test_the_first_step_is_seen_of_a_generation_of_several() -> None:
    """Mochi cannot make a schedule of one step. Both items of a batch are seen, each with its own text."""
    pipe, grids = zoo.mochi(), []
    settings = GenerationSettings(3, 3.0, **{**zoo.VIDEO, "num_frames": 13})
    assert first_step(pipe, "a red circle", 0, settings, lambda seen: grids.append(seen.grid)) == {}
    assert [grid.text_after for grid in grids] == [7, 9] * 2  # the negative prompt is empty; the room is 9
    assert "step" not in pipe.scheduler.__dict__


def test_a_copy_of_the_scheduler_steps_itself_while_the_original_is_watched() -> None:
    """Pipelines with sound step a deep copy of the scheduler for it."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe: Any = SimpleNamespace(scheduler=FlowMatchEulerDiscreteScheduler())
    seen: list[torch.Tensor] = []
    with watched_updates(pipe, seen.append):
        own, copied = pipe.scheduler, copy.deepcopy(pipe.scheduler)
        for scheduler in (own, copied):
            scheduler.set_timesteps(4)
        prediction, latents = torch.ones(1, 4), torch.zeros(1, 4)
        first = own.step(prediction, own.timesteps[0], latents, return_dict=False)[0]
        second = copied.step(2 * prediction, copied.timesteps[0], latents, return_dict=False)[0]
        assert (own.step_index, copied.step_index) == (1, 1)
        assert torch.equal(second, 2 * first) and [float(x[0, 0]) for x in seen] == [1.0]
        assert "generator" in inspect.signature(own.step).parameters
        own.step(model_output=prediction, timestep=own.timesteps[1], sample=first)
        assert len(seen) == 2
    assert type(own) is FlowMatchEulerDiscreteScheduler
    own.step(prediction, own.timesteps[2], latents)
    assert len(seen) == 2


def test_where_another_expert_takes_over() -> None:
    levels, parts = [0.9, 0.8, 0.5], [["transformer"], ["transformer"], ["transformer_2"]]
    pipe: Any = SimpleNamespace(config=SimpleNamespace(boundary_ratio=0.6))
    assert switch_level(pipe, levels, parts) == 0.6
    pipe.config.boundary_ratio = None
    assert switch_level(pipe, levels, parts) == pytest.approx(0.65)
    assert switch_level(pipe, levels, [["transformer"]] * 3) is None


def test_what_hooks_make_of_an_output_is_not_made_twice_when_it_is_replayed() -> None:
    pipe = zoo.flux_image()
    handle = pipe.transformer.register_forward_hook(lambda module, args, output: (output[0] * 0.5,))
    settings = GenerationSettings(3, 3.0, **zoo.IMAGE)
    recording = record(pipe, "a red circle", 0, settings, None)
    for until in (recording.first_call(2), 0):
        with replaying(pipe, recording, until):
            assert torch.equal(final_latents(pipe, "a red circle", 0, settings), recording.latents)
    handle.remove()
    assert "forward" not in pipe.transformer.__dict__
