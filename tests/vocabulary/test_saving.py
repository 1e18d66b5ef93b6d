"""A plan's folder: nobody's file is lost, and whatever happens while it is written, no reader gets a mixture."""

from __future__ import annotations

import errno
import itertools
import logging
import multiprocessing
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffsparse import saving
from diffsparse.card import is_own_card, plan_card
from diffsparse.entry import HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.order import TileOrder
from diffsparse.patterns import Bitmap, Window
from diffsparse.plan import PlanError, SparsityPlan

ROOT = Path(__file__).parents[2]
GRID, ORDER = TokenGrid(2, 16, 16), TileOrder(1, 8, 8)
CARDS = ["examples/tiny_flux/sparse_plan", "examples/tiny_wan/sparse_plan", "tests/vocabulary/golden/v1"]


def bitmaps(which: int) -> SparsityPlan:
    """Plans whose JSON differs by the record alone, and whose bitmaps differ."""
    mask = np.eye(8, dtype=bool) | (np.arange(64).reshape(8, 8) % (3 + which) == 0)
    entry = HeadEntry(ORDER, Bitmap.from_mask(mask, GRID, ORDER, 64))
    return SparsityPlan.uniform(entry, record={"which": which})


def rule() -> SparsityPlan:
    return SparsityPlan.uniform(HeadEntry(ORDER, Window((1, 0.5, 0.5))), record={"which": "rule"})


def is_one_of(read: SparsityPlan, *plans: SparsityPlan) -> bool:
    return any(read.to_files() == plan.to_files() for plan in plans)


# -- the card ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"# My research notes\n", b"\xff\xfe no text", b""])
def test_somebodys_readme_stays(tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    readme = tmp_path / "README.md"
    readme.write_bytes(content)
    with caplog.at_level(logging.WARNING, "diffsparse"):
        bitmaps(0).save_pretrained(tmp_path)
    assert readme.read_bytes() == content
    assert [r.getMessage() for r in caplog.records] == [
        f"{readme} was not written by diffsparse: it stays, and the plan gets no card"
    ]
    assert is_one_of(SparsityPlan.from_pretrained(tmp_path), bitmaps(0))


def test_our_own_card_is_replaced_until_somebody_edits_it(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    bitmaps(0).save_pretrained(tmp_path)
    first = readme.read_text("utf-8")
    assert is_own_card(first) and first.startswith(plan_card(bitmaps(0)))
    readme.write_bytes(first.replace("\n", "\r\n").encode())  # a checkout on Windows is no edit
    rule().save_pretrained(tmp_path)
    assert readme.read_text("utf-8").startswith(plan_card(rule()))
    edited = readme.read_text("utf-8").replace("# Sparsity plan", "# Sparsity plan\n\nWhat I found out: ...")
    readme.write_text(edited, "utf-8")
    bitmaps(1).save_pretrained(tmp_path)
    assert readme.read_text("utf-8") == edited


@pytest.mark.parametrize("folder", CARDS)
def test_cards_from_before_they_were_sealed_are_known(tmp_path: Path, folder: str) -> None:
    card = (ROOT / folder / "README.md").read_text("utf-8")
    assert is_own_card(card)
    assert not is_own_card(card + "\nMy notes.\n")
    (tmp_path / "README.md").write_text(card, "utf-8")
    rule().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text("utf-8").startswith(plan_card(rule()))


@pytest.mark.parametrize("there", [None, "# A repository of mine\n"])
def test_a_repository_keeps_its_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str | None) -> None:
    sent: dict[str, bytes] = {}

    class Hub:
        def __init__(self, token: Any = None) -> None: ...

        def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
            return type("Repo", (), {"repo_id": repo_id})

        def file_exists(self, repo_id: str, name: str) -> bool:
            return there is not None

        def hf_hub_download(self, repo_id: str, name: str) -> str:
            (tmp_path / name).write_text(there or "")
            return str(tmp_path / name)

        def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> str:
            sent.update({file.name: file.read_bytes() for file in Path(folder_path).iterdir()})
            return "the commit"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert bitmaps(0).push_to_hub("someone/plan") == "the commit"
    assert set(sent) == {"README.md", "sparse_plan.json", "sparse_plan.safetensors"}
    readme = sent["README.md"].decode()
    assert readme == there if there else is_own_card(readme)


# -- what belongs together ---------------------------------------------------------------------------------------------


def test_another_plans_bitmaps_are_refused(tmp_path: Path) -> None:
    one, two = (bitmaps(i).save_pretrained(tmp_path / str(i)) for i in range(2))
    shutil.copy(two / "sparse_plan.safetensors", one)
    with pytest.raises(PlanError, match=r"sparse_plan\.safetensors belongs to another plan") as caught:
        SparsityPlan.from_pretrained(one)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("old", [None, bitmaps(0), rule(), "unbound"])
@pytest.mark.parametrize("new", [bitmaps(1), rule()])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.EIO, "gone")])
def test_a_save_that_is_interrupted_leaves_one_plan_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: Any, new: SparsityPlan, error: Any
) -> None:
    """At every call that changes the folder. ``unbound``: a plan of before, without a digest."""
    original = {name: getattr(os, name) for name in ("replace", "unlink")}
    outcomes = []
    for stop in range(20):
        folder = tmp_path / str(stop)
        if old == "unbound":
            folder.mkdir()
            for name, content in bitmaps(0).to_files(bound=False).items():
                (folder / name).write_bytes(content)
        elif old is not None:
            old.save_pretrained(folder)
        calls = itertools.count()

        def counted(name: str, *args: Any, stop: int = stop, calls: Any = calls, **kwargs: Any) -> Any:
            if next(calls) == stop:
                raise error
            return original[name](*args, **kwargs)

        with monkeypatch.context() as patch:
            for name in original:
                patch.setattr(os, name, partial(counted, name))
            try:
                new.save_pretrained(folder)
                ended = True
            except (KeyboardInterrupt, OSError):
                ended = False
        before = [] if old is None else [bitmaps(0) if old == "unbound" else old]
        try:
            read = SparsityPlan.from_pretrained(folder)
            assert is_one_of(read, new, *before)
            outcomes.append("new" if is_one_of(read, new) else "old")
        except PlanError as refused:
            assert "\n" not in str(refused)
            outcomes.append("refused")
        new.save_pretrained(folder)  # whatever was left, it can be saved again
        assert is_one_of(SparsityPlan.from_pretrained(folder), new)
        if ended:
            break
    first = "refused" if old is None else "new" if old != "unbound" and is_one_of(old, new) else "old"
    assert ended and outcomes[-1] == "new" and outcomes[0] == first


