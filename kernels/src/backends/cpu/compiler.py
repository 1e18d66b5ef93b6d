"""C that is compiled on this machine, for this machine, where there is a compiler; kept for the next process."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from diffsparse.kernels.cache import cache_root

__all__ = ["SWITCH", "compiled_library", "find_compiler"]

logger = logging.getLogger("diffsparse")

#: Set to 0 in the environment, nothing is ever compiled.
SWITCH = "DIFFSPARSE_COMPILE"
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-strict-aliasing", "-shared", "-fPIC", "-lm")
_SECONDS = 60


def find_compiler() -> str | None:
    """``$CC`` or the first of cc, gcc and clang that is there; None without one, or where ``SWITCH`` is 0."""
    if os.environ.get(SWITCH) == "0":
        return None
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and (found := shutil.which(name)):
            return found
    return None


@functools.cache
def compiled_library(source: Path) -> ctypes.CDLL | None:
    """A C file as a shared library, None where there is no compiler or it fails, which is logged.

    Compiled once for a source, a compiler and a processor, and found again under ``cache_root()``.
    """
    compiler = find_compiler()
    if compiler is None:
        return None
    try:
        path = cache_root() / "compiled" / f"{source.stem}-{_key(source, compiler)}.so"
        if not path.exists():
            _compile(compiler, source, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        printed = getattr(error, "stderr", None) or ""
        if isinstance(printed, bytes):  # of a compiler that was stopped for taking too long
            printed = printed.decode(errors="replace")
        lines = printed.split("\n") if printed.strip() else [repr(error)]
        reason = [line for line in lines if line.strip()][-1]
        logger.warning("the CPU backend runs uncompiled, %s failed: %s", compiler, reason)
        return None


def _key(source: Path, compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=_SECONDS)
    parts = (source.read_text(), version.stdout, " ".join(_FLAGS), platform.machine(), _processor())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """What ``-march=native`` goes by: a cache may be shared by machines of different kinds."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    lines = info.read_text().split("\n\n")[0].splitlines()
    return "\n".join(line for line in lines if line.split(":")[0].strip() in ("model name", "flags", "Features"))


def _compile(compiler: str, source: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place and then moved there: another process may be doing the same.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        command = [compiler, str(source), "-o", str(built), *_FLAGS]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=_SECONDS)
        os.replace(built, path)
    logger.info("compiled %s for this processor: %s", source.name, path)
