"""What a search has found so far, in one sqlite file, so that it goes on where it was killed."""

from __future__ import annotations

import io
import json
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["SearchStore", "StoreMismatch"]


class StoreMismatch(ValueError):
    """The folder holds another search."""


class SearchStore:
    """Named JSON values and arrays, each written in a transaction of its own. A context manager."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        try:
            self._db = sqlite3.connect(path)
            self._db.execute("CREATE TABLE IF NOT EXISTS item (name TEXT PRIMARY KEY, kind TEXT, value BLOB)")
            self._db.commit()
        except sqlite3.DatabaseError as error:
            raise StoreMismatch(
                f"{path} is not a search record ({error}); move it away or choose another --out"
            ) from error

    def __enter__(self) -> SearchStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self._db.close()

    def __contains__(self, name: str) -> bool:
        return self._db.execute("SELECT 1 FROM item WHERE name = ?", (name,)).fetchone() is not None

    def _put(self, name: str, kind: str, value: bytes) -> None:
        with self._db:
            self._db.execute("INSERT OR REPLACE INTO item VALUES (?, ?, ?)", (name, kind, value))

    def _get(self, name: str, kind: str) -> bytes:
        row = self._db.execute("SELECT value FROM item WHERE name = ? AND kind = ?", (name, kind)).fetchone()
        if row is None:
            raise KeyError(name)
        return bytes(row[0])

    def put_json(self, name: str, value: Any) -> None:
        self._put(name, "json", json.dumps(value, allow_nan=False).encode())

    def get_json(self, name: str) -> Any:
        return json.loads(self._get(name, "json"))

    def put_arrays(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        self._put(name, "npz", buffer.getvalue())

    def get_arrays(self, name: str) -> dict[str, np.ndarray]:
        with np.load(io.BytesIO(self._get(name, "npz")), allow_pickle=False) as data:
            return {key: data[key] for key in data.files}

    def names(self, prefix: str = "") -> list[str]:
        rows = self._db.execute("SELECT name FROM item WHERE name LIKE ? ORDER BY name", (prefix + "%",))
        return [row[0] for row in rows]

    def claim(self, identity: dict[str, Any]) -> bool:
        """Bind the file to a search's settings; True where it already held that same search.

        A setting that is missing on one side, because that version had none, counts as None.
        Raises :class:`StoreMismatch` naming the setting that differs.
        """
        if "identity" not in self:
            self.put_json("identity", identity)
            return False
        known = self.get_json("identity")
        wanted = json.loads(json.dumps(identity))
        if differing := sorted(k for k in {*known, *wanted} if known.get(k) != wanted.get(k)):
            raise StoreMismatch(
                f"{self.path} holds a search with other settings ({', '.join(differing)}); "
                "use the same settings to go on with it, or another --out"
            )
        return True
