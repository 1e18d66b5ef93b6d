"""Plans from the record of a search, without its model: the same ones, validated as far as the search did so."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffsparse.plan import SparsityPlan
from diffsparse.search.errors import BadInput
from diffsparse.search.measured import figures_beside
from diffsparse.search.recompose import compose_plan
from diffsparse.search.search import search_plan
from diffsparse.search.store import SearchStore, StoreDamaged
from tests.search.tiny import PROMPTS, Cli, config, fix_costs


@pytest.fixture(scope="module", autouse=True)
def fixed_costs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        fix_costs(patch)
        yield


def search(pipe: Any, out: Path, **changes: Any) -> SparsityPlan:
    return search_plan(pipe, PROMPTS, config(**changes), out, progress=False, say=lambda line: None)


@pytest.fixture(scope="module")
def record(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a search for a density of 0.5, validated on one clip, without a repair."""
    folder = tmp_path_factory.mktemp("searches") / "plan"
    search(pipe, folder)
    return folder


def compose(record: Path, out: Path, **asked: Any) -> tuple[SparsityPlan, list[str]]:
    said: list[str] = []
    return compose_plan(record, out=out, progress=False, say=said.append, **asked), said


def without_time(plan: SparsityPlan) -> dict[str, bytes]:
    plan.record["search"].pop("seconds")
    return plan.to_files()


def test_the_same_density_gives_the_same_plan_with_its_quality(record: Path, tmp_path: Path) -> None:
    plan, said = compose(record, tmp_path, density=0.5)
    assert "quality" in plan.record and not any("validated" in line for line in said)
    wanted = SparsityPlan.from_pretrained(record)
    assert without_time(SparsityPlan.from_pretrained(tmp_path)) == without_time(wanted)
    written = {file.name for file in record.iterdir()} - {"search.sqlite"}
    assert {file.name for file in tmp_path.iterdir()} == written


@pytest.mark.parametrize("asked", [{"density": 0.7}, {"budget": 0.8}, {"budget": 0.7, "dense_steps": 2}], ids=str)
def test_another_plan_is_the_one_that_the_search_would_compose(
    pipe: Any, record: Path, tmp_path: Path, asked: dict[str, Any]
) -> None:
    before = (record / "search.sqlite").read_bytes()
    plan, said = compose(record, tmp_path / "composed", **asked)
    assert (record / "search.sqlite").read_bytes() == before
    assert said[-1] == (
        "without the model the plan is not validated: check it with `diffsparse eval`, or run the same search with the "
        f"model and --out {record}"
    )
    assert "quality" not in plan.record and figures_beside(plan, tmp_path / "composed") is not None
    shutil.copytree(record, tmp_path / "searched")
    wanted = search(pipe, tmp_path / "searched", validation_prompts=0, **{"density": None} | asked)
    assert without_time(plan) == without_time(wanted)


def test_a_repair_of_the_same_plan_is_taken_and_another_plan_is_told_to_lack_one(pipe: Any, tmp_path: Path) -> None:
    wanted = search(pipe, tmp_path / "searched", repair=True, validation_prompts=0, trace_prompts=1)
    plan, said = compose(tmp_path / "searched", tmp_path / "composed", density=0.5)
    assert plan.fitted_repair is not None and without_time(plan) == without_time(wanted)
    assert "is not validated:" in said[-1]
    plain, _ = compose(tmp_path / "searched", tmp_path / "plain", density=0.5, repair=False)
    assert plain.repair is None
    other, said = compose(tmp_path / "searched", tmp_path / "other", density=0.7)
    assert other.repair is None and "is not validated and has no repair:" in said[-1]


