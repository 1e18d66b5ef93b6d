"""What each user of the demo has: a folder, a job that can be cancelled, plans and clips. Nothing is shared."""

from __future__ import annotations

import shutil
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffsparse.search.demo.compare import Comparison
    from diffsparse.search.demo.inspector import PlanView

__all__ = ["Job", "Session", "Sessions"]


@dataclass(eq=False)
class Job:
    """A generation or search that was asked for. It may still wait for its turn when it is cancelled.

    ``started``: its turn has come.
    """

    cancelled: threading.Event = field(default_factory=threading.Event)
    started: bool = False


@dataclass(eq=False)
class Session:
    """One page in one browser.

    ``folder``: deleted with the session. ``uploaded``: the plan that was brought. ``searched``: the one that was
    searched here. ``view``: what the Inspect tab shows.
    ``comparison``: the last pair of clips.
    """

    folder: Path
    job: Job | None = None
    uploaded: PlanView | None = None
    searched: PlanView | None = None
    view: PlanView | None = None
    comparison: Comparison | None = None

    def begin(self) -> Job:
        """A new job; one that is still under way is cancelled."""
        self.cancel()
        self.job = Job()
        return self.job

    def cancel(self) -> bool:
        """Ask the job to stop; False where there is none."""
        if self.job is None or self.job.cancelled.is_set():
            return False
        self.job.cancelled.set()
        return True

    def done(self, job: Job) -> None:
        """The job has ended; a newer one is left alone."""
        if self.job is job:
            self.job = None

    def new_folder(self) -> Path:
        """An empty folder of this session's own."""
        return Path(tempfile.mkdtemp(dir=self.folder))


class Sessions:
    """Sessions by their key. Safe to use from several threads."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._known: dict[str, Session] = {}

    def of(self, key: str) -> Session:
        """The session, made if it is new."""
        with self._lock:
            if key not in self._known:
                self._known[key] = Session(Path(tempfile.mkdtemp(prefix="user-", dir=self._root)))
            return self._known[key]

    def end(self, key: str) -> None:
        """The page was closed: its job stops and its files go."""
        with self._lock:
            session = self._known.pop(key, None)
        if session is not None:
            session.cancel()
            shutil.rmtree(session.folder, ignore_errors=True)  # a job that is stopping may still write a file

    def close(self) -> None:
        """Ends every session."""
        for key in list(self._known):
            self.end(key)

    def __len__(self) -> int:
        return len(self._known)
