"""The search's record: values survive, and whatever is wrong with the file is one line that says what to do."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import diffsparse
from diffsparse.search import store as stores
from diffsparse.search.errors import BadInput
from diffsparse.search.store import SearchStore, StoreDamaged, StoreLocked, StoreMismatch


def test_values_survive(tmp_path):
    path = tmp_path / "deep" / "search.sqlite"
    with SearchStore(path) as store:
        assert not store.claim({"seed": 1, "orders": ("a", "b")})
        store.put_json("a/x", {"k": [1, 2.5]})
        store.put_arrays("a/y", {"m": np.eye(3, dtype=np.float32)})
    with SearchStore(path) as store:
        assert store.claim({"seed": 1, "orders": ("a", "b")})
        assert store.get_json("a/x") == {"k": [1, 2.5]}
        assert np.array_equal(store.get_arrays("a/y")["m"], np.eye(3))
        assert store.names("a/") == ["a/x", "a/y"]
        assert "a/z" not in store
        with pytest.raises(KeyError):
            store.get_json("a/y")


def test_what_is_deleted_is_not_on_the_disk_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sqlite's journal holds what a transaction deletes, and stays there as long as the file is open."""
    monkeypatch.setattr(stores, "TAKEN_BYTES", 200_000)
    rng = np.random.default_rng(0)
    with SearchStore(tmp_path / "s") as store:
        for i in range(20):
            store.put_arrays(f"map/{i}", {"m": rng.integers(0, 256, 100_000).astype(np.uint8)})
        store.put_json("kept", 1)
        written = 0

        def most(*_: Any) -> None:
            nonlocal written
            written = max(written, sum(f.stat().st_size for f in tmp_path.glob("s-*")))

        store._db.set_trace_callback(lambda _: most())
        store.remove("map/")
        store._db.set_trace_callback(None)
        most()
        assert 0 < written < 500_000
        assert sum(f.stat().st_size for f in tmp_path.glob("s-*")) < 10_000
        assert store.names() == ["kept"]


def test_another_search_is_refused_by_the_setting_that_differs(tmp_path):
    with SearchStore(tmp_path / "s") as store:
        store.claim({"seed": 1, "steps": 8})
        assert store.claim({"seed": 1, "steps": 8, "of a later version": None})
        with pytest.raises(StoreMismatch, match=r"other settings \(seed\)"):
            store.claim({"seed": 2, "steps": 8})


def test_a_file_that_is_no_store_is_refused(tmp_path):
    (tmp_path / "s").write_text("hello" * 500)
    with pytest.raises(StoreMismatch, match="not a search record"):
        SearchStore(tmp_path / "s")


# -- the file cannot be had --------------------------------------------------------------------------------------------


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_record_that_another_search_is_writing_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "LOCK_SECONDS", 0.1)
    path = tmp_path / "search.sqlite"
    with SearchStore(path) as first:
        first.claim({"seed": 1})
        told = (
            rf"another search is running on {path} \(process {os.getpid()} on .+, since 2\d{{3}}-.{{5}} .{{8}}\); wait"
        )
        for reading in (False, True):
            with pytest.raises(StoreLocked, match=told) as caught:
                SearchStore(path, reading=reading)
        assert "move" not in str(caught.value) and "delete" not in str(caught.value)
        # The same from another process, which holds to sqlite's locks.
        other = python(
            "import sqlite3, sys; sqlite3.connect(sys.argv[1], timeout=0.1).execute('SELECT * FROM item')", path
        )
        assert "database is locked" in other.stderr
        first.put_json("x", 1)
    with SearchStore(path) as again:
        assert again.claim({"seed": 1}) and again.get_json("x") == 1


def test_a_search_that_was_killed_holds_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "search.sqlite"
    code = """
        import os, pathlib, sys
        from diffsparse.search.store import SearchStore
        store = SearchStore(pathlib.Path(sys.argv[1]))
        store.put_json("x", 1)
        os.kill(os.getpid(), 9)
    """
    assert python(code, path).returncode == -9
    assert (tmp_path / "search.sqlite.holder").is_file(), "what says who had it is left behind"
    with SearchStore(path, reading=True) as store:
        assert store.get_json("x") == 1
    with SearchStore(path) as store:
        assert store.get_json("x") == 1
        with pytest.raises(StoreLocked, match=f"process {os.getpid()} on"):
            SearchStore(path)
    assert list(tmp_path.iterdir()) == [path]


