"""The CPU kernel for ARM, compiled by a cross compiler and run by an emulator, in the place of this machine's own."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import torch

from diffsparse.kernels.backends.cpu import compiled
from diffsparse.kernels.backends.cpu.compiler import FLAGS

__all__ = ["build", "cannot_emulate", "run_emulated"]

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
_DRIVER = Path(__file__).with_name("drive_attend.c")
_SECONDS = 300


def cannot_emulate() -> str | None:
    """Which program is missing, and the Debian packages that have it; or None."""
    packages = {COMPILER: "gcc-aarch64-linux-gnu libc6-dev-arm64-cross", EMULATOR: "qemu-user"}
    missing = [name for name in packages if shutil.which(name) is None]
    return f"no {missing[0]} (apt-get install {packages[missing[0]]})" if missing else None


def build(folder: Path, *flags: str) -> Path:
    """The program, with warnings of the compiler as errors."""
    program = folder / "drive_attend"
    shared = ("-shared", "-fPIC")
    kept = [flag for flag in FLAGS if flag not in shared]
    source = [f"-I{Path(compiled.__file__).parent}", str(_DRIVER), "-o", str(program), "-lm"]
    command = [COMPILER, "-static", "-Wall", "-Wextra", "-Werror", *kept, *flags, *source]
    subprocess.run(command, check=True, timeout=_SECONDS)
    return program


def _flat(x: torch.Tensor) -> torch.Tensor:
    """Everything between a tensor's first and last element, strides and all."""
    span = 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride())) if x.numel() else 0
    return x.as_strided((span,), (1,))


def _bytes(x: torch.Tensor) -> bytes:
    return _flat(x).clone().view(torch.uint8).numpy().tobytes()


def run_emulated(program: Path, part: list[Any]) -> str:
    """What ``compiled._run`` does with prepared heads; returns the kernel's instruction set."""
    isa = ""
    for head in part:
        given, result = program.with_name("given"), program.with_name("result")
        buffers = [None if x is None else _bytes(x) for x in head.tensors]
        sizes = struct.pack(f"{len(buffers)}q", *(-1 if x is None else len(x) for x in buffers))
        rest = bytes(head.c)[8 * len(buffers) :]
        given.write_bytes(sizes + b"".join(x for x in buffers if x is not None) + rest)
        command = [EMULATOR, str(program), str(given), str(result)]
        isa = subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS).stdout.strip()
        found, begin = bytearray(result.read_bytes()), 0
        for x in head.tensors[-2:]:
            if x is not None:
                flat = _flat(x)
                flat.copy_(torch.frombuffer(found, dtype=x.dtype, count=len(flat), offset=begin))
                begin += flat.nbytes
        assert begin == len(found)
    return isa
