"""Whole searches on a random pipeline: what comes out fits, is the same again, and survives a kill at any point."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffsparse.entry import TAILS
from diffsparse.grid import TokenGrid
from diffsparse.kernels import sparse_attention
from diffsparse.kernels.break_even import save_local
from diffsparse.layout import build_layout
from diffsparse.order import TileOrder
from diffsparse.patterns import Empty
from diffsparse.pipelines import architecture_of, sparse_attention_summary, tap_attention
from diffsparse.pipelines import sparse_attention as attached
from diffsparse.plan import SparsityPlan
from diffsparse.search.errors import BadInput
from diffsparse.search.generate import GenerationSettings, generate_clip
from diffsparse.search.load import sparse_backend
from diffsparse.search.measured import PooledAttention, figures_beside
from diffsparse.search.observe import final_latents, record, replaying, step_effect
from diffsparse.search.options import FamilyTable, HeadScores, is_stable
from diffsparse.search.score import projection_roots
from diffsparse.search.search import SearchConfig, search_plan
from diffsparse.search.store import SearchStore, StoreMismatch
from diffsparse.search.trial import strides
from tests.helpers.break_even import table as break_even_table
from tests.search.made_up import head_scores
from tests.search.tiny import PROMPTS, SHAPE, build_pipeline, config, fix_costs
from tests.tolerance import ATTENTION, assert_near

SETTINGS = GenerationSettings(4, 5.0, **SHAPE)


def search(pipe: Any, out: Path, **changes: Any) -> SparsityPlan:
    return search_plan(pipe, PROMPTS, config(**changes), out, progress=False, say=lambda line: None)


@pytest.fixture(scope="module", autouse=True)
def fixed_costs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        fix_costs(patch)
        yield


@pytest.fixture(scope="module")
def found(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("searches") / "plan"
    search(pipe, folder)
    return folder


def test_a_plan_keeps_to_its_density_and_fits_its_model(pipe: Any, found: Path) -> None:
    plan = SparsityPlan.from_pretrained(found)
    assert plan.check_architecture(architecture_of(pipe.transformer)) == []
    about = plan.record["search"]
    assert 0.3 < about["trajectory_density"] <= 0.5
    assert about["predicted_error"] >= about["lower_bound"] >= 0
    assert about["predicted_attention_time"] > 0
    quality = plan.record["quality"]
    assert quality["prompts"] == 1 and quality["psnr_mean"] == max(quality["psnr_by_dense_steps"].values())
    assert any(name.split()[0] == str(about["dense_steps"]) for name in quality["psnr_by_dense_steps"])
    pipe.enable_sparse_attention(plan)
    try:
        latents = final_latents(pipe, PROMPTS[0], 3, SETTINGS)
        assert pipe.sparse_attention_summary()
    finally:
        pipe.disable_sparse_attention()
    assert torch.isfinite(latents).all()


def test_its_pictures_are_probabilities(found: Path) -> None:
    attention = PooledAttention.beside(found)
    assert attention is not None
    assert attention.pooled.shape[1:3] == (2, 2)
    assert np.allclose(attention.pooled.sum(-1), 1, atol=2e-2)


def test_every_head_has_an_error_and_a_kept_mass_beside_the_plan(pipe: Any, found: Path) -> None:
    plan, figures = SparsityPlan.from_pretrained(found), None
    figures = figures_beside(plan, found)
    assert figures is not None and figures.error.shape == figures.kept_mass.shape == plan.index.shape
    for at in np.ndindex(plan.index.shape):
        entry, error, kept = plan.entries[plan.index[at]], figures.error[at], figures.kept_mass[at]
        if entry.is_dense or entry.execution.mode == "skip":
            assert (error, kept) == ((0, 1) if entry.is_dense else (1, 0))
        else:
            assert 0 <= error < 1 and (0 < kept < 1 or isinstance(entry.pattern, Empty))
    # Another plan from the same measurements has figures of its own.
    other = search(pipe, found, density=0.8)
    again = figures_beside(other, found)
    assert again is not None and again.plan != figures.plan and again.error.mean() < figures.error.mean()
    assert figures_beside(plan, found) is None
    search(pipe, found)
    back = figures_beside(plan, found)
    assert back is not None and np.array_equal(back.error, figures.error)


def test_they_are_what_the_kernel_makes(pipe: Any, tmp_path: Path) -> None:
    """With every query sampled, against the model's own calls at the traced steps; through the output projection."""
    plan = search(pipe, tmp_path, samples=64, validation_prompts=0)
    figures = figures_beside(plan, tmp_path)
    assert figures is not None
    shape = plan.index.shape
    off, whole, kept, calls = np.zeros(shape), np.zeros(shape), np.zeros(shape), np.zeros(shape)

    def measure(call: Any) -> None:
        phase, j = plan.schedule.phase(call.noise_level), plan.layers.index(call.layer)
        if phase is None:
            return
        layout = plan.layout(phase, call.layer, 2, call.grid)
        assert layout is not None
        dense = call.dense()
        sparse = sparse_attention(call.q, call.k, call.v, layout, scale=call.scale, backend="reference")
        weight = pipe.transformer.get_submodule(call.layer).to_out[0].weight
        roots = projection_roots(weight, 2, 32, call.q.device)
        for total, values in ((off, sparse - dense), (whole, dense)):
            total[phase, j] += torch.einsum("bshd,hde->bshe", values, roots).square().sum((0, 1, 3)).numpy()
        weights = torch.einsum("bqhd,bkhd->bhqk", call.q, call.k).mul(call.scale or 32**-0.5).softmax(-1)
        for head in range(2):
            kept[phase, j, head] += float((weights[0, head] * layout.token_mask(head)).sum(-1).mean())
        calls[phase, j] += 1

    for p, prompt in enumerate(PROMPTS):
        with torch.no_grad(), tap_attention(pipe, measure):
            final_latents(pipe, prompt, p, SETTINGS)
    traced = calls > 0  # a phase may hold none of the traced steps
    made, said = off[traced] / whole[traced], figures.error[traced]
    assert len(made) > 8
    assert (said < 3 * made).all() and (made < 3 * said).all()
    assert np.corrcoef(np.log(made), np.log(said))[0, 1] > 0.9
    assert np.abs(kept[traced] / calls[traced] - figures.kept_mass[traced]).max() < 0.02


