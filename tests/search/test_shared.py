"""Searches that processes share end in the plan of one process, also where one of them was killed."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from diffsparse.plan import SparsityPlan
from diffsparse.search.measured import PooledAttention
from diffsparse.search.store import SearchStore
from tests.helpers.process import run_script
from tests.search.conditioned import PIPELINES
from tests.search.tiny import SHAPE_OPTIONS

SEARCH: dict[str, Any] = {"prompts": 3, "repair": True, "validation_prompts": 2}


def search(out: Path, processes: int = 1, **changes: Any) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", processes] if processes > 1 else []
    arguments = json.dumps({"out": str(out), **SEARCH, **changes})
    return run_script(*launcher, "-m", "tests.search.shared_search", arguments, OMP_NUM_THREADS="1")


def files(folder: Path) -> dict[str, bytes]:
    """A plan's files without what they say of times."""
    plan = SparsityPlan.from_pretrained(folder)
    plan.record["search"].pop("seconds")
    for timed in (plan.record["quality"], *plan.record["search"].get("points", [])):
        assert timed.pop("loop_speedup") > 0
    attention = PooledAttention.beside(folder)
    assert attention is not None and attention.figures is not None
    figures = attention.figures
    return plan.to_files() | {
        "attention": attention.pooled.tobytes() + figures.error.tobytes() + figures.kept_mass.tobytes()
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("alone") / "plan"
    done = search(out)
    assert done.returncode == 0, done.stderr
    return files(out)


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("search.*") if path.name != "search.sqlite")


@pytest.mark.slow(reason="a search in one process and one in several, which load the libraries")
@pytest.mark.parametrize("processes", [2, 3])
def test_the_plan_is_that_of_one_process(alone: dict[str, bytes], tmp_path: Path, processes: int) -> None:
    done = search(tmp_path, processes)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path) == alone
    assert not left_over(tmp_path)
    lines = [json.loads((tmp_path / f"done{rank}.json").read_text()) for rank in range(processes)]
    assert any(line.startswith("chosen: ") for line in lines[0]) and not any(lines[1:]), "rank 0 alone talks"


@pytest.mark.slow(reason="a search in one process and one in two, which load the libraries")
def test_so_is_that_of_a_pipeline_that_is_given_pictures(tmp_path: Path) -> None:
    changes = {"pipeline": "wan_i2v", "prompts": 2, "validation_prompts": 1, "guidance_scale": 3.0}
    changes |= PIPELINES["wan_i2v"].settings | {"steps": 4, "trace_steps": 2, "density": PIPELINES["wan_i2v"].density}
    for processes in (1, 2):
        done = search(tmp_path / str(processes) / "plan", processes, **changes)
        assert done.returncode == 0, done.stderr
    first, second = (files(tmp_path / str(processes) / "plan") for processes in (1, 2))
    assert first == second


@pytest.mark.slow(reason="a search in one process and one in two, which load the libraries")
def test_so_is_that_for_two_sizes(tmp_path: Path) -> None:
    for name, processes in (("one", 1), ("two", 2)):
        done = search(tmp_path / name, processes, also_size=[48, 64, 13])
        assert done.returncode == 0, done.stderr
    assert files(tmp_path / "two") == files(tmp_path / "one")


@pytest.mark.slow(reason="searches for a target in one process and in two")
def test_so_is_that_for_a_target(tmp_path: Path) -> None:
    """Of which each point's clips are made until one falls below it."""
    changes = {"density": None, "target": 0.9, "points": 2, "validation_prompts": 3, "steps": 13}
    for processes in (1, 2):
        done = search(tmp_path / str(processes), processes, **changes)
        assert done.returncode == 0, done.stderr
    assert files(tmp_path / "1") == files(tmp_path / "2")


@pytest.mark.slow(reason="searches that are killed and go on")
@pytest.mark.parametrize(
    ("processes", "rank", "writes"), [(2, 1, 2), (2, 1, 6), (2, 1, 10), (2, 0, 8), (2, 0, 30), (3, 2, 4), (3, 1, 13)]
)
def test_a_killed_rank_is_named_and_the_same_command_goes_on(
    alone: dict[str, bytes], tmp_path: Path, processes: int, rank: int, writes: int
) -> None:
    begin = time.monotonic()
    killed = search(tmp_path, processes, kill={rank: writes})
    assert killed.returncode != 0 and time.monotonic() - begin < 120
    lines = [line for line in killed.stderr.splitlines() if line.startswith("error: ")]
    assert lines == [
        f"error: rank {rank} has ended, of {processes} processes, and the search stops; what all of them stored is "
        "kept; run the same command again to go on from there"
    ]
    stored = {
        name
        for path in tmp_path.glob("search*.sqlite")
        for name in names(path)
        if name.startswith(("apart/", "judged/"))
    }
    again = search(tmp_path, processes, note=True)
    assert again.returncode == 0, again.stderr
    assert files(tmp_path) == alone and not left_over(tmp_path)
    written = {name for path in tmp_path.glob("written*.json") for name in json.loads(path.read_text())}
    assert not stored & written, "what a rank had stored is not measured again"


def names(path: Path) -> list[str]:
    with SearchStore(path) as store:
        return store.names()


@pytest.mark.slow(reason="the command starts two processes")
def test_the_command_starts_processes(model_folder: Path, prompts_file: Path, tmp_path: Path) -> None:
    given = ["-m", "diffsparse", "search", model_folder, "--prompts", prompts_file, *SHAPE_OPTIONS, "--samples", 2]
    more = ["--num-processes", 2, "--json"]
    done = run_script(*given, "--density", 0.7, "--out", tmp_path / "plan", *more)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["plan"] == str(tmp_path / "plan"), "one object, by rank 0 alone"
    assert done.stderr.count("estimate: ") == 1 and done.stderr.count("chosen: ") == 1
    done = run_script(*given, "--density", 0.001, "--out", tmp_path / "plan", *more)
    assert done.returncode == 2 and not done.stdout
    assert [line for line in done.stderr.splitlines() if "error" in line.lower()] == [
        line for line in done.stderr.splitlines() if line.startswith("error: a density of 0.001 cannot be reached")
    ]
    wrong = [tmp_path / "none.txt" if each is prompts_file else each for each in given]
    done = run_script(*wrong, "--density", 0.7, "--out", tmp_path / "other", *more)
    assert done.returncode == 2 and done.stderr.count("no prompts file at") == 1 and done.stderr.count("\n") == 1
