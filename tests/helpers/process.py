"""Python in a fresh process, without what this process or its environment has set up."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_python(
    code: str,
    *,
    python: str | Path = sys.executable,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> str:
    """Runs ``python -c code`` and returns what it printed; a failure shows both streams.

    From the clone's root ``diffsparse`` is the clone's, as the working directory comes first on the path.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST"))}
    done = subprocess.run(
        [str(python), "-c", code],
        cwd=cwd,
        env={**kept, **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


def run_script(*arguments: object, timeout: float = 600, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs ``python ARGUMENTS`` (a script, or ``-m`` and a module) in the clone's root, whatever its exit code.

    ``diffsparse`` is the clone's. Nothing is asked of a terminal, no colours are printed, and the pytest that runs is
    not seen. ``environment``: variables on top of this process's own.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**kept, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def heed_ctrl_c() -> None:
    """What a shell starts in the background, this suite perhaps, ignores Ctrl-C, and so does all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def free_port() -> int:
    """One of this machine's ports that nobody has."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