def test_a_target_is_answered_by_clips_that_were_validated(pipe: Any, tmp_path: Path) -> None:
    """No plan is tried that was not; where none of them keeps the target, that is said with the best there is."""
    record = tmp_path / "searched"
    wanted = search(pipe, record, density=None, target=0.9, points=2, dense_steps=1)
    points = wanted.record["search"]["points"]
    kept = [point for point in points if point["ssim_worst"] >= 0.9 and point["clips"] == 2]
    assert kept, "nothing to compare with"
    plan, said = compose(record, tmp_path / "composed", target=0.9)
    assert plan.entries == wanted.entries and plan.schedule == wanted.schedule
    quality = plan.record["quality"]
    assert quality["reached"] and quality["target"] == 0.9
    for name in ("ssim_worst", "psnr_mean", "prompts", "density"):
        assert quality[name] == pytest.approx(wanted.record["quality"][name])
    assert any("it is the sparsest that keeps the target" in line for line in said)
    with pytest.raises(BadInput, match=r"of the \d plans that were validated on 2 clips keeps an SSIM of 1; the best"):
        compose(record, tmp_path / "none", target=1.0)
    assert not (tmp_path / "none").exists()


def test_one_validated_clip_is_no_answer_to_a_target_of_two(record: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"none of the 0 plans that were validated on 2 clips keeps an SSIM of 0\.5"):
        compose(record, tmp_path, target=0.5)


def test_what_the_record_does_not_tell_is_one_line(record: Path, tmp_path: Path) -> None:
    for asked, message in (
        ({}, "give a budget, a density or a target, one of the three"),
        ({"budget": 0.4, "density": 0.4}, "give a budget, a density or a target, one of the three"),
        (
            {"budget": 0.9, "num_inference_steps": 9},
            "noise levels of generations of 6 steps, and not of 9; ",
        ),
        ({"density": 0.001}, "a density of 0.001 cannot be reached on this model: the least is"),
        ({"budget": 1.5}, r"a budget is a share in \(0, 1\], got 1.5"),
    ):
        with pytest.raises(BadInput, match=message) as caught:
            compose(record, tmp_path / "out", **asked)
        assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match=r"holds no search\.sqlite: give the folder that a search wrote"):
        compose(tmp_path, tmp_path / "out", budget=0.4)
    assert not (tmp_path / "out").exists()


def test_a_search_that_was_killed_before_its_end_is_no_record_yet(record: Path, tmp_path: Path) -> None:
    shutil.copy(record / "search.sqlite", tmp_path)
    with SearchStore(tmp_path / "search.sqlite") as store:
        store.remove("facts")
    with pytest.raises(BadInput, match="has not measured everything yet; run it again, with its model"):
        compose(tmp_path, tmp_path / "out", budget=0.9)
    with SearchStore(tmp_path / "search.sqlite") as store:
        store.put_json("facts", {"architecture": {}})
    with pytest.raises(StoreDamaged, match="facts cannot be read"):
        compose(tmp_path, tmp_path / "out", budget=0.9)


def test_the_command(cli: Cli, record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffsparse.search.load.load_pipeline", None)  # no model is loaded
    code, out, err = cli("search", "--from", record, "--density", 0.6, "--out", tmp_path / "plan")
    assert code == 0 and "not validated" in err and "diffsparse eval MODEL" in out
    assert SparsityPlan.from_pretrained(tmp_path / "plan").record["search"]["density"] == 0.6
    for options, message in (
        (
            ["--density", 0.6, "--seed", 0],
            "--from and --seed: a record was measured with a model and settings of its own",
        ),
        (["--density", 0.6, "--height", 64, "--lora", "x"], "--from and --height, --lora: "),
        (["--density", 0.6, "--prompts", "x", "a/model"], "--from and MODEL, --prompts: "),
        (["--density", 0.6, "--validate", 1], "--from and --validate: "),
        ([], "--from needs to know what the plan is for: give --budget, --density or --target"),
        (["--density", 0.6, "--steps", 5], "search with the model, which adds them"),
    ):
        code, _, err = cli("search", "--from", record, *options, "--out", tmp_path / "other")
        assert code == 2 and message in err and len(err.strip().splitlines()) == 1, err
    for options, message in (
        (["--prompts", "x", "--out", tmp_path], "MODEL is missing: a search needs a model and prompts"),
        (["a/model", "--out", tmp_path], "--prompts is missing"),
        (["a/model", "--prompts", "x"], "--out is missing"),
    ):
        code, _, err = cli("search", *options)
        assert code == 2 and re.search(message, err), err
