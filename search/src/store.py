"""What a search has found so far, in one sqlite file, so that it goes on where it was killed."""

from __future__ import annotations

import io
import json
import os
import sqlite3
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

import diffsparse
from diffsparse.search import holder
from diffsparse.search.errors import BadInput, DiskFull, disk_is_full

__all__ = ["STORE_FORMAT", "SearchStore", "StoreDamaged", "StoreLocked", "StoreMismatch"]

T = TypeVar("T")

#: Counted up whenever what the store holds changes. Files of before 10 do not say theirs where it is looked for.
STORE_FORMAT = 11
#: How long to wait for another process that has the file, which may be about to end.
LOCK_SECONDS = 2.0
#: Arrays of together so many bytes are compressed.
COMPRESSED_BYTES = 2**18
#: Values of together so many bytes are taken from another file, or deleted, at once.
TAKEN_BYTES = 2**26


class StoreMismatch(BadInput):
    """The folder holds another search, or something else."""


class StoreLocked(BadInput):
    """Another process is searching with the file."""


class StoreDamaged(BadInput, KeyError):
    """The file lacks what it must have, or holds what was never written."""

    __str__ = BaseException.__str__  # that of KeyError quotes


class SearchStore:
    """Named JSON values and arrays, each written in a transaction of its own. A context manager.

    The file is its process's alone until it is closed: two searches in one folder would undo each other's plan. Every
    value has a checksum. ``noun``, ``anew``: what the file is the record of, and how it is made again, for messages.
    Raises :class:`StoreLocked`, :class:`StoreMismatch`, :class:`StoreDamaged`,
    :class:`~diffsparse.search.errors.DiskFull` and :class:`~diffsparse.search.errors.BadInput`.
    """

    noun, anew = "search", "search anew"

    def __init__(self, path: Path, *, reading: bool = False) -> None:
        """``reading``: of a file that is there and is not written to, which several processes may do at once."""
        self.path, self._reading = path, reading
        # A search that was killed in a write leaves what sqlite takes back first, where it may.
        mode = "ro" if reading and not (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)) else "rw"
        try:
            if not reading:
                path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"cannot write to {str(path.parent)!r}: {error.strerror}; choose another --out") from None
        with self._errors(opening=True):
            name = f"{path.absolute().as_uri()}?mode={mode}" if reading else path
            self._db = sqlite3.connect(name, timeout=LOCK_SECONDS, uri=reading)
        try:
            with self._errors(opening=True):
                if not reading:
                    self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
                    # The journal stays there with that, as large as it ever was.
                    self._db.execute("PRAGMA journal_size_limit = 0")
                    self._db.execute("BEGIN EXCLUSIVE")
                self._check_format()
                if not reading:
                    self._db.execute("CREATE TABLE IF NOT EXISTS item (name TEXT PRIMARY KEY, kind TEXT, value BLOB)")
                    self._db.execute(f"PRAGMA user_version = {STORE_FORMAT}")
                    self._db.commit()
                    holder.take(path)
        except BaseException:
            self._db.close()
            raise

    def _check_format(self) -> None:
        """Raise :class:`StoreMismatch` for a file of an older or a newer format, before anything of it is changed."""
        known = int(self._db.execute("PRAGMA user_version").fetchone()[0])
        is_new = self._db.execute("SELECT 1 FROM sqlite_master").fetchone() is None
        if known == STORE_FORMAT or (is_new and not known and not self._reading):
            return
        if known > STORE_FORMAT:
            raise StoreMismatch(
                f"{self.path} is the record of a newer diffsparse (format {known}, this one reads {STORE_FORMAT}); "
                "update diffsparse, or choose another --out"
            )
        raise StoreMismatch(
            f"{self.path} is the record of an older diffsparse (format {known or 'below 10'}, this one reads "
            f"{STORE_FORMAT}); delete it to {self.anew}, or choose another --out"
        )

    def __enter__(self) -> SearchStore:
        return self

    def __exit__(self, *exc: object) -> None:
        if not self._reading:
            holder.let_go(self.path)
        self._db.close()

    @contextmanager
    def _errors(self, opening: bool = False) -> Iterator[None]:
        """Sqlite's errors as what the user can do about them."""
        try:
            yield
        except sqlite3.Error as error:
            # Errors of the module itself have no code.
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise StoreLocked(
                    f"another {self.noun} is running on {self.path}{holder.of(self.path)}; wait until it has ended, or "
                    "choose another --out"
                ) from error
            # A write that fails for want of space is reported by several names.
            if code == sqlite3.SQLITE_FULL or (
                code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN) and disk_is_full(self.path)
            ):
                raise DiskFull(self.path, "run the same command again to go on from there") from error
            if code == sqlite3.SQLITE_NOTADB and opening:
                raise StoreMismatch(
                    f"{self.path} is not a {self.noun} record ({error}); move it away or choose another --out"
                ) from error
            if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_IOERR):
                raise BadInput(
                    f"the {self.noun}'s record {self.path} cannot be read or written ({error}); "
                    "put that right and run the same command again, or choose another --out"
                ) from error
            raise self._damaged(str(error)) from error

    def _damaged(self, what: str) -> StoreDamaged:
        return StoreDamaged(
            f"the {self.noun}'s record {self.path} is damaged ({what}); delete it to {self.anew}, or choose another "
            "--out"
        )

    def __contains__(self, name: str) -> bool:
        with self._errors():
            return self._db.execute("SELECT 1 FROM item WHERE name = ?", (name,)).fetchone() is not None

    def _put(self, name: str, kind: str, value: bytes) -> None:
        self._write([self._row(name, kind, value)])

    def _write(self, rows: list[tuple[str, str, bytes]]) -> None:
        with self._errors(), self._db:
            self._db.executemany("INSERT OR REPLACE INTO item VALUES (?, ?, ?)", rows)

    @staticmethod
    def _row(name: str, kind: str, value: bytes) -> tuple[str, str, bytes]:
        return name, f"{kind} {zlib.crc32(name.encode() + value):08x}", value

    def _get(self, name: str, kind: str) -> bytes:
        with self._errors():
            row = self._db.execute("SELECT kind, value FROM item WHERE name = ?", (name,)).fetchone()
        if row is None:
            raise self._damaged(f"it lacks {name}")
        known, value = row
        # Records of before have no checksums.
        if not isinstance(value, bytes) or known not in (kind, f"{kind} {zlib.crc32(name.encode() + value):08x}"):
            raise self._damaged(f"{name} is not what was written")
        return value

    def put_json(self, name: str, value: Any) -> None:
        self._put(name, "json", json.dumps(value, allow_nan=False).encode())

    def get_json(self, name: str) -> Any:
        value = self._get(name, "json")
        try:
            return json.loads(value)
        except ValueError as error:
            raise self._damaged(f"{name} cannot be read") from error

    def read_json(self, name: str, parse: Callable[[Any], T]) -> T:
        """A value as ``parse`` makes it, which raises ``ValueError``, ``KeyError`` or ``TypeError`` where it cannot."""
        value = self.get_json(name)
        try:
            return parse(value)
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(f"{name} cannot be read") from error

    def put_arrays(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        self.put_all({name: arrays})

    def put_all(self, named: dict[str, dict[str, np.ndarray]]) -> None:
        """Several values of arrays, all or none of them."""
        rows = []
        for name, arrays in named.items():
            buffer = io.BytesIO()
            # Of large arrays, which are codes, little could be saved, and it would take longer than to measure them.
            write = np.savez if sum(a.nbytes for a in arrays.values()) > COMPRESSED_BYTES else np.savez_compressed
            write(buffer, **arrays)  # type: ignore[arg-type]
            rows.append(self._row(name, "npz", buffer.getvalue()))
        self._write(rows)

    def get_arrays(self, name: str) -> dict[str, np.ndarray]:
        value = self._get(name, "npz")
        try:
            with np.load(io.BytesIO(value), allow_pickle=False) as data:
                return {key: data[key] for key in data.files}
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise self._damaged(f"{name} cannot be read") from error

    def remove(self, prefix: str) -> None:
        """Delete all values whose names begin so; what they took is there for others.

        Where it is interrupted some of them are still there.
        """
        with self._errors():
            found = self._db.execute(
                "SELECT name, length(value) FROM item WHERE substr(name, 1, ?) = ?", (len(prefix), prefix)
            ).fetchall()
        # The journal holds what a transaction deletes: the disk must not have to hold all of it twice.
        for names in _batches(found):
            with self._errors(), self._db:
                self._db.executemany("DELETE FROM item WHERE name = ?", [(name,) for name in names])

    def names(self, prefix: str = "") -> list[str]:
        with self._errors():
            rows = self._db.execute("SELECT name FROM item WHERE name LIKE ? ORDER BY name", (prefix + "%",))
            return [row[0] for row in rows]

    def rows(self, kind: str) -> list[tuple[str, str, bytes]]:
        """All values of a kind, ``json`` or ``npz``, as the file has them."""
        with self._errors():
            return self._db.execute("SELECT name, kind, value FROM item WHERE kind LIKE ?", (kind + "%",)).fetchall()

    def put_rows(self, rows: Sequence[tuple[str, str, bytes]]) -> None:
        """Values as another file has them."""
        self._write(list(rows))

    def take(self, other: SearchStore, prefixes: tuple[str, ...] = ("",), without: tuple[str, ...] = ()) -> None:
        """Values of another file whose names begin so, and not so, in the place of those of the same names."""
        rows: list[tuple[str, str, bytes]] = []
        for name in other.names():
            if not name.startswith(prefixes) or name.startswith(without):
                continue
            with other._errors():
                rows.append(other._db.execute("SELECT name, kind, value FROM item WHERE name = ?", (name,)).fetchone())
            if sum(len(row[2]) for row in rows) > TAKEN_BYTES:
                self._write(rows)
                rows = []
        self._write(rows)

    def claim(self, identity: dict[str, Any]) -> bool:
        """Bind the file to a search's settings; True where it already held that same search.

        A setting that is missing on one side, because that version had none, counts as None.
        Raises :class:`StoreMismatch` naming the setting that differs.
        """
        if "identity" not in self:
            if self.names():
                raise self._damaged(f"it lacks the {self.noun}'s settings")
            self.put_json("identity", identity)
            return False
        known = self.get_json("identity")
        self._check_version(known)
        wanted = json.loads(json.dumps(identity))
        if differing := sorted(k for k in {*known, *wanted} if known.get(k) != wanted.get(k)):
            raise StoreMismatch(
                f"{self.path} holds a {self.noun} with other settings ({', '.join(differing)}); "
                "use the same settings to go on with it, or another --out"
            )
        return True

    def check_version(self) -> None:
        """Raise :class:`StoreMismatch` where another version of diffsparse wrote the file."""
        self._check_version(self.get_json("identity"))

    def _check_version(self, identity: dict[str, Any]) -> None:
        if (wrote := identity.get("version")) not in (None, diffsparse.__version__):
            raise StoreMismatch(
                f"{self.path} is the record of diffsparse {wrote}, and this is {diffsparse.__version__}; go on with "
                f"that version, delete it to {self.anew}, or choose another --out"
            )


def _batches(sizes: list[tuple[str, int]]) -> Iterator[list[str]]:
    """Names of values in their order, of together :data:`TAKEN_BYTES` a list; each list has one at least."""
    names: list[str] = []
    held = 0
    for name, size in sizes:
        if names and held + size > TAKEN_BYTES:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    if names:
        yield names
