"""Outputs that are used again over steps: what is taken is what was computed, of the right step, branch and layer."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from diffsparse.entry import Execution, HeadEntry
from diffsparse.kernels import sparse_attention
from diffsparse.patterns import Full, Window
from diffsparse.pipelines import (
    AttentionCall,
    disable_sparse_attention,
    enable_sparse_attention,
    sparse_attention_summary,
    tap_attention,
)
from diffsparse.pipelines.hooks import NOT_TOLD
from diffsparse.pipelines.phases import PhaseFinder
from diffsparse.pipelines.reuse import Group, ReuseStep, ReuseStore
from diffsparse.plan import SparsityPlan
from diffsparse.reuse import computed_steps
from diffsparse.schedule import Schedule
from tests.pipelines.models import generate, mixed_plan, run, wan, wan_inputs, wan_pipeline
from tests.tolerance import GENERATION, assert_near

SCHEDULE = Schedule(sparse_below=0.95, phase_bounds=(0.5,))
STEPS = 10


def reusing(model: torch.nn.Module, *values: float, schedule: Schedule = SCHEDULE) -> SparsityPlan:
    """A plan of many patterns, whose heads have these values of ``reuse`` in turn."""
    plan = mixed_plan(model, schedule)
    places = iter(range(10**6))

    def entry(index: int) -> HeadEntry:
        found, reuse = plan.entries[index], values[next(places) % len(values)]
        return (
            found if found.execution.mode == "skip" else replace(found, execution=replace(found.execution, reuse=reuse))
        )

    table = {
        name: [[entry(i) for i in plan.index[p, j]] for p in range(schedule.num_phases)]
        for j, name in enumerate(plan.layers)
    }
    return SparsityPlan.from_table(table, schedule=schedule, architecture=plan.architecture)


def in_8_bits(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return torch.where(scale > 0, (x / scale).round() * scale, 0.0)


def remembering(plan: SparsityPlan, branches: int = 2) -> Callable[[AttentionCall], torch.Tensor | None]:
    """A tap that does what the plan means: the same kernels, and a list of what every head put out when."""
    kept: dict[tuple[Any, ...], tuple[float, torch.Tensor]] = {}

    def answer(call: AttentionCall) -> torch.Tensor | None:
        phase = plan.schedule.phase(call.noise_level)
        layout = None if phase is None else plan.layout(phase, call.layer, call.q.shape[2], call.grid)
        if layout is None or phase is None:
            return None
        entries = plan.layer_entries(phase, call.layer, call.q.shape[2])
        assert entries is not None
        out = sparse_attention(call.q, call.k, call.v, layout, scale=call.scale, kv_len=call.kv_len)
        for head, entry in enumerate(entries):
            key = (call.transformer, call.layer, call.forward % branches, phase, head)
            level, before = kept.get(key, (9.0, out))
            if 0 <= level - call.noise_level < entry.execution.reuse:
                out[:, :, head] = before
            elif entry.execution.reuse:
                kept[key] = (call.noise_level, in_8_bits(out[:, :, head]))
        return out

    return answer


@pytest.mark.parametrize("values", [(0.2,), (0.0, 0.15), (0.3, 0.15, 1.0)])
def test_a_generation_is_what_the_plan_means(values: tuple[float, ...]) -> None:
    pipe = wan_pipeline()
    plan = reusing(pipe.transformer, *values)
    with tap_attention(pipe, remembering(plan)):
        expected = generate(pipe, STEPS)
    with pipe.sparse_attention(mixed_plan(pipe.transformer, SCHEDULE)):
        without = generate(pipe, STEPS)
    pipe.enable_sparse_attention(plan)
    assert_near(generate(pipe, STEPS), expected, GENERATION)
    assert (without - expected).abs().max() > 1e-3
    assert torch.equal(generate(pipe, STEPS), generate(pipe, STEPS))


def test_thirty_layers_on_another_grid() -> None:
    """Bitmaps aside, a plan has no grid of its own; 4 x 6 x 10 tokens here."""
    pipe = wan_pipeline(layers=30)
    plan = reusing(pipe.transformer, 0.25, 0.0)
    shape = {"height": 96, "width": 160, "frames": 13}
    with tap_attention(pipe, remembering(plan)):
        expected = generate(pipe, 6, **shape)
    pipe.enable_sparse_attention(plan)
    found = generate(pipe, 6, **shape)
    assert pipe.sparse_attention_summary().transformers["transformer"].reused_heads > 0
    assert_near(found, expected, replace(GENERATION, sums=10 * GENERATION.sums))  # ten times the layers


def test_guidance_in_one_batch_and_a_list_of_shapes() -> None:
    """The items of a batch each get their own output again."""
    pipe = wan_pipeline()
    plan = reusing(pipe.transformer, 0.2)
    embeddings = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(3))
    kwargs: dict[str, Any] = dict(
        prompt_embeds=embeddings, num_inference_steps=STEPS, height=112, width=144, num_frames=9, guidance_scale=1.0,
        output_type="latent",
    )  # fmt: skip
    both = torch.randn(2, 4, 3, 14, 18, generator=torch.Generator().manual_seed(4))
    pipe.enable_sparse_attention(plan)
    together = pipe(**kwargs, latents=both.clone()).frames
    for i in range(2):
        alone = pipe(**{**kwargs, "prompt_embeds": embeddings[i : i + 1]}, latents=both[i : i + 1].clone()).frames
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=2e-2 * float(alone.abs().max()))
    assert pipe.transformer._diffsparse_root.reuse.nbytes == 0


@pytest.mark.parametrize("steps", [3, 10, 37])
def test_it_goes_by_noise_level_at_any_number_of_steps(steps: int) -> None:
    pipe = wan_pipeline(layers=1)
    entry = HeadEntry(pattern=Window((None, 0.4, 0.4)), execution=Execution(reuse=0.12))
    plan = SparsityPlan.uniform(entry, schedule=SCHEDULE)
    pipe.enable_sparse_attention(plan)
    generate(pipe, steps)
    levels = [float(t) / 1000 for t in pipe.scheduler.timesteps]
    phases = SCHEDULE.phases(levels)
    computed = sum(
        sum(computed_steps([x for x, p in zip(levels, phases, strict=True) if p == phase], 0.12)) for phase in (0, 1)
    )
    sparse = sum(p is not None for p in phases)
    found = pipe.sparse_attention_summary().transformers["transformer"]
    assert found.reused_heads == 2 * 3 * (sparse - computed)
    assert (steps < 5) == (found.reused_heads == 0)
    (grid,) = pipe.transformer._diffsparse_root.grids
    assert found.density == pytest.approx(plan.trajectory_density(grid, levels))


def test_dense_heads_are_used_again_too() -> None:
    pipe = wan_pipeline()
    plan = SparsityPlan.uniform(HeadEntry(execution=Execution(reuse=0.2)), schedule=SCHEDULE)
    dense = generate(pipe, STEPS)
    pipe.enable_sparse_attention(plan)
    found = generate(pipe, STEPS)
    summary = pipe.sparse_attention_summary().transformers["transformer"]
    assert 0 < summary.density < 0.8
    assert (found - dense).abs().max() > 1e-3
    assert "outputs used again over steps: " in str(pipe.sparse_attention_summary())


def test_a_scheduler_that_calls_the_model_twice_a_step() -> None:
    from diffusers import FlowMatchHeunDiscreteScheduler

    pipe = wan_pipeline(layers=1)
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    sparse = mixed_plan(pipe.transformer, Schedule())
    plan = reusing(pipe.transformer, 1e-9, schedule=Schedule())
    with pipe.sparse_attention(sparse):
        expected = generate(pipe, 6)
    with pipe.sparse_attention(plan):  # nothing serves another level, and calls at one level are no branch's twice
        assert torch.equal(generate(pipe, 6), expected)
        assert pipe.sparse_attention_summary().transformers["transformer"].reused_heads == 0
    with pipe.sparse_attention(reusing(pipe.transformer, 0.3, schedule=Schedule())):
        assert (generate(pipe, 6) - expected).abs().max() > 1e-4
        assert pipe.sparse_attention_summary().transformers["transformer"].reused_heads > 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["between", "inside"])
def test_nothing_of_a_generation_that_failed_is_used(error: type[BaseException], where: str) -> None:
    pipe = wan_pipeline()
    plan = reusing(pipe.transformer, 1.0, schedule=Schedule())
    pipe.enable_sparse_attention(plan)
    expected = generate(pipe, STEPS, seed=1)

    def stop(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if where == "between" and step == 4:
            raise error
        return {}

    handle, calls = None, []
    if where == "inside":

        def fail(*_: Any) -> None:
            calls.append(1)
            if len(calls) == 7:  # the second guidance branch is not called any more
                raise error

        handle = pipe.transformer.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(error):
        generate(pipe, STEPS, seed=0, callback_on_step_end=stop)
    if handle is not None:
        handle.remove()
    assert torch.equal(generate(pipe, STEPS, seed=1), expected)


def test_the_same_prompt_tensors_in_the_next_generation() -> None:
    """Embeddings that are passed in are the same tensors, and so may be a latent."""
    pipe = wan_pipeline()
    prompts = [torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(n)) for n in (1, 2)]
    kwargs = dict(
        prompt_embeds=prompts[0], negative_prompt_embeds=prompts[1], height=112, width=144, num_frames=9,
        num_inference_steps=STEPS, guidance_scale=4.0, output_type="latent",
    )  # fmt: skip
    pipe.enable_sparse_attention(reusing(pipe.transformer, 1.0, schedule=Schedule()))

    def clip(seed: int) -> torch.Tensor:
        found: torch.Tensor = pipe(**kwargs, generator=torch.Generator().manual_seed(seed)).frames
        return found

    first, second = clip(0), clip(1)
    assert torch.equal(clip(1), second) and torch.equal(clip(0), first)

    def stop(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        pipe._interrupt = step == 3
        return {}

    pipe(**kwargs, generator=torch.Generator().manual_seed(0), callback_on_step_end=stop)
    assert torch.equal(clip(1), second)


def test_blocks_that_a_cache_skips_give_nothing_old() -> None:
    """A layer that was skipped when its output was due computes it at its next call."""
    from diffusers import FirstBlockCacheConfig

    pipe = wan_pipeline(layers=3)
    pipe.enable_sparse_attention(reusing(pipe.transformer, 0.25, schedule=Schedule()))
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.12))
    store = pipe.transformer._diffsparse_root.reuse
    seen: list[float] = []
    recalled = type(store).recalled

    def watched(self: Any, step: Any, layer: int, number: int, groups: Any, shape: Any) -> Any:
        found = recalled(self, step, layer, number, groups, shape)
        seen.extend(self._held[step.branch, layer, number, g.reuse].level - step.level for g in found)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(store), "recalled", watched)
        generate(pipe, 20)
    assert seen and min(seen) > 0 and max(seen) < 0.25
    layers = pipe.sparse_attention_summary().transformers["transformer"].layers
    assert layers[0].sparse_calls == 40 and 0 < layers[1].sparse_calls < 40


def test_nothing_is_held_when_a_generation_has_ended() -> None:
    pipe = wan_pipeline()
    pipe.enable_sparse_attention(reusing(pipe.transformer, 0.2))
    generate(pipe, STEPS)
    store = pipe.transformer._diffsparse_root.reuse
    assert store.nbytes == 0
    held = sum(e.execution.mode != "skip" for e in pipe.transformer._diffsparse_root.plan.entries)
    assert held and 0 < store.peak <= 2 * 2 * 189 * 3 * (16 + 4)  # branches, layers, tokens, heads, a row in 8 bits


def test_a_model_without_a_pipeline_computes_at_every_call(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = wan(), wan_inputs(3, 7, 9)
    enable_sparse_attention(model, mixed_plan(model))
    expected = run(model, inputs)
    disable_sparse_attention(model)
    with caplog.at_level(logging.WARNING, "diffsparse"):
        enable_sparse_attention(model, reusing(model, 1.0, schedule=Schedule()))
        assert torch.equal(run(model, inputs), expected)
        assert torch.equal(run(model, inputs), expected)
    assert caplog.text.count(NOT_TOLD) == 1
    assert sparse_attention_summary(model).transformers["transformer"].reused_heads == 0


def test_a_prompt_that_is_made_anew_at_every_step() -> None:
    """Then branches cannot be told apart, so that nothing is used again, and nothing piles up."""
    pipe = wan_pipeline()
    plan = mixed_plan(pipe.transformer)
    with pipe.sparse_attention(plan):
        expected = generate(pipe, STEPS)
    forward = pipe.transformer.forward

    def copying(**kwargs: Any) -> Any:
        return forward(**kwargs)

    def anew(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "encoder_hidden_states": kwargs["encoder_hidden_states"].clone()}

    handle = pipe.transformer.register_forward_pre_hook(anew, with_kwargs=True, prepend=True)
    pipe.enable_sparse_attention(reusing(pipe.transformer, 1.0, schedule=Schedule()))
    pipe.transformer._forward_pre_hooks.move_to_end("diffsparse")  # ours sees what the model gets
    assert torch.equal(generate(pipe, STEPS), expected)
    store = pipe.transformer._diffsparse_root.reuse
    assert store.peak <= 4 * 2 * 189 * 3 * (16 + 4)
    handle.remove()


def test_copies_and_pickles_hold_nothing_of_each_other() -> None:
    pipe = wan_pipeline()
    pipe.enable_sparse_attention(reusing(pipe.transformer, 0.2))
    expected = generate(pipe, STEPS)
    other = copy.deepcopy(pipe.transformer)
    third = pickle.loads(pickle.dumps(pipe.transformer))
    stores = {id(m._diffsparse_root.reuse) for m in (pipe.transformer, other, third)}
    assert len(stores) == 3
    assert torch.equal(generate(pipe, STEPS), expected)


def test_dense_again_after_disable() -> None:
    pipe = wan_pipeline()
    dense = generate(pipe, STEPS)
    pipe.enable_sparse_attention(reusing(pipe.transformer, 0.2))
    generate(pipe, STEPS)
    pipe.disable_sparse_attention()
    assert torch.equal(generate(pipe, STEPS), dense)


@pytest.mark.parametrize(
    ("reuse", "message"),
    [
        (-0.1, "in \\[0, 1\\], got -0.1"),
        (1.5, "got 1.5"),
        (float("nan"), "got nan"),
        (True, "got True"),
        ("1", "got '1'"),
    ],
)
def test_values_that_are_none(reuse: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Execution(reuse=reuse)


def test_a_head_that_is_left_out_is_not_used_again() -> None:
    with pytest.raises(ValueError, match="reuse must be 0"):
        Execution(mode="skip", reuse=0.5)


def test_a_saved_plan_keeps_it(tmp_path: Any) -> None:
    plan = SparsityPlan.uniform(HeadEntry(execution=Execution(reuse=0.25)), HeadEntry(), schedule=SCHEDULE)
    plan.save_pretrained(tmp_path)
    assert SparsityPlan.from_pretrained(tmp_path).entries == plan.entries
    text = (tmp_path / "sparse_plan.json").read_text()
    assert text.count('"reuse"') == 1  # entries without it are as older versions write them
    assert isinstance(plan.entries[0].pattern, Full) and not plan.entries[0].is_dense


@pytest.mark.slow(reason="compiles a model")
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_blocks_keep_one_graph(backend: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    pipe = wan_pipeline(layers=4)
    plan = reusing(pipe.transformer, 0.2, 0.0, 0.1, schedule=Schedule(phase_bounds=(0.5,)))
    with pipe.sparse_attention(plan):
        expected = generate(pipe, STEPS)
        eager = pipe.sparse_attention_summary().transformers["transformer"]
    counter = CompileCounterWithBackend(backend)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
    pipe.enable_sparse_attention(plan)
    found = generate(pipe, STEPS)
    assert counter.frame_count == 1
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2 * float(expected.abs().max()))
    compiled = pipe.sparse_attention_summary().transformers["transformer"]
    assert (compiled.reused_heads, compiled.density) == (eager.reused_heads, pytest.approx(eager.density))
    assert torch.equal(generate(pipe, STEPS), found)


def test_keeping_and_taking_outputs_waits_for_no_device() -> None:
    """Tensors without values raise an error where one is asked for."""
    store, group = ReuseStore(), Group(0.2, torch.tensor([0, 2]))
    out = torch.empty(1, 8, 3, 4, device="meta")
    store.exchange(out, ReuseStep(0, 0.9, 0, 0.8), 0, 0, (group,), ())
    assert store.nbytes == 8 * 2 * (4 + 4)
    later = ReuseStep(0, 0.8, 0, -1.0)
    assert store.recalled(later, 0, 0, (group,), out.shape) == (group,)
    store.exchange(out, later, 0, 0, (group,), (group,))
    store.end(later, complete=True)
    assert store.nbytes == 0


@pytest.mark.parametrize("steps", [3, 10, 37])
@pytest.mark.parametrize("reuse", [0.0, 0.3])
def test_dense_steps_in_the_middle_run_at_any_number_of_steps(steps: int, reuse: float) -> None:
    """The last interval holds no step of the shorter generations; the step that passes through it is dense."""
    pipe = wan_pipeline(layers=1)
    entry = HeadEntry(pattern=Window((1, None, None)), execution=Execution(reuse=reuse))
    schedule = Schedule(phase_bounds=(0.5,), dense_between=((0.8, 0.6), (0.02, 0.0)))
    plan = SparsityPlan.uniform(entry, schedule=schedule)
    pipe.enable_sparse_attention(plan)
    generate(pipe, steps)
    levels = [float(t) / 1000 for t in pipe.scheduler.timesteps]
    phases = schedule.phases(levels)
    found = pipe.sparse_attention_summary().transformers["transformer"]
    assert phases[-1] is None and min(level for level in levels) > 0.02
    dense = sum(layer.dense_calls for layer in found.layers)
    assert dense == 2 * phases.count(None)
    (grid,) = pipe.transformer._diffsparse_root.grids
    assert found.density == pytest.approx(plan.trajectory_density(grid, levels))


def test_levels_that_a_model_gets_rounded_are_told_apart() -> None:
    from types import SimpleNamespace

    levels = [1.0, 0.954, 0.9, 0.831, 0.5]
    scheduler = SimpleNamespace(timesteps=torch.tensor(levels) * 1000, config={"num_train_timesteps": 1000})
    schedule = Schedule(dense_between=((0.82, 0.81),))
    phase = PhaseFinder().of(schedule, scheduler)
    rounded = [float(torch.tensor(level * 1000, dtype=torch.bfloat16)) / 1000 for level in levels]
    assert rounded != levels
    assert [phase(level) for level in rounded] == schedule.phases(levels) == [0, 0, 0, None, 0]
    assert [PhaseFinder().of(schedule, None)(level) for level in levels] == [0] * 5
