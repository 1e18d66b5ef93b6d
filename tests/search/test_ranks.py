"""Processes that share a search: who is who, and one line for what cannot work."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diffsparse.search.errors import BadInput
from diffsparse.search.launch import check_processes
from diffsparse.search.ranks import Place, Ranks, _has_ended, launched, sharing
from tests.helpers.process import ROOT, free_port
from tests.search.tiny import Cli

ALL = {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def test_a_launcher_says_who_is_who() -> None:
    assert launched({}) is None
    assert launched({"WORLD_SIZE": "3", "LOCAL_RANK": "1"}) is None, "no RANK: nobody was started as one of several"
    assert launched(ALL) == Place(1, 3, 0)
    assert launched(ALL | {"RANK": "0", "WORLD_SIZE": "1"}) is None


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"RANK": "0"}, "RANK is set and WORLD_SIZE, MASTER_ADDR, MASTER_PORT not: start with torchrun"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "RANK is set and MASTER_PORT not"),
        (ALL | {"RANK": "one"}, "RANK is 'one', and should be a number"),
        (ALL | {"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2', and should be a number"),
        (ALL | {"RANK": "3"}, "RANK is 3 and WORLD_SIZE 3: ranks go from 0 to 2"),
    ],
)
def test_half_a_launcher_is_refused(environment: dict[str, str], line: str) -> None:
    with pytest.raises(BadInput) as refused:
        launched(environment)
    assert line in str(refused.value)


def test_each_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [str(Place(rank, 2, rank).device("auto")) for rank in range(2)] == ["cuda:0", "cuda:1"]
    assert str(Place(5, 8, 1).device("cuda")) == "cuda:1", "by its place on its machine"
    assert str(Place(2, 3, 2).device("cpu")) == "cpu"
    with pytest.raises(BadInput, match=r"process 3 of this machine has no GPU: .* there are 2; start 2 or fewer"):
        Place(2, 3, 2).device("auto")
    with pytest.raises(BadInput, match=r"--device cuda:1: each of 2 processes takes a GPU of its own; give cuda"):
        Place(0, 2, 0).device("cuda:1")
    check_processes(2, "auto")
    check_processes(7, "cpu")
    with pytest.raises(BadInput, match=r"--num-processes 3: each takes a GPU of its own, and there are 2; ask for 2"):
        check_processes(3, "auto")
    with pytest.raises(BadInput, match="give cuda or auto"):
        check_processes(2, "cuda:0")


def test_the_command_refuses_what_cannot_be(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["search", "nowhere", "--prompts", "none.txt", "--out", tmp_path / "plan"]
    code, out, err = cli(*given, "--num-processes", 0)
    assert (code, out) == (2, "") and "--num-processes 0: it must be at least 1" in err
    monkeypatch.setenv("RANK", "0")
    code, _, err = cli(*given)
    assert code == 2 and err.count("\n") == 1 and "RANK is set and WORLD_SIZE" in err
    for name, value in (ALL | {"RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    code, _, err = cli(*given, "--num-processes", 2)
    assert code == 2 and "--num-processes 2: a launcher has started 3 already; leave it out" in err
    assert not list(tmp_path.iterdir())


def test_an_ended_process_is_seen_before_its_parent_asks() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert not _has_ended(child.pid) and not _has_ended(os.getpid())
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it is left as it is
    assert _has_ended(child.pid)
    child.wait()
    assert _has_ended(child.pid)


# -- two processes that talk -------------------------------------------------------------------------------------------


def _fails(ranks: Ranks, kind: str) -> None:
    if kind == "agree":
        ranks.agree({"seed": ranks.rank, "out": "x"})
    elif kind == "all":
        with ranks.together():
            raise BadInput("no such file")
    elif kind == "other":
        with ranks.together():
            if ranks.rank == 1:
                raise BadInput("no room")
    elif kind == "bug":
        with ranks.together():
            if ranks.rank == 1:
                raise RuntimeError("out of\nmemory")
    elif kind == "killed":
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        ranks.exchange(None)
    elif kind == "signal":
        if ranks.rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        ranks.exchange(None)


def _member(rank: int, port: int, kind: str, told: Any) -> None:
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(rank)})
    try:
        with sharing(launched()) as ranks:
            assert ranks is not None and ranks.exchange(rank) == [0, 1] and ranks.give(rank + 5) == 5
            assert ranks.give(rank + 5, 1) == 6
            _fails(ranks, kind)
        told.put((rank, None))
    except BadInput as error:
        told.put((rank, (type(error).__name__, str(error))))
    except RuntimeError as error:
        told.put((rank, (type(error).__name__, str(error))))


def tell(kind: str) -> dict[int, Any]:
    """What each of two ranks tells the user."""
    spawn = multiprocessing.get_context("spawn")
    told = spawn.Queue()
    port = free_port()
    members = [spawn.Process(target=_member, args=(rank, port, kind, told)) for rank in range(2)]
    for member in members:
        member.start()
    for member in members:
        member.join(120)
    assert not any(member.is_alive() for member in members)
    found = {}
    while not told.empty():
        rank, line = told.get()
        found[rank] = line
    return found


@pytest.mark.slow(reason="starts two processes for each case, which load torch")
@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        ("fine", {0: None, 1: None}),
        (
            "agree",
            {
                0: ("BadInput", "rank 1 has another seed than rank 0 (1, not 0); start all processes with the same"),
                1: None,
            },
        ),
        ("all", {0: ("BadInput", "no such file"), 1: None}),
        ("other", {0: ("BadInput", "rank 1 of 2: no room"), 1: None}),
        ("bug", {0: ("BadInput", "rank 1 of 2: RuntimeError: out of memory"), 1: ("RuntimeError", "out of\nmemory")}),
        ("killed", {0: ("RankLost", "rank 1 has ended, of 2 processes, and the search stops; what all of them")}),
        ("signal", {0: ("RankLost", "the search was stopped by a signal; what all of them stored is kept")}),
    ],
)
def test_one_of_them_tells_the_user(kind: str, lines: dict[int, Any]) -> None:
    found = tell(kind)
    for rank, line in lines.items():
        if line is None:
            assert found[rank] is None
        else:
            assert found[rank][0] == line[0] and found[rank][1].startswith(line[1])


def test_the_clone_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "diffsparse", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout[0].isdigit()
