"""How the work of a search's stages is shared out over ranks.

A stage gives :func:`share` a function and what it is to be done for. Rank 0 does it with everything it has; the others
wait in :func:`serve`. Each rank stores what it finds in a file of its own beside the search's record, so that nothing
is lost where one is killed, and when all are through rank 0 takes the files into the record.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsparse.search.apart import PREFIXES, Apart
from diffsparse.search.errors import BadInput
from diffsparse.search.holder import let_go
from diffsparse.search.ranks import Ranks
from diffsparse.search.store import SearchStore

if TYPE_CHECKING:
    from diffsparse.search.workspace import Workspace

__all__ = ["discard", "rank_file", "remove_files", "serve", "share", "shared_store"]

#: What says of a rank's file which record it belongs to.
RECORD = "record"
#: Values that ranks measure anew where they were of another kind; the others have no need of them.
NOT_GIVEN = "validation/"


def rank_file(store: SearchStore, name: str) -> Path:
    """A file beside a search's record: ``search.rank1.sqlite``."""
    return store.path.with_name(f"{store.path.stem}.{name}{store.path.suffix}")


def discard(path: Path) -> None:
    """Remove such a file, with what sqlite would take back of a write in which a process was killed."""
    for each in (path, path.with_name(f"{path.name}-journal")):
        each.unlink(missing_ok=True)
    let_go(path)  # of a process that was killed


@contextmanager
def shared_store(store: SearchStore) -> Iterator[Apart]:
    """Within, the file beside a record for what is to be added up, with all that ranks have stored before they ended.

    It is removed at the end, but not where something was raised.
    """
    path = rank_file(store, "apart")
    if RECORD not in store:
        store.put_json(RECORD, uuid.uuid4().hex)
    record = store.get_json(RECORD)
    if path.exists():
        with SearchStore(path) as known:
            belongs = RECORD in known and known.get_json(RECORD) == record
        if not belongs:
            discard(path)
    with SearchStore(path) as aside:
        aside.put_json(RECORD, record)
        _collect(store, aside)
        yield Apart(aside)
    discard(path)


def _collect(store: SearchStore, aside: SearchStore) -> None:
    """Take what ranks have stored, also where they were killed, and remove their files."""
    for path in sorted(store.path.parent.glob(rank_file(store, "rank*").name)):
        with SearchStore(path) as found:
            if RECORD in found and found.get_json(RECORD) == store.get_json(RECORD):
                aside.take(found, PREFIXES)
                store.take(found, without=PREFIXES)
        discard(path)


def remove_files(store: SearchStore) -> None:
    """Remove what searches that were shared and killed have left beside a record that is complete now."""
    for name in ("apart", "maps", "rank*"):
        for path in store.path.parent.glob(rank_file(store, name).name):
            discard(path)


def share(work: Workspace, function: Callable[..., None], items: Sequence[Any], *given: Any) -> None:
    """``function(work, items, *given)``, which stores what it finds, with every rank taking a part of the items.

    Item ``i`` is of rank ``i`` modulo their number. ``function`` belongs to a module; ``given`` is sent to all ranks.
    Values of the record in JSON are there in each of them, arrays are not. Without ranks it is a plain call.
    """
    ranks = work.ranks
    if ranks is None:
        function(work, list(items), *given)
        return
    aside = work.apart.store  # type: ignore[union-attr]
    known = [row for row in [*aside.rows("json"), *work.store.rows("json")] if not row[0].startswith(NOT_GIVEN)]
    ranks.give(("share", (function, list(items), given, known, frozenset(aside.names(PREFIXES[0])))))
    with ranks.together():
        function(work, list(items)[:: ranks.count], *given)
    _collect(work.store, aside)


def serve(workspace: Callable[[SearchStore], Workspace], ranks: Ranks, path: Path) -> None:
    """Do what rank 0 says until it ends the search. ``path``: of the search's record.

    Raises :class:`BadInput` where the search failed.
    """
    work: Workspace | None = None
    own = path.with_name(f"{path.stem}.rank{ranks.rank}{path.suffix}")
    while True:
        what, told = ranks.give()
        if what == "end":
            ranks.settle()
            if told is not None:
                raise BadInput(told)
            return
        function, items, given, known, stored = told
        with ranks.together(), SearchStore(own) as store:
            store.put_rows(known)
            work = workspace(store) if work is None else work
            work.store, work.apart = store, Apart(store, stored)
            function(work, items[ranks.rank :: ranks.count], *given)
