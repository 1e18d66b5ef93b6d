"""Fitting a repair: the sums, the regression, which heads get a map, the cut to a size, and the stage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffsparse.entry import HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.pipelines import tap_attention
from diffsparse.pipelines.tap import AttentionCall
from diffsparse.plan import SparsityPlan
from diffsparse.schedule import Schedule
from diffsparse.search.config import SearchConfig
from diffsparse.search.generate import Clip, GenerationSettings
from diffsparse.search.observe import final_latents
from diffsparse.search.repair import ErrorSums, RepairTap, exact_rows, fit_repair
from diffsparse.search.search import search_plan
from diffsparse.search.stages.repair import NOISE_DB
from tests.search.plans import make_plan
from tests.search.tiny import PROMPTS, SHAPE, build_pipeline, fix_costs
from tests.tolerance import ATTENTION, Work, assert_near

SETTINGS = GenerationSettings(4, 3.0, **SHAPE)


def sums_of(
    queries: int, heads: int = 2, dim: int = 8, noise: float = 0.0, seed: int = 0
) -> tuple[ErrorSums, np.ndarray, np.ndarray]:
    """Sums of outputs whose error is affine in them, but for noise; and that map."""
    rng = np.random.default_rng(seed)
    matrix, bias = rng.normal(size=(heads, dim, dim)) / dim, rng.normal(size=(heads, dim))
    found = ErrorSums.zeros(heads, dim)
    for half in (0, 1):
        out = rng.normal(size=(1, queries, heads, dim))
        wrong = np.einsum("brhi,hij->brhj", out, matrix) + bias + noise * rng.normal(size=out.shape)
        found.add(half, torch.from_numpy(out), torch.from_numpy(out + wrong))
    return found, matrix, bias


def test_an_affine_error_is_found() -> None:
    found, matrix, bias = sums_of(4000)
    maps, left = found.fit()
    # The smallest ridge takes three hundredths off.
    assert np.abs(maps[:, :-1] - matrix).max() < 0.05 * np.abs(matrix).max()
    assert np.abs(maps[:, -1] - bias).max() < 0.05 * np.abs(bias).max()
    assert left.max() < 0.01


def test_what_is_left_is_told_from_queries_that_were_not_fitted() -> None:
    """Fewer queries than channels: a fit of their own would leave nothing."""
    rng = np.random.default_rng(0)
    found = ErrorSums.zeros(2, 32)
    for half in (0, 1):
        out, wrong = rng.normal(size=(2, 1, 20, 2, 32))
        found.add(half, torch.from_numpy(out), torch.from_numpy(out + wrong))
    _, left = found.fit()
    assert left.min() > 0.9


def test_a_head_that_is_left_out_gets_its_mean() -> None:
    rng = np.random.default_rng(0)
    found, mean = ErrorSums.zeros(1, 8), rng.normal(size=8)
    for half in (0, 1):
        exact = mean + 0.1 * rng.normal(size=(1, 500, 1, 8))
        found.add(half, torch.zeros(1, 500, 1, 8), torch.from_numpy(exact))
    maps, left = found.fit()
    assert not maps[0, :-1].any() and np.abs(maps[0, -1] - mean).max() < 0.03 and left[0] < 0.05


def test_rows_are_dense_attention() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 40, 3, 16)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, 35:] = False
    call = AttentionCall("a", 0, q, k, v, TokenGrid(1, 5, 7, text_after=5), 0.5, 0.3, mask, lambda: q)
    rows = torch.tensor([3, 30, 7])
    whole = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask[:, None, None], scale=0.3
    ).transpose(1, 2)
    assert_near(exact_rows(call, rows), whole[:, rows], ATTENTION)


def fitted(pipe: Any, plan: SparsityPlan, **options: Any) -> tuple[SparsityPlan, float]:
    tap = RepairTap(plan)
    for half, seed in enumerate((0, 1)):
        tap.half = half
        with tap_attention(pipe, tap):
            final_latents(pipe, PROMPTS[0], seed, SETTINGS)
    repair, share = fit_repair(plan, tap.sums, **options)
    return replace(plan, repair=repair), share


def error(pipe: Any, plan: SparsityPlan) -> float:
    """Of the heads' outputs in a generation with another prompt and seed than the fit's."""
    tap = RepairTap(plan, seed=9)
    with tap_attention(pipe, tap):
        final_latents(pipe, PROMPTS[1], 5, SETTINGS)
    return float(sum(sums.ee.sum() for sums in tap.sums.values()))


@pytest.fixture(scope="module")
def plan(pipe: Any) -> SparsityPlan:
    return make_plan()


def test_repaired_heads_are_nearer_to_dense(pipe: Any, plan: SparsityPlan) -> None:
    mended, share = fitted(pipe, plan)
    assert mended.repair is not None and 0 < share < 1
    before, after = error(pipe, plan), error(pipe, mended)
    # On what it was not fitted on, it leaves about what cross-validation says.
    assert after < 0.9 * before, (before, after)
    assert after / before == pytest.approx(share, rel=0.25)


def test_heads_that_attend_everything_get_none(pipe: Any, plan: SparsityPlan) -> None:
    mended, _ = fitted(pipe, plan)
    assert mended.repair is not None
    dense = np.array([entry.is_dense for entry in plan.entries])[plan.index]
    assert (mended.repair.index[dense] == -1).all()


def test_a_limit_on_its_size_cuts_the_rank(pipe: Any, plan: SparsityPlan) -> None:
    whole, _ = fitted(pipe, plan)
    assert whole.repair is not None and whole.repair.rank is None
    maps, dim = whole.repair.bias.shape
    limit = maps * (4 * dim * 6 + 2 * dim)
    cut, _ = fitted(pipe, plan, max_bytes=limit)
    assert cut.repair is not None and cut.repair.rank == 6
    assert cut.repair.left.nbytes + cut.repair.bias.nbytes + cut.repair.right.nbytes <= limit  # type: ignore[union-attr]
    plain, best, less = (error(pipe, p) for p in (plan, whole, cut))
    assert best <= less < plain


def test_a_cut_map_does_what_the_whole_one_does_where_its_rank_is_enough() -> None:
    rng = np.random.default_rng(0)
    found = ErrorSums.zeros(1, 16)
    matrix = rng.normal(size=(16, 3)) @ rng.normal(size=(3, 16)) / 16
    for half in (0, 1):
        out = 2 + rng.normal(size=(1, 3000, 1, 16))
        found.add(half, torch.from_numpy(out), torch.from_numpy(out + out @ matrix))
    from diffsparse.entry import HeadEntry
    from diffsparse.patterns import Sink

    plan = SparsityPlan.from_table({"a": [[HeadEntry(pattern=Sink(1))]]})
    repairs = [fit_repair(plan, {(0, "a"): found}, max_bytes=size)[0] for size in (1 << 20, 3 * 64 + 32)]
    whole, cut = (r.of_layer(0, 0) for r in repairs if r is not None)
    assert repairs[1] is not None and repairs[1].rank == 3
    out = torch.from_numpy(2 + rng.normal(size=(1, 50, 1, 16)))
    first, second = (maps.apply_(out.clone(), 0, 50) for maps in (whole, cut))
    # Both were rounded to half precision.
    assert_near(second, first, Work(16, sums=3, gain=4, dtype=torch.float16))


def test_a_search_writes_a_repair_and_says_what_it_gained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fix_costs(monkeypatch)
    pipe, lines = build_pipeline(), []
    config = SearchConfig(budget=None, density=0.4, steps=4, trace_steps=4, samples=2, **SHAPE)
    found = search_plan(pipe, PROMPTS, config, tmp_path / "with", progress=False, say=lines.append)
    again = search_plan(pipe, PROMPTS, config, tmp_path / "with", progress=False, say=lambda line: None)
    assert np.array_equal(again.index, found.index)
    assert any(line.startswith("repair: ") and "of their squared error is left" in line for line in lines)
    quality, left_out = found.record["quality"], any("the repair is left out" in line for line in lines)
    assert (found.repair is None) is left_out
    if found.repair is not None:
        assert quality["psnr_mean"] >= quality["psnr_without_repair"] - NOISE_DB
        assert again.repair is not None and np.array_equal(again.repair.left, found.repair.left)
    plain = search_plan(
        pipe, PROMPTS, replace(config, repair=False), tmp_path / "with", progress=False, say=lambda line: None
    )
    assert plain.repair is None


@pytest.mark.parametrize(
    ("bounds", "steps"),
    [((), 8), ((0.5,), 8), ((0.95,), 8), ((0.95, 0.9), 12), ((0.97, 0.94, 0.5), 24), ((0.99, 0.98, 0.97), 50)],
)
def test_a_repair_is_fitted_on_generations_with_a_step_in_each_phase(
    monkeypatch: pytest.MonkeyPatch, bounds: tuple[float, ...], steps: int
) -> None:
    from diffsparse.search.stages import repair as module

    def levels(count: int) -> list[float]:
        return np.linspace(1, 0, count, endpoint=False).tolist()

    schedule = Schedule(phase_bounds=bounds)
    plan = SparsityPlan.from_table({"a": [[HeadEntry()]] * schedule.num_phases}, schedule=schedule)
    work = SimpleNamespace(
        config=SimpleNamespace(steps=50, trace_steps=8, seed=0), trace_levels=levels(8), settings=lambda n: n,
        pipe=None, prompts=[None],
    )  # fmt: skip
    monkeypatch.setattr(module, "call_levels", lambda pipe, prompt, seed, count: levels(count))
    assert module.fitting_steps(work, plan) == steps  # type: ignore[arg-type]
    work.config.steps = 8
    assert module.fitting_steps(work, plan) == 8  # type: ignore[arg-type]


@pytest.mark.parametrize(("after", "kept"), [(30.4, True), (29.6, True), (29.4, False), (31.0, True)])
def test_a_repair_goes_only_where_it_is_plainly_worse(
    pipe: Any, plan: SparsityPlan, monkeypatch: pytest.MonkeyPatch, after: float, kept: bool
) -> None:
    from diffsparse.search.compose import Candidate
    from diffsparse.search.stages import repair as module

    chosen, lines = Candidate(plan, np.zeros(plan.index.shape), []), []
    mended, _ = fitted(pipe, plan)
    before = {"psnr_mean": 30.0, "psnr_by_dense_steps": {"1": 30.0, "2": 29.0}}
    monkeypatch.setattr(module, "repaired", lambda work, plan: mended)
    monkeypatch.setattr(module, "validate", lambda work, found: (found[0], {"psnr_mean": after}))
    found, quality = module.mended(SimpleNamespace(say=lines.append), chosen, before)  # type: ignore[arg-type]
    assert (found.plan.repair is not None) is kept and len(lines) == 1
    assert quality is not None and quality["psnr_mean"] == (after if kept else 30.0)
    assert quality["psnr_by_dense_steps"] == before["psnr_by_dense_steps"]
    assert ("left out" in lines[0]) is not kept and "30.00 dB" in lines[0] and f"{after:.2f} dB" in lines[0]


def test_a_dense_clip_of_validation_is_made_once_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffsparse.search import workspace as module

    work, made = SimpleNamespace(dense_clips={}), []

    def generate() -> Clip:
        made.append(Clip("a", 0, torch.zeros(1, 3, 4, 4), (), 1.0, 1.0))
        return made[-1]

    first, again, other = (module.Workspace.dense_clip(work, case, generate) for case in (0, 0, 1))  # type: ignore[arg-type]
    assert first is again and other is not first and len(made) == 2
    monkeypatch.setattr(module, "MAX_CLIP_BYTES", 2 * 3 * 16 * 4)
    for _ in range(2):
        module.Workspace.dense_clip(work, 2, generate)  # type: ignore[arg-type]
    assert len(made) == 4
