"""Prompts that are traced at once, their masks judged afterwards: the record is that of one prompt after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from diffsparse.pipelines import architecture_of
from diffsparse.search.inputs import as_inputs
from diffsparse.search.search import SearchConfig
from diffsparse.search.sharing import shared_store
from diffsparse.search.stages import trace
from diffsparse.search.stages.probe import run_probe
from diffsparse.search.stages.trace import run_trace
from diffsparse.search.store import SearchStore
from diffsparse.search.workspace import Workspace
from tests.search.tiny import PROMPTS, config

TEXTS = [*PROMPTS, "a red square"]


class One:
    """Ranks of which this process does all the work, one after another: what it is told it tells itself."""

    def __init__(self, count: int) -> None:
        self.rank, self.leads, self.count = 0, True, count

    def give(self, value: Any = None, source: int = 0) -> Any:
        return value


def do_all(work: Workspace, function: Callable[..., None], items: list[Any], *given: Any) -> None:
    function(work, items, *given)


@pytest.fixture(scope="module", autouse=True)
def all_work() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "share", do_all)
        yield


def quiet(*_: Any) -> None:
    pass


def workspace(pipe: Any, store: SearchStore, settings: SearchConfig, ranks: int) -> Workspace:
    inputs = as_inputs(TEXTS)
    members: Any = One(ranks) if ranks > 1 else None
    found = settings.resolved(pipe, inputs[0].arguments).for_heads(architecture_of(pipe.transformer).head_dim)
    return Workspace(pipe, inputs, found, store, False, quiet, quiet, ranks=members)


def trace_all(pipe: Any, path: Path, ranks: int = 3, **changes: Any) -> dict[str, tuple[str, bytes]]:
    """What the record holds after the trace."""
    with SearchStore(path / "search.sqlite") as store:
        work = workspace(pipe, store, config(trace_prompts=3, **changes), ranks)
        run_probe(work, quiet)
        store.put_json("probe", store.get_json("probe") | {"forward_seconds": 1.0})
        if ranks > 1:
            with shared_store(store) as work.apart:
                run_trace(work)
            store.remove("record")
        else:
            run_trace(work)
        return {name: (kind, value) for kind in ("json", "npz") for name, kind, value in store.rows(kind)}


@pytest.fixture(scope="module")
def alone(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, bytes]]:
    return trace_all(pipe, tmp_path_factory.mktemp("alone"), ranks=1)


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_the_record_is_the_same_bit_for_bit(
    pipe: Any, alone: dict[str, tuple[str, bytes]], tmp_path: Path, ranks: int
) -> None:
    found = trace_all(pipe, tmp_path, ranks)
    assert found.keys() == alone.keys() and any(name.startswith("map/3/") for name in found)
    assert [name for name in found if found[name] != alone[name]] == []
    assert [file.name for file in tmp_path.iterdir()] == ["search.sqlite"]


@pytest.mark.parametrize("parts", [1, 2])
def test_also_where_steps_share_a_map(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    monkeypatch.setattr(Workspace, "parts", parts)
    both = [trace_all(pipe, tmp_path / str(ranks), ranks, trace_steps=5) for ranks in (1, 3)]
    assert both[0] == both[1] and {name.split("/")[1] for name in both[0] if name.startswith("sums/")} == {
        str(part) for part in range(parts)
    }


@pytest.mark.parametrize("writes", [3, 9, 14, 23, 29, 33, 38])
def test_a_search_that_was_killed_ends_in_the_same_record(
    pipe: Any, alone: dict[str, tuple[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """With as many ranks or fewer, or in one process."""
    original, left = SearchStore._write, writes

    def dying(self: SearchStore, rows: list[tuple[str, str, bytes]]) -> None:
        nonlocal left
        if (left := left - 1) < 0:
            raise KeyboardInterrupt
        original(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(SearchStore, "_write", dying)
        with pytest.raises(KeyboardInterrupt):
            trace_all(pipe, tmp_path)
    found = trace_all(pipe, tmp_path, 1 + writes % 3)
    found.pop("record", None)
    assert {name for name in found if found[name] != alone.get(name)} <= {"probe"}


def test_what_is_stored_is_not_measured_again(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    scored: list[int] = []
    original = trace._trace

    def noting(work: Workspace, p: int, apart: bool = False) -> None:
        scored.append(p)
        original(work, p, apart)

    monkeypatch.setattr(trace, "_trace", noting)
    with monkeypatch.context() as patch:
        patch.setattr(trace, "put_maps", stop)
        with pytest.raises(KeyboardInterrupt):
            trace_all(pipe, tmp_path)
    assert scored == [0, 1, 2]
    trace_all(pipe, tmp_path)
    assert scored == [0, 1, 2]


def test_a_rank_of_another_record_is_left_out(tmp_path: Path) -> None:
    with SearchStore(tmp_path / "search.rank1.sqlite") as other:
        other.put_json("record", "another")
        other.put_json("trace/0/levels", [1.0])
    with SearchStore(tmp_path / "search.sqlite") as store, shared_store(store):
        assert store.names() == ["record"]
    assert [file.name for file in tmp_path.iterdir()] == ["search.sqlite"]
