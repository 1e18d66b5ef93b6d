"""Searches for quality on a random pipeline: the sparsest plan that was seen to keep a target, and how it says so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from diffsparse.card import plan_card
from diffsparse.entry import TAILS
from diffsparse.kernels.costs import CostTable
from diffsparse.online import OnlineRepair
from diffsparse.plan import SparsityPlan
from diffsparse.quality import quality_line
from diffsparse.search import metrics
from diffsparse.search.errors import BadInput
from diffsparse.search.generate import Clip, generate_clip
from diffsparse.search.load import sparse_backend
from diffsparse.search.search import FREE_SETTINGS, SearchConfig, search_plan
from diffsparse.search.show import plan_table
from diffsparse.search.stages import validate as validation
from diffsparse.search.stages.target import error_curve
from diffsparse.search.store import SearchStore
from tests.search.made_up import Scores, composer
from tests.search.tiny import PROMPTS, SHAPE, config, fix_costs, flux_pipeline

#: Between what the plans of the tiny pipeline reach, so that a walk has points on either side.
BETWEEN = 0.999
#: As little measuring as will do.
FEW: dict[str, Any] = {"steps": 4, "trace_steps": 2, "samples": 1}
#: Settings of a made-up search for a target.
ASKED: dict[str, Any] = {"density": None, "target": 0.9, "validation_prompts": None}
FOUR = [*PROMPTS, "a red square", "a blue circle"]


def search(
    pipe: Any, out: Path, lines: list[str] | None = None, prompts: list[str] | None = None, **changes: Any
) -> SparsityPlan:
    asked = config(**{"density": None, "target": BETWEEN, "repair": True} | FEW | changes)
    say = (lambda line: None) if lines is None else lines.append
    return search_plan(pipe, prompts or PROMPTS, asked, out, progress=False, say=say)


@pytest.fixture(scope="module", autouse=True)
def fixed_costs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        fix_costs(patch)
        yield


@pytest.fixture(scope="module")
def found(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder, lines = tmp_path_factory.mktemp("targets") / "plan", []
    search(pipe, folder, lines)
    return folder, lines


def test_the_cheapest_point_that_keeps_the_target_is_the_plan(pipe: Any, found: tuple[Path, list[str]]) -> None:
    folder, lines = found
    plan = SparsityPlan.from_pretrained(folder)
    quality, about = plan.record["quality"], plan.record["search"]
    points = about["points"]
    assert 2 <= len(points) <= 4 and len({point["budget"] for point in points}) == len(points)
    holding = [point for point in points if point["ssim_worst"] >= BETWEEN]
    assert holding and len(holding) < len(points), "the target is to lie between what the points reach"
    best = min(holding, key=lambda point: point["budget"])
    assert (quality["ssim_worst"], quality["density"], quality["loop_speedup"]) == (
        best["ssim_worst"], best["density"], best["loop_speedup"]
    )  # fmt: skip
    assert about["trajectory_density"] == best["density"] and about["predicted_attention_time"] <= best["budget"] + 1e-9
    assert (about["target"], about["budget"], about["density"]) == (BETWEEN, None, None)
    assert (quality["target"], quality["reached"], quality["prompts"]) == (BETWEEN, True, 2)
    assert quality["ssim_worst"] <= quality["ssim_mean"]
    assert sum(line.startswith("point ") for line in lines) == len(points)
    assert f"{quality_line(plan.record)}" in lines
    # The clips say what the record says: one of them is the worst one.
    similar = []
    for prompt in PROMPTS:
        settings = config().settings(4)
        dense = generate_clip(pipe, prompt, 1000, settings)
        pipe.enable_sparse_attention(plan, backend=sparse_backend(pipe, plan))
        try:
            similar.append(metrics.ssim(generate_clip(pipe, prompt, 1000, settings).frames, dense.frames))
        finally:
            pipe.disable_sparse_attention()
    # Plan files hold repairs in the precision in which they were validated.
    assert min(x for x in similar if x is not None) == pytest.approx(quality["ssim_worst"], abs=1e-6)


def test_it_is_said_in_one_line_everywhere(found: tuple[Path, list[str]]) -> None:
    plan = SparsityPlan.from_pretrained(found[0])
    line = quality_line(plan.record)
    assert line is not None and "\n" not in line
    assert line.startswith("worst of 2 clips of new seeds: SSIM 0.999 at density 0.") and "(target 0.999)" in line
    assert line in plan_card(plan) and " ".join(line.split()[:4]) in " ".join(plan_table(plan).split())
    about = {
        "prompts": 2, "target": 0.95, "ssim_worst": 0.94999, "density": 0.344, "loop_speedup": 1.7, "held_out": True
    }  # fmt: skip
    missed = quality_line({"quality": about | {"reached": False}})
    assert missed == (
        "the target of 0.95 is not reached; worst of 2 held-out clips: SSIM 0.949 at density 0.344, loop 1.7x"
    )
    near = quality_line({"quality": about | {"reached": True, "ssim_worst": 0.99964, "target": 0.9995}})
    assert near is not None and "SSIM 0.9996 at" in near
    kept = quality_line({"quality": about | {"reached": True, "ssim_worst": 0.962}})
    assert kept == "worst of 2 held-out clips: SSIM 0.962 at density 0.344, loop 1.7x (target 0.95)"
    for none in ({}, {"quality": 3}, {"quality": about}, {"quality": {"psnr_mean": 30.0}}):
        assert quality_line(none) is None


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    made: list[tuple[str, int]] = []

    def generate(pipe: Any, prompt: str, seed: int, settings: Any) -> Clip:
        made.append((prompt, seed))
        return generate_clip(pipe, prompt, seed, settings)

    monkeypatch.setattr(validation, "generate_clip", generate)
    return made


def test_it_takes_no_more_generations_than_it_says(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, made = [], counted(monkeypatch)
    plan = search(pipe, tmp_path, lines, FOUR, points=3)
    (estimate,) = (line for line in lines if line.startswith("estimate: "))
    # Two dense clips; two of the first point without its repair; two of every point, or one where that misses.
    assert estimate.endswith("of them for validation: 10 generations of 4 steps")
    points = plan.record["search"]["points"]
    assert 2 + 2 + sum(point["clips"] for point in points) == len(made) <= 10
    assert all(point["clips"] == 2 for point in points if point is points[0] or point["ssim_worst"] >= BETWEEN)
    assert {prompt.name for prompt, _ in made} == set(FOUR[2:]) and {seed for _, seed in made} == {1000}
    assert plan.record["quality"]["held_out"] is True
    again: list[str] = []
    search(pipe, tmp_path, again, FOUR, density=0.5, target=None)
    assert any(line.endswith("of them for validation: 5 generations of 4 steps") for line in again)
    search(pipe, tmp_path, again, FOUR, density=0.5, target=None, validation_prompts=0)
    assert again[-2].startswith("repair") or "validation" not in " ".join(again[-4:])


@pytest.mark.parametrize(
    ("prompts", "clips", "wanted"),
    [
        (FOUR, None, [(FOUR[2], 1000), (FOUR[3], 1000)]),
        (FOUR[:3], None, [(FOUR[2], 1000), (FOUR[2], 1001)]),
        (FOUR[:2], None, [(FOUR[0], 1000), (FOUR[1], 1000)]),
        (FOUR[:1], 3, [(FOUR[0], 1000), (FOUR[0], 1001), (FOUR[0], 1002)]),
        (FOUR, 1, [(FOUR[2], 1000)]),
    ],
)
def test_a_target_is_of_as_many_clips_as_were_asked_for(
    prompts: list[str], clips: int | None, wanted: list[tuple[str, int]]
) -> None:
    asked = SearchConfig(validation_prompts=clips)
    work: Any = SimpleNamespace(
        config=asked, prompts=tuple(prompts), traced=lambda: list(range(min(asked.trace_prompts, len(prompts))))
    )
    assert validation.cases(work) == wanted
    # Under a budget as before: prompts that were not traced, or one other seed.
    work.config = replace(asked, budget=0.4, validation_prompts=3)
    held = prompts[2:]
    assert validation.cases(work) == [(p, 1000) for p in held or prompts[:1]]


@pytest.mark.parametrize(
    "writes",
    [pytest.param(n, marks=() if n == 5 else pytest.mark.slow(reason="two searches each")) for n in (0, 3, 5, 8)],
)
def test_a_search_killed_between_points_ends_in_the_same_plan(
    pipe: Any, found: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    original, left = SearchStore._put, writes

    def dying(self: SearchStore, name: str, kind: str, value: bytes) -> None:
        nonlocal left
        if name.startswith(("validation/", "repair/")):
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
        original(self, name, kind, value)

    with monkeypatch.context() as patch:
        patch.setattr(SearchStore, "_put", dying)
        with pytest.raises(KeyboardInterrupt):
            search(pipe, tmp_path)
    made = counted(monkeypatch)
    resumed, whole = search(pipe, tmp_path), SparsityPlan.from_pretrained(found[0])
    assert resumed.entries == whole.entries and np.array_equal(resumed.index, whole.index)
    assert resumed.schedule == whole.schedule
    one, other = (
        [{k: v for k, v in point.items() if k != "loop_speedup"} for point in plan.record["search"]["points"]]
        for plan in (resumed, whole)
    )
    assert one == other
    assert (resumed.repair is None) == (whole.repair is None)
    if resumed.repair is not None and whole.repair is not None:
        assert np.array_equal(resumed.repair.left, whole.repair.left)
    # Read back, nothing is generated, and every byte is the same.
    made.clear()
    again = search(pipe, tmp_path)
    for plan in (resumed, again):
        plan.record["search"].pop("seconds")
    assert again.to_files() == resumed.to_files() and made == []


def test_where_nothing_sparse_holds_the_nearest_is_written(pipe: Any, tmp_path: Path) -> None:
    lines: list[str] = []
    plan = search(pipe, tmp_path, lines, target=1.0)
    quality, points = plan.record["quality"], plan.record["search"]["points"]
    assert quality["reached"] is False and points[-1]["budget"] > 0.8
    assert quality["ssim_worst"] == max(point["ssim_worst"] for point in points) < 1
    assert any(line.startswith("the target of 1 is not reached; worst of 2 clips") for line in lines)
    assert any(line.startswith("nothing sparse that was tried keeps the target, ") for line in lines)
    assert SparsityPlan.from_pretrained(tmp_path).record["quality"]["reached"] is False
    # One try is no reason to say that nothing holds.
    search(pipe, tmp_path, lines, target=1.0, points=1)
    assert "keeps the target, one at a budget of 0." in lines[-2]


def test_a_target_goes_on_from_a_search_for_a_density(pipe: Any, tmp_path: Path) -> None:
    search(pipe, tmp_path, density=0.5, target=None)
    lines: list[str] = []
    search(pipe, tmp_path, lines, target=0.9)
    assert "going on" in lines[0]
    before = search(pipe, tmp_path, density=0.5, target=None)
    assert "target" not in before.record["quality"] and quality_line(before.record) is None
    assert 0 < before.record["quality"]["ssim_worst"] < 1
    assert {"target", "points"} <= set(FREE_SETTINGS)


def test_a_record_without_ssim_is_measured_again_for_a_target_alone(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"prompts": FOUR, "repair": False}
    first = search(pipe, tmp_path, **asked)
    with SearchStore(tmp_path / "search.sqlite") as store:
        names = store.names("validation/")
        rows = {name: store.get_json(name) for name in names}
        assert names and all(row.keys() == {"psnr", "ssim", "speedup"} for row in rows.values())
        for name, row in rows.items():
            store.put_json(name, {key: row[key] for key in ("psnr", "speedup")})
    made = counted(monkeypatch)
    again = search(pipe, tmp_path, **asked)
    assert len(made) == len(rows) + 2
    assert again.record["quality"]["ssim_worst"] == pytest.approx(first.record["quality"]["ssim_worst"], abs=1e-9)


def test_under_a_density_such_a_record_serves_as_before(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"prompts": FOUR, "repair": False, "density": 0.5, "target": None}
    search(pipe, tmp_path, **asked)
    with SearchStore(tmp_path / "search.sqlite") as store:
        for name in store.names("validation/"):
            row = store.get_json(name)
            store.put_json(name, {key: row[key] for key in ("psnr", "speedup")})
    made = counted(monkeypatch)
    quality = search(pipe, tmp_path, **asked).record["quality"]
    assert made == [] and "ssim_worst" not in quality and quality["psnr_mean"] > 0


def test_no_repair_is_fitted_again_where_the_first_one_is_worse(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffsparse.search.stages.repair.NOISE_DB", -1000.0)
    lines: list[str] = []
    plan = search(pipe, tmp_path, lines, points=2)
    assert len(plan.record["search"]["points"]) == 2 and plan.repair is None
    assert sum(line.startswith("repair: ") for line in lines) == 1
    assert sum(line.startswith("the repair is left out") for line in lines) == 1


def test_no_repair_is_fitted_where_each_call_fits_its_own(pipe: Any, tmp_path: Path) -> None:
    lines: list[str] = []
    plan = search(pipe, tmp_path, lines, points=2, repair_rows=16)
    assert len(plan.record["search"]["points"]) == 2 and plan.repair == OnlineRepair(16)
    assert not any(line.startswith("repair: ") for line in lines)


def test_several_plans_may_be_compared_at_every_point(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[int] = []
    original = validation.validate

    def watched(work: Any, candidates: list[Any], least: float | None = None) -> Any:
        best, quality = original(work, candidates, least)
        compared.append(len(candidates))
        rows = {
            index: min(work.validation(i, validation.plan_digest(c.plan)).ssim for i in range(quality["prompts"]))
            for index, c in enumerate(candidates)
        }
        assert quality["ssim_worst"] == max(rows.values())
        return best, quality

    monkeypatch.setattr("diffsparse.search.stages.target.validate", watched)
    plan = search(pipe, tmp_path, candidates=2, repair=False, points=2)
    assert len(compared) == len(plan.record["search"]["points"]) and max(compared) == 2


def clip(frames: torch.Tensor) -> Clip:
    return Clip("a red circle", 1000, frames, (1.0,), 1.0, 1.0)


def test_a_clip_of_no_numbers_keeps_no_target(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    work: Any = SimpleNamespace(config=SearchConfig(), say=lines.append)
    good = torch.rand(2, 3, 16, 16)
    broken = good.clone()
    broken[0, 0, 0, 0] = torch.nan
    assert asdict(validation._measured(work, clip(broken), clip(good))) == {"psnr": 0.0, "ssim": 0.0, "speedup": 1.0}
    assert len(lines) == 1 and "pixels that are no numbers" in lines[0]
    assert validation._measured(work, clip(good), clip(good)).ssim == 1.0
    validation._check_dense(work, clip(good))
    with pytest.raises(BadInput, match=r"the dense clip of 'a red circle' has pixels that are no numbers"):
        validation._check_dense(work, clip(broken))
    with pytest.raises(BadInput, match="is 8x16: a target is of SSIM, which needs at least 11 pixels"):
        validation._check_dense(work, clip(good[:, :, :8]))
    work.config = SearchConfig(budget=0.4)
    validation._check_dense(work, clip(good[:, :, :8]))
    assert validation._measured(work, clip(good[:, :, :8]), clip(good[:, :, :8])).ssim is None


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"target": 0}, r"a target is an SSIM in \(0, 1\], got 0"),
        ({"target": 1.5}, r"a target is an SSIM in \(0, 1\], got 1\.5"),
        ({"target": float("nan")}, r"a target is an SSIM in \(0, 1\], got nan"),
        ({"target": "0.95"}, r"a target is an SSIM in \(0, 1\], got '0\.95'"),
        ({"target": True}, r"a target is an SSIM in \(0, 1\], got True"),
        ({"budget": "0.4"}, r"a budget is a share in \(0, 1\], got '0\.4'"),
        ({"target": 0.9, "budget": 0.4}, r"one of the three, got budget 0\.4 and target 0\.9"),
        ({"density": 0.5, "budget": 0.4}, r"one of the three, got budget 0\.4 and density 0\.5"),
        ({"target": 0.9, "points": 0}, "points must be at least 1, got 0"),
        ({"budget": 0.4, "points": 4}, "points are of a search for a target, and one for a budget has none"),
        ({"validation_prompts": 0}, r"a target \(0\.95\) is measured on whole generations"),
    ],
)
def test_wrong_settings(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        SearchConfig(**asked)
    assert "\n" not in str(caught.value)


def test_what_is_searched_for_by_default(pipe: Any) -> None:
    assert (SearchConfig().goal, SearchConfig().clips, SearchConfig().tried_plans) == (0.95, 2, 1)
    for share in ({"budget": 0.4}, {"density": 0.4}):
        asked = SearchConfig(**share)
        assert (asked.goal, asked.clips, asked.tried_plans) == (None, 1, 3)
    # What was not given stays so: a copy with a budget is under that alone.
    assert replace(SearchConfig(), budget=0.4).goal is None
    with pytest.raises(BadInput, match="a height of 8: a target is of SSIM, which needs at least 11 pixels a side"):
        SearchConfig(**SHAPE | {"height": 8}).resolved(pipe)
    assert SearchConfig(budget=0.4, **SHAPE | {"height": 8}).resolved(pipe).height == 8


def test_the_curve_is_that_of_the_composer() -> None:
    """Against what a composer predicts for one budget after the other."""
    made = composer(**ASKED)
    curve = error_curve(made)
    assert made.least() <= curve.budgets[0] <= made.least() + 0.0011 and curve.budgets[-1] == pytest.approx(0.9)
    for budget, error in zip(curve.budgets, curve.errors, strict=True):
        assert error == pytest.approx(min(made.at(float(budget)).scan().values()), rel=1e-9)
    fixed = composer(**ASKED, dense_steps=2)
    least = error_curve(fixed)
    assert least.budgets[0] > 2 / 6
    for budget, error in zip(least.budgets, least.errors, strict=True):
        assert error >= min(made.at(float(budget)).scan().values()) * (1 - 1e-9)
    (candidate,) = fixed.at(0.6).candidates(1)
    assert candidate.plan.record["search"]["predicted_attention_time"] <= 0.6 + 1e-9


def test_a_model_that_is_best_left_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scores, "silent", None)
    costs = CostTable.of_call("cpu", 1.0, (0.02, 0.1, 0.3, 0.6), {tail: (1.5, 1.5, 1.5, 1.5) for tail in TAILS})
    with pytest.raises(BadInput, match="no plan is cheaper than dense attention on this model; leave it dense"):
        error_curve(composer(costs=costs, **ASKED))
    with pytest.raises(BadInput, match="on this model with 2 dense steps; ask for fewer, or leave it dense"):
        error_curve(composer(costs=costs, **ASKED, dense_steps=2))


@pytest.mark.slow(reason="a search with a trained model")
def test_the_small_model_has_a_sparse_plan_that_keeps_a_target(tmp_path: Path) -> None:
    from diffsparse.search import load

    folder = Path(__file__).parents[2] / "examples" / "tiny_wan"
    pipe = load.load_pipeline(str(folder), device=torch.device("cpu"), dtype=torch.float32)
    prompts = load.read_prompts(folder / "prompts" / "calibration.txt")
    asked = SearchConfig(target=0.9, height=64, width=64, num_frames=9, steps=4, trace_steps=2, samples=2)
    plan = search_plan(pipe, prompts, asked, tmp_path, progress=False, say=lambda line: None)
    quality, points = plan.record["quality"], plan.record["search"]["points"]
    assert quality["reached"] is True and quality["ssim_worst"] >= 0.9 and quality["held_out"] is True
    assert 0 < quality["density"] < 0.9 and 2 <= len(points) <= 4
    # Less is not worth a further try, or was tried and missed: it is a frontier.
    cheaper = [point for point in points if point["density"] < quality["density"]]
    assert all(point["ssim_worst"] < 0.9 for point in cheaper)


def test_images_have_targets_too(tmp_path: Path) -> None:
    pipe = flux_pipeline("FluxPipeline")
    asked = SearchConfig(
        target=0.5, height=128, width=128, steps=3, trace_steps=2, samples=2, trace_prompts=1, guidance_scale=3.0
    )
    plan = search_plan(pipe, FOUR, asked, tmp_path, progress=False, say=lambda line: None)
    quality = plan.record["quality"]
    assert quality["prompts"] == 2 and 0 < quality["ssim_worst"] <= 1 and quality["held_out"] is True
    assert quality["reached"] == (quality["ssim_worst"] >= 0.5)