def test_who_has_a_record_is_told_where_that_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "LOCK_SECONDS", 0.1)
    path = tmp_path / "search.sqlite"
    with SearchStore(path):
        (tmp_path / "search.sqlite.holder").write_text("{")
        with pytest.raises(StoreLocked, match=f"another search is running on {path}; wait"):
            SearchStore(path)
        (tmp_path / "search.sqlite.holder").unlink()
        with pytest.raises(StoreLocked, match=f"another search is running on {path}; wait"):
            SearchStore(path)


# -- formats -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [0, 10, stores.STORE_FORMAT + 1])
@pytest.mark.parametrize("reading", [False, True])
def test_a_record_of_another_format_is_refused_and_left_as_it_is(tmp_path: Path, known: int, reading: bool) -> None:
    path = tmp_path / "search.sqlite"
    with SearchStore(path) as store:
        store.claim({"seed": 1})
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {known}")
    db.close()
    before, ours = path.read_bytes(), stores.STORE_FORMAT
    if known > ours:
        told = (
            rf"a newer diffsparse \(format {known}, this one reads {ours}\); update diffsparse, or choose another --out"
        )
    else:
        told = rf"an older diffsparse \(format {known or 'below 10'}, this one reads {ours}\); delete it to search anew"
    with pytest.raises(StoreMismatch, match=told) as caught:
        SearchStore(path, reading=reading)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_record_of_another_version_is_refused_by_its_version(tmp_path: Path) -> None:
    path = tmp_path / "search.sqlite"
    with SearchStore(path) as store:
        store.claim({"version": "0.0.9", "seed": 1})
    with SearchStore(path, reading=True) as store:
        told = rf"the record of diffsparse 0\.0\.9, and this is {diffsparse.__version__}; go on with that version"
        with pytest.raises(StoreMismatch, match=told):
            store.check_version()
        with pytest.raises(StoreMismatch, match=told):
            store.claim({"version": diffsparse.__version__, "seed": 1})


def test_an_empty_file_is_a_new_record_and_none_to_read(tmp_path: Path) -> None:
    path = tmp_path / "search.sqlite"
    path.touch()
    with pytest.raises(StoreMismatch, match="an older diffsparse"):
        SearchStore(path, reading=True)
    with SearchStore(path) as store:
        assert not store.claim({"seed": 1})


def test_a_record_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, connect = tmp_path / "search.sqlite", sqlite3.connect
    path.touch()
    monkeypatch.setattr(sqlite3, "connect", lambda file, **k: connect(f"file:{file}?mode=ro", **k | {"uri": True}))
    with pytest.raises(BadInput, match="cannot be read or written"):
        SearchStore(path)


def test_where_no_record_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot write to"):
        SearchStore(tmp_path / "file" / "search.sqlite")
    (tmp_path / "search.sqlite").mkdir()
    with pytest.raises(BadInput, match=r"cannot be read or written \(unable to open"):
        SearchStore(tmp_path / "search.sqlite")


# -- no room -----------------------------------------------------------------------------------------------------------

FILL = """
    import pathlib, sys
    import numpy as np
    from diffsparse.search.errors import DiskFull
    from diffsparse.search.store import SearchStore

    if sys.argv[2] != "0":
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
    written = 0
    try:
        with SearchStore(pathlib.Path(sys.argv[1])) as store:
            store.claim({"seed": 1})
            while written < 200:
                store.put_arrays(f"x/{written}", {"m": np.random.default_rng(written).random((20, 20))})
                written += 1
    except DiskFull as error:
        print(error)
    print(written)
"""


def check_full_then_resumed(path: Path, said: str, count: int) -> None:
    then = "free some space, then run the same command again to go on from there"
    assert said == f"the disk is full: no room to write {path}; {then}"
    with SearchStore(path) as store:
        claimed = "identity" in store
        assert store.claim({"seed": 1}) == claimed and (claimed or count == 0)
        for i in range(count):
            assert np.array_equal(store.get_arrays(f"x/{i}")["m"], np.random.default_rng(i).random((20, 20)))
        store.put_json("more", 1)