def test_a_full_disk_leaves_the_old_plan_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bitmaps(0).save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    opened = Path.open

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *exc: object) -> None:
            self.file.close()

        def write(self, content: bytes) -> None:
            self.file.write(content[:10])
            raise OSError(errno.ENOSPC, "No space left on device")

    for stop in range(3):
        calls = itertools.count()

        def full(self: Path, mode: str = "r", *args: Any, stop: int = stop, calls: Any = calls, **more: Any) -> Any:
            file = opened(self, mode, *args, **more)
            return Full(file) if mode == "xb" and next(calls) == stop else file

        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", full)
            with pytest.raises(OSError, match="No space left") as caught:
                bitmaps(1).save_pretrained(tmp_path)
        assert saving.is_full(caught.value) and Path(caught.value.filename).parent == tmp_path
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("mine", [bitmaps(0), rule()])
@pytest.mark.parametrize("other", [bitmaps(1), rule()])
def test_a_save_within_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mine: SparsityPlan, other: SparsityPlan
) -> None:
    """Between any two steps of a save another process saves its plan: one of the two is there in the end."""
    replace = os.replace
    for stop in range(4):
        folder, calls = tmp_path / str(stop), itertools.count()

        def replaced(source: Any, target: Any, *, stop: int = stop, folder: Path = folder, calls: Any = calls) -> None:
            if next(calls) == stop:
                other.save_pretrained(folder)
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replaced)
            mine.save_pretrained(folder)
        read = SparsityPlan.from_pretrained(folder)
        assert is_one_of(read, mine, other)
        assert (folder / "README.md").read_text("utf-8").startswith(plan_card(read))


ROUNDS = 120


def _save_in_turns(folder: Path, which: int, barrier: Any) -> None:
    """All begin together, and look together at what is there when all have ended."""
    mine, plans = [bitmaps(which), rule()], [bitmaps(0), bitmaps(1), rule()]
    for i in range(ROUNDS):
        barrier.wait(30)
        mine[i // 3 % 2].save_pretrained(folder)
        barrier.wait(30)
        read = SparsityPlan.from_pretrained(folder)
        assert is_one_of(read, *plans)
        assert (folder / "README.md").read_text("utf-8").startswith(plan_card(read))
        assert {file.name for file in folder.iterdir()} == {*read.to_files(), "README.md"}


def test_processes_that_save_at_once_leave_one_plan_whole(tmp_path: Path) -> None:
    start = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(start)
    barrier = context.Barrier(2)
    workers = [context.Process(target=_save_in_turns, args=(tmp_path, i, barrier)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert not [file.name for file in tmp_path.iterdir() if file.name.startswith(".")]
