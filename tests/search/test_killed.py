"""A search that is killed, or that finds no room or a folder that may not be written: one line, and nothing is lost."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from diffsparse.plan import SparsityPlan
from diffsparse.search.recompose import compose_plan

#: A whole search of the tiny pipeline: traced on one prompt, validated on the other, repaired. With an argument the
#: file may not grow beyond so many bytes. Costs are fixed: they are measured times, which no two searches share.
SEARCH = """
    import sys
    from pathlib import Path

    import pytest

    from diffsparse.search.errors import BadInput
    from diffsparse.search.search import search_plan
    from tests.search.tiny import PROMPTS, build_pipeline, config, fix_costs

    fix_costs(pytest.MonkeyPatch())
    pipe = build_pipeline()
    if len(sys.argv) > 2:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
    print("begin", flush=True)
    settings = config(repair=True, trace_prompts=1, candidates=2, dense_steps=1)
    try:
        search_plan(pipe, PROMPTS, settings, Path(sys.argv[1]), progress=False, say=lambda line: None)
    except BadInput as error:
        print(error)
        sys.exit(2)
    print("end", flush=True)
"""


def start(*arguments: object, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(SEARCH), *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=Path(__file__).parents[2], **options
    )  # type: ignore[call-overload,no-any-return]


def finished(*arguments: object, **options: object) -> tuple[int, str]:
    """The exit code, and what was printed after the first line."""
    process = start(*arguments, **options)
    out, _ = process.communicate(timeout=300)
    return process.returncode, out.removeprefix("begin\n").strip()


def digest(folder: Path) -> dict[str, bytes]:
    """A plan's files without the times that it took."""
    plan = SparsityPlan.from_pretrained(folder)
    plan.record["search"].pop("seconds")
    plan.record["quality"].pop("loop_speedup")
    return plan.to_files()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, float]]:
    """The folder of a search that nothing stopped, and how long it took."""
    folder = tmp_path_factory.mktemp("whole") / "plan"
    process = start(folder)
    assert process.stdout is not None and process.stdout.readline() == "begin\n"
    begin = time.perf_counter()
    assert process.wait(300) == 0
    yield folder, time.perf_counter() - begin


@pytest.mark.slow(reason="kills searches of the tiny model 20 times, each in a process of its own")
def test_killed_at_twenty_moments_it_ends_in_the_same_plan(whole: tuple[Path, float], tmp_path: Path) -> None:
    """Each time the search goes on where the last one was killed, until it ends; then anew."""
    folder, seconds = whole
    wanted, rng, killed, ended = digest(folder), np.random.default_rng(0), 0, 0
    while killed < 20:
        out = tmp_path / f"plan{ended}"
        process = start(out)
        assert process.stdout is not None and process.stdout.readline() == "begin\n"
        time.sleep(float(rng.uniform(0, 0.6 * seconds)))
        process.kill()
        told = process.stdout.read()
        if told.strip() == "end":
            assert digest(out) == wanted
            ended += 1
            continue
        assert process.wait() == -9 and not told.strip(), told
        killed += 1
    assert finished(out) == (0, "end")
    assert digest(out) == wanted
    for name, record in (("killed", out), ("whole", folder)):
        compose_plan(record, out=tmp_path / name, density=0.7, progress=False)
    plans = [SparsityPlan.from_pretrained(tmp_path / name) for name in ("killed", "whole")]
    assert plans[0].entries == plans[1].entries and plans[0].schedule == plans[1].schedule


@pytest.mark.slow(reason="searches with the tiny model several times, each in a process of its own")
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.95])
def test_a_full_disk_is_one_line_and_the_search_goes_on_from_there(
    whole: tuple[Path, float], tmp_path: Path, share: float
) -> None:
    folder, _ = whole
    limit = int(share * (folder / "search.sqlite").stat().st_size)
    code, told = finished(tmp_path / "plan", limit)
    assert code == 2 and len(told.splitlines()) == 1
    assert re.match(r"the disk is full: no room to write \S+; free some space, then run the same command again", told)
    assert finished(tmp_path / "plan") == (0, "end")
    assert digest(tmp_path / "plan") == digest(folder)


@contextmanager
def read_only(folder: Path, place: Path) -> Iterator[Path]:
    """A folder with the same files, in which nothing may be written: by its modes, or mounted so for root, who may."""
    if os.geteuid() != 0:
        shutil.copytree(folder, place)
        every = [place, *place.rglob("*")]
        for path in every:
            path.chmod(0o555 if path.is_dir() else 0o444)
        try:
            yield place
        finally:
            for path in every:
                path.chmod(0o755 if path.is_dir() else 0o644)
        return
    place.mkdir()
    if subprocess.run(["mount", "--bind", str(folder), str(place)], capture_output=True, check=False).returncode:
        pytest.skip("root may write everywhere, and mounting a folder that it may not write is forbidden here")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(place)], check=True)
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow(reason="searches with the tiny model in processes of their own")
def test_a_folder_that_may_not_be_written_is_one_line(whole: tuple[Path, float], tmp_path: Path) -> None:
    """A plan is composed from its record all the same."""
    folder, _ = whole
    with read_only(folder, tmp_path / "still") as place:
        code, told = finished(place)
        assert code == 2 and len(told.splitlines()) == 1, told
        assert "cannot be read or written" in told and "choose another --out" in told
        code, told = finished(place / "new")
        assert code == 2 and "cannot write to" in told and len(told.splitlines()) == 1
        plan = compose_plan(place, out=tmp_path / "plan", density=0.5, progress=False)
        assert plan.record["quality"] == SparsityPlan.from_pretrained(folder).record["quality"]


@pytest.mark.slow(reason="searches with the tiny model in processes of their own")
def test_a_second_search_says_who_has_the_record(whole: tuple[Path, float], tmp_path: Path) -> None:
    first = start(tmp_path / "plan")
    assert first.stdout is not None and first.stdout.readline() == "begin\n"
    while not (tmp_path / "plan" / "search.sqlite.holder").is_file():
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)  # it would end before the second one has started
    code, told = finished(tmp_path / "plan")
    assert code == 2 and f"(process {first.pid} on " in told and len(told.splitlines()) == 1, told
    first.kill()
    first.wait()
    assert finished(tmp_path / "plan") == (0, "end")
    assert digest(tmp_path / "plan") == digest(whole[0])