@pytest.mark.parametrize("limit", [4096, 8192, 16384, 65536])
def test_a_file_that_may_not_grow_loses_nothing(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "search.sqlite"
    done = python(FILL, path, limit)
    assert done.returncode == 0, done.stderr
    said, count = done.stdout.splitlines()
    assert int(count) < 200 and (limit < 65536 or int(count) > 5)
    check_full_then_resumed(path, said, int(count))


@pytest.mark.parametrize("room", [4, 8, 12, 16, 64])
def test_a_full_file_system_loses_nothing(tmp_path: Path, room: int) -> None:
    """With so many KiB of room. Mounting takes rights; without them the limit on a file's length stands for it."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={room}k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small file system; the test above limits a file's length instead")
    try:
        done = python(FILL, place / "search.sqlite", 0)
        assert done.returncode == 0, done.stderr
        said, count = done.stdout.splitlines()
        grow = ["mount", "-o", "remount,size=1m", str(place)]
        subprocess.run(grow, check=True)
        check_full_then_resumed(place / "search.sqlite", said, int(count))
    finally:
        subprocess.run(["umount", str(place)], check=True)


# -- damage ------------------------------------------------------------------------------------------------------------


def fill(path: Path) -> dict[str, Any]:
    """A record of a few dozen pages, and what it holds."""
    held: dict[str, Any] = {f"effect/{i}": i / 7 for i in range(120)}
    with SearchStore(path) as store:
        store.claim({"seed": 1})
        for name, value in held.items():
            store.put_json(name, value)
        for i in range(6):
            held[f"trace/{i}"] = np.random.default_rng(i).random((30, 30))
            store.put_arrays(f"trace/{i}", {"m": held[f"trace/{i}"]})
    return held


def use(path: Path, held: dict[str, Any]) -> None:
    """What a search that goes on does: what is there is read, the rest is written."""
    with SearchStore(path) as store:
        store.claim({"seed": 1})
        for name, value in held.items():
            if name not in store:
                (store.put_json if isinstance(value, float) else lambda n, v: store.put_arrays(n, {"m": v}))(
                    name, value
                )
            if isinstance(value, float):
                assert store.get_json(name) == value
            else:
                assert np.array_equal(store.get_arrays(name)["m"], value)


@pytest.mark.parametrize("damage", ["zeros", "noise", "one byte", "cut"])
def test_damaged_pages_end_in_one_line(tmp_path: Path, damage: str) -> None:
    whole = tmp_path / "whole"
    held = fill(whole)
    content = whole.read_bytes()
    pages, path, ends = len(content) // 4096, tmp_path / "damaged", []
    rng = np.random.default_rng(0)
    for page in range(pages):
        spoilt = bytearray(content)
        at = slice(4096 * page, 4096 * (page + 1))
        if damage == "zeros":
            spoilt[at] = bytes(4096)
        elif damage == "noise":
            spoilt[at] = rng.bytes(4096)
        elif damage == "one byte":
            spoilt[4096 * page + int(rng.integers(4096))] ^= 1 << int(rng.integers(8))
        else:
            del spoilt[at.start + 100 :]
        path.write_bytes(bytes(spoilt))
        try:
            use(path, held)
            ends.append("fine")
        except (StoreDamaged, StoreMismatch) as error:
            text = str(error)
            assert str(path) in text and "\n" not in text and len(text) < 400
            assert "delete it" in text or "choose another --out" in text
            ends.append(type(error).__name__)
    assert "StoreDamaged" in ends
    use(whole, held)


def test_what_was_changed_since_it_was_written_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    fill(path)
    for change, message in (
        ("UPDATE item SET value = CAST('0.5' AS BLOB) WHERE name = 'effect/3'", "effect/3 is not what was written"),
        ("UPDATE item SET kind = 'npz' WHERE name = 'effect/3'", "effect/3 is not what was written"),
        ("UPDATE item SET value = 5, kind = 'json' WHERE name = 'effect/3'", "effect/3 is not what was written"),
        ("UPDATE item SET value = CAST('{' AS BLOB), kind = 'json' WHERE name = 'effect/3'", "effect/3 cannot be read"),
        ("DELETE FROM item WHERE name = 'effect/3'", "it lacks effect/3"),
        ("DROP TABLE item", "it lacks effect/3"),
    ):
        with sqlite3.connect(path) as db:
            db.execute(change)
        db.close()
        with SearchStore(path) as store, pytest.raises(StoreDamaged, match="delete it to search anew") as caught:
            store.get_json("effect/3")
        assert message in str(caught.value)


def test_a_record_without_its_settings_is_no_new_one(tmp_path: Path) -> None:
    path = tmp_path / "s"
    fill(path)
    with sqlite3.connect(path) as db:
        db.execute("DELETE FROM item WHERE name = 'identity'")
    db.close()
    with SearchStore(path) as store, pytest.raises(StoreDamaged, match="lacks the search's settings"):
        store.claim({"seed": 1})


def test_values_of_before_there_were_checksums_are_read(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with SearchStore(path) as store:
        store.put_json("x", 0.5)
    with sqlite3.connect(path) as db:
        db.execute("UPDATE item SET kind = 'json'")
    db.close()
    with SearchStore(path) as store:
        assert store.get_json("x") == 0.5
