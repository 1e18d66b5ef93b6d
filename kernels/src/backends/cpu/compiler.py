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
from dataclasses import dataclass
from pathlib import Path

from diffsparse.kernels.cache import cache_root

__all__ = ["FLAGS", "SWITCH", "Compiled", "compile_with", "find_compiler"]

logger = logging.getLogger("diffsparse")

#: Set to 0 in the environment, nothing is ever compiled.
SWITCH = "DIFFSPARSE_COMPILE"
#: With which everything is compiled.
FLAGS = ("-O3", "-fno-math-errno", "-fno-strict-aliasing", "-ffp-contract=fast", "-shared", "-fPIC")
_SECONDS = 60


@dataclass(frozen=True)
class Compiled:
    """What became of a C file: its library, or the reason why there is none, in one line."""

    library: ctypes.CDLL | None
    reason: str | None


def find_compiler() -> str | None:
    """``$CC`` or the first of cc, gcc and clang that is there; None without one."""
    return _first_of((os.environ.get("CC"), "cc", "gcc", "clang"), os.environ.get("PATH"))


@functools.lru_cache(maxsize=16)
def _first_of(names: tuple[str | None, ...], path: str | None) -> str | None:
    return next((found for name in names if name and (found := shutil.which(name, path=path))), None)


@functools.cache
def compile_with(compiler: str, source: Path, flags: tuple[str, ...]) -> Compiled:
    """A C file as a shared library. Where the compiler fails, that is logged.

    Compiled once for a source, a compiler, its flags and a processor, and found again under ``cache_root()``.
    """
    try:
        path = cache_root() / "compiled" / f"{source.stem}-{_key(source, compiler, flags)}.so"
        if not path.exists():
            _compile(compiler, source, flags, path)
        return Compiled(ctypes.CDLL(str(path)), None)
    except (OSError, subprocess.SubprocessError) as error:
        printed = getattr(error, "stderr", None) or ""
        if isinstance(printed, bytes):  # of a compiler that was stopped for taking too long
            printed = printed.decode(errors="replace")
        lines = printed.split("\n") if printed.strip() else [repr(error)]
        reason = [line for line in lines if line.strip()][-1]
        logger.warning("the CPU backend runs uncompiled, %s failed: %s", compiler, reason)
        return Compiled(None, f"{compiler} failed: {reason}")


def _key(source: Path, compiler: str, flags: tuple[str, ...]) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=_SECONDS)
    parts = (source.read_text(), version.stdout, " ".join((*FLAGS, *flags)), platform.machine(), _processor())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """What ``-march=native`` goes by: a cache may be shared by machines of different kinds."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    lines = info.read_text().split("\n\n")[0].splitlines()
    names = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(line for line in lines if line.split(":")[0].strip() in names)


def _compile(compiler: str, source: Path, flags: tuple[str, ...], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place and then moved there: another process may be doing the same.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        command = [compiler, *FLAGS, *flags, str(source), "-o", str(built), "-lm"]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=_SECONDS)
        os.replace(built, path)
    logger.info("compiled %s for this processor: %s", source.name, path)