def test_a_finished_search_read_back_gives_the_same_plan(pipe: Any, found: Path, tmp_path: Path) -> None:
    plan = SparsityPlan.from_pretrained(found)
    lines: list[str] = []
    again = search_plan(pipe, PROMPTS, config(), found, progress=False, say=lines.append)
    assert "going on" in lines[0]
    for each in (plan, again):
        each.record["search"].pop("seconds")  # the second one read what the first one measured
    assert plan.to_files() == again.to_files()


@pytest.mark.parametrize("writes", [1, 4, 9, 11, 17])
def test_a_search_killed_at_any_point_ends_in_the_same_plan(
    pipe: Any, found: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    original = SearchStore._write
    left, written = writes, set()

    def dying(self: SearchStore, rows: list[tuple[str, str, bytes]]) -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        original(self, rows)
        written.update(row[0] for row in rows)

    with monkeypatch.context() as patch:
        patch.setattr(SearchStore, "_write", dying)
        with pytest.raises(KeyboardInterrupt):
            search(pipe, tmp_path / "plan")
    with SearchStore(tmp_path / "plan" / "search.sqlite") as store:
        assert set(store.names()) == written
    resumed = search(pipe, tmp_path / "plan")
    whole = SparsityPlan.from_pretrained(found)
    assert resumed.entries == whole.entries and np.array_equal(resumed.index, whole.index)
    assert resumed.schedule == whole.schedule


def test_another_density_reuses_the_trace_and_another_seed_does_not(pipe: Any, found: Path) -> None:
    more = search(pipe, found, density=0.8)
    assert 0.5 < more.record["search"]["trajectory_density"] <= 0.8
    dense_steps = search(pipe, found, dense_steps=2).record["search"]["dense_steps"]
    assert dense_steps == 2
    with pytest.raises(StoreMismatch, match="seed"):
        search(pipe, found, seed=7)
    search(pipe, found)


def test_a_budget_is_of_time(pipe: Any, found: Path) -> None:
    plan = search(pipe, found, density=None, budget=0.9)
    assert plan.record["search"]["predicted_attention_time"] <= 0.9 + 1e-6
    search(pipe, found)


def test_plans_are_validated_sparse_where_auto_would_stay_dense(
    pipe: Any, found: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFSPARSE_CACHE", str(tmp_path / "cache"))
    save_local(break_even_table(9.0))
    plan = search(pipe, tmp_path / "plan", validation_prompts=1)
    assert plan.record["quality"]["psnr_mean"] < 100
    assert sparse_backend(pipe, plan) == "cpu"
    for backend, sparse in (("auto", False), (sparse_backend(pipe, plan), True)):
        with attached(pipe, plan, backend=backend):
            generate_clip(pipe, PROMPTS[0], 0, SETTINGS)
            assert bool(sparse_attention_summary(pipe).transformers["transformer"].sparse_calls) == sparse


def test_what_cannot_work_is_said(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="at least one prompt"):
        search_plan(pipe, [], config(), tmp_path)
    with pytest.raises(BadInput, match=r"a density of 0\.001 cannot be reached on this model: the least is 0\.\d{3}"):
        search(pipe, tmp_path / "a", density=0.001)
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["search.sqlite"]
    with pytest.raises(BadInput, match=r"a budget of 0\.001 cannot be reached on this model: the least is 0\.\d{3}"):
        search(pipe, tmp_path / "a", density=None, budget=0.001)
    for wrong in ({"density": 1.5}, {"target": 0.9}, {"budget": 0.4}, {"steps": 0}, {"dense_steps": 6}):
        with pytest.raises(BadInput):
            config(**wrong)


def test_an_all_dense_replay_repeats_the_recording(pipe: Any) -> None:
    recording = record(pipe, PROMPTS[0], 5, SETTINGS, None)
    assert len(recording.levels) == 4 and len(recording.outputs) == 8
    for until in (8, recording.first_call(2), 0):
        with replaying(pipe, recording, until):
            assert torch.equal(final_latents(pipe, PROMPTS[0], 5, SETTINGS), recording.latents)
    assert "forward" not in pipe.transformer.__dict__
    assert step_effect(pipe, recording, PROMPTS[0], 5, SETTINGS, 1, lambda call: None) == 0.0
    assert "step" not in pipe.scheduler.__dict__


def test_a_layer_has_an_effect_that_guidance_multiplies(pipe: Any) -> None:
    from diffsparse.entry import HeadEntry
    from diffsparse.patterns import Window

    entry = HeadEntry(TileOrder(1, 8, 8), Window((1, 0.3, 0.3)))

    def sparse(call: Any) -> Any:
        return build_layout(call.grid, [entry] * 2) if call.layer == "blocks.1.attn1" else None

    found = []
    for scale in (1.0, 2.0, 10.0):
        settings = replace(SETTINGS, guidance_scale=scale)
        recording = record(pipe, PROMPTS[0], 5, settings, None)
        assert len(recording.guided) == len(recording.levels)
        # The same latent for all scales: no update lies before the first step.
        found.append(step_effect(pipe, recording, PROMPTS[0], 5, settings, 0, sparse))
        for step in range(len(recording.levels)):
            assert step_effect(pipe, recording, PROMPTS[0], 5, settings, step, sparse) > 0
    # The guided error is u + scale * (c - u), so that the last one is 9 times the second less 8 times the first.
    one, two, ten = (math.sqrt(x) for x in found)
    assert abs(9 * two - 8 * one) * 0.999 <= ten <= (9 * two + 8 * one) * 1.001
    assert ten != pytest.approx(one, rel=1e-3)


def test_masks_of_several_sizes_err_as_the_trace_says(pipe: Any) -> None:
    """The measured error at the ladder's ends: everything dropped, with a tail and without."""
    from diffsparse.entry import TAILS, Execution, HeadEntry
    from diffsparse.patterns import Empty
    from diffsparse.search.score import LADDER, BlockIndex, score_call

    calls: list[Any] = []
    with tap_attention(pipe, lambda call: calls.append(call) or None):
        final_latents(pipe, PROMPTS[0], 5, GenerationSettings(1, 1.0, **SHAPE))
    call = calls[0]
    order = TileOrder(1, 8, 8)
    q, k, v = (
        torch.randn(x.shape, generator=torch.Generator().manual_seed(i)) for i, x in enumerate((call.q, call.k, call.v))
    )
    scores = score_call(q, k, v, BlockIndex.build(call.grid, order, 64, q.device), samples=64)
    assert LADDER[0] == 0
    assert_near(scores.true[0, :, 0], scores.energy, ATTENTION)
    assert_near(scores.summed[:, :, 0], scores.error.sum((2, 3)), ATTENTION)
    dense = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    for tail in TAILS[1:]:
        layout = build_layout(call.grid, [HeadEntry(order, Empty(), execution=Execution(tail=tail))] * 2)
        off = (sparse_attention(q, k, v, layout, backend="reference") - dense).square().sum((0, 1, 3))
        assert torch.allclose(scores.true[TAILS.index(tail), :, 0], off, rtol=0.25)


def test_correction_follows_the_measured_errors() -> None:
    summed, true = np.array([[8.0, 4.0, 1.0]] * 3), np.array([[80.0, 20.0, 1.0]] * 3)
    scores = HeadScores(np.zeros((3, 4)), 1.0, summed, true)
    assert scores.corrected(0, summed[0]) == pytest.approx(true[0])
    found = scores.corrected(1, np.array([6.0, 0.5, 0.0, -1e-9]))
    assert 20 < found[0] < 80 and found[1:].tolist() == pytest.approx([0.5, 0.0, 0.0])
    unknown = HeadScores(np.zeros((3, 4)), 1.0, np.zeros((3, 2)), np.zeros((3, 2)))
    assert unknown.corrected(0, np.array([2.0])) == 2.0
    # What was measured for a mask without any score says nothing.
    some = HeadScores(np.zeros((3, 4)), 1.0, np.array([[8.0, 4.0, 0.0]] * 3), np.array([[80.0, 20.0, 1.0]] * 3))
    assert some.corrected(0, np.array([8.0, 4.0, 1.0])) == pytest.approx([80.0, 20.0, 5.0])
    single = HeadScores(np.zeros((3, 4)), 1.0, np.array([[2.0]] * 3), np.array([[6.0]] * 3))
    assert single.corrected(0, np.array([1.0, 0.0])) == pytest.approx([3.0, 0.0])


def test_a_head_that_follows_the_prompt_is_unstable() -> None:
    table = FamilyTable(TokenGrid(1, 32, 32), TileOrder(1, 8, 8), 64)
    first, empty = np.eye(16), np.zeros((len(TAILS), 1))

    def scores(error: np.ndarray, value: np.ndarray) -> HeadScores:
        return head_scores(np.stack([error + 1e-3] * len(TAILS)), table, 100.0, empty, empty, value)

    assert is_stable(scores(first, first), table)
    assert not is_stable(scores(np.roll(first, 5, 1), first), table)
    assert is_stable(scores(0 * first - 1e-3, first), table), "a head without any error cannot fail to carry over"


def test_strides_end_at_zero() -> None:
    assert strides(np.array([1.0, 0.8, 0.5])).tolist() == pytest.approx([0.2, 0.3, 0.5])


def test_heads_of_128_channels_get_blocks_of_128(tmp_path):
    pipe = build_pipeline(layers=1, heads=1, head_dim=128)
    config = SearchConfig(
        density=0.7, steps=2, trace_steps=2, trace_prompts=1, validation_prompts=0, repair=False, samples=1, **SHAPE
    )
    assert search_plan(pipe, PROMPTS, config, tmp_path, progress=False).block_size == 128
