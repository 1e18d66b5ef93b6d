"""What the user can put right: one line, and no traceback."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffsparse.saving import is_full

__all__ = ["BadInput", "DiskFull", "disk_is_full", "writing"]

# Less than this is no room: file systems keep some blocks to themselves.
_ROOM = 64 * 1024


class BadInput(ValueError):
    """Input that cannot work: what was wrong, the value received, what is allowed, and what to do next, in one line."""


class DiskFull(BadInput):
    """No room for a file. What was written before is whole."""

    def __init__(self, path: str | os.PathLike[str], then: str = "run the same command again") -> None:
        super().__init__(f"the disk is full: no room to write {path}; free some space, then {then}")


def disk_is_full(path: Path) -> bool:
    """Whether a file cannot grow: tried with another one as long beside it, which also finds quotas and limits."""
    try:
        folder = next(p for p in (path, *path.absolute().parents) if p.is_dir())
        length = path.stat().st_size if path.is_file() else 0
        with tempfile.TemporaryFile(dir=folder) as file:
            file.seek(length)
            file.write(bytes(_ROOM))
    except OSError as error:
        return is_full(error)
    return False


@contextmanager
def writing(path: str | Path, option: str = "--out", then: str = "run the same command again") -> Iterator[None]:
    """Around what writes ``path``, which ``option`` names: ``OSError`` becomes :class:`DiskFull` or another line.

    Some encoders report a full disk in their own words, so the file system is asked too.
    """
    try:
        yield
    except OSError as error:
        if is_full(error) or disk_is_full(Path(path)):
            raise DiskFull(path, then) from error
        # An encoder's message may have many lines.
        reason = error.strerror or (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(f"cannot write {str(path)!r}: {reason}; choose another {option}") from error
