"""Who has a search's record open: a small file beside it, for the message that a second search ends with.

It locks nothing. Sqlite's own lock does, and the system takes that back from a process that was killed; the file that
such a process leaves behind is written over by the next one.
"""

from __future__ import annotations

import json
import os
import socket
from datetime import datetime
from pathlib import Path

from diffsparse.search.errors import writing

__all__ = ["let_go", "of", "take"]


def _beside(record: Path) -> Path:
    return record.with_name(record.name + ".holder")


def take(record: Path) -> None:
    """Say that this process has the record from now on."""
    about = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now().strftime("%Y-%m-%d %H:%M:%S")}
    with writing(record, then="run the same command again to go on from there"):
        _beside(record).write_text(json.dumps(about), "utf-8")


def let_go(record: Path) -> None:
    """This process is about to close it."""
    _beside(record).unlink(missing_ok=True)


def of(record: Path) -> str:
    """Who has it, in brackets, after a space; nothing where that is not known."""
    try:
        about = json.loads(_beside(record).read_text("utf-8"))
        return f" (process {int(about['pid'])} on {about['host']!s:.60}, since {about['since']!s:.20})"
    except (OSError, ValueError, KeyError, TypeError):  # it was just closed, or somebody changed the file
        return ""
