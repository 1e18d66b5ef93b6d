"""Cases that run in a process of their own: all of them, each told by name as it passes or fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_failed: list[str] = []


@contextmanager
def case(*what: object) -> Iterator[list[str]]:
    """One case. What its block puts into the list is printed behind its name; a failure does not stop the others."""
    name, told = " ".join(map(str, what)), []
    try:
        yield told
    except Exception:
        _failed.append(name)
        print("failed", name, flush=True)
        print(f"-- {name}\n{traceback.format_exc()[-1500:]}", file=sys.stderr, flush=True)
    else:
        print("ok", name, *told, flush=True)


def finish() -> None:
    """The end of the process: its exit code says whether all cases passed."""
    sys.exit(1 if _failed else 0)


def run(root: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A module in a fresh process: Triton reads its mode when it is imported."""
    keep = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", *arguments]
    env = {**keep, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)


def check_cases(root: Path, count: int, *arguments: str, **environment: str) -> None:
    """Runs such a module in Triton's interpreter and fails with the names of the cases that failed or did not run."""
    done = run(root, *arguments, TRITON_INTERPRET="1", **environment)
    lines = done.stdout.splitlines()
    failed = [line.removeprefix("failed ") for line in lines if line.startswith("failed ")]
    passed = [line.removeprefix("ok ") for line in lines if line.startswith("ok ")]
    assert not failed, f"{len(failed)} of {len(failed) + len(passed)} cases failed: {failed}\n{done.stderr[-6000:]}"
    assert done.returncode == 0, f"it ended after {passed[-1:]}:\n{done.stderr[-3000:]}"
    assert len(passed) == count, f"{len(passed)} cases ran where {count} should: {passed}"


def fitting(root: Path, capability: int, *flags: str) -> list[dict[str, Any]]:
    """What ``compile_for`` says of its kernels: none takes more shared memory than a GPU has."""
    done = run(root, "tests.kernels.compile_for", str(capability), *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for kernel in found:
        assert kernel["shared"] <= kernel["allowed"], kernel
    return found


def compiled(root: Path, capability: int, *flags: str) -> list[dict[str, Any]]:
    """:func:`fitting`, of kernels that all use the GPU's matrix units."""
    found = fitting(root, capability, *flags)
    for kernel in found:
        if "float32" not in kernel["case"] and "summary" not in kernel["kernel"]:
            unit = {80: "mma", 89: "mma", 90: "wgmma", 100: "tcgen05"}[capability]
            assert kernel[unit], f"the matrix units of sm{capability} are not used: {kernel}"
    return found
