"""Which instruction set the compiled kernel (``attend.c``) uses on this machine, or why there is no compiled kernel.

The compiler decides, for the processor that it finds: AVX-512, else AVX2 with FMA, on ARM NEON. On any other processor
the kernel can be compiled for vectors of 128 bits (``generic``), which is slower than torch's products on x86 and not
measured elsewhere, so that it has to be asked for. ``$DIFFSPARSE_CPU_ISA`` asks for one of those that are there.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from diffsparse.kernels.backends.cpu.compiler import SWITCH, compile_with, find_compiler

__all__ = ["ISA_SWITCH", "Kernel", "find_kernel", "instruction_sets"]

#: Names the instruction set in the environment; ``auto`` and empty leave it to the compiler.
ISA_SWITCH = "DIFFSPARSE_CPU_ISA"
_SOURCE = Path(__file__).with_name("attend.c")
_GENERIC = "-DDIFFSPARSE_GENERIC"
# For each kind of processor: the instruction sets, best first, and the flags that leave the better ones aside.
_X86 = {
    "avx512": ("-march=native",),
    "avx2": ("-march=native", "-mno-avx512f"),
    "generic": ("-march=native", "-mno-avx512f", "-mno-avx", _GENERIC),
}
_ARM = {"neon": ("-mcpu=native",), "generic": ("-mcpu=native", _GENERIC)}
_KINDS = {"x86_64": _X86, "amd64": _X86, "aarch64": _ARM, "arm64": _ARM}
_FAST = "AVX-512, AVX2 with FMA and NEON, without which torch's products are as fast"


@dataclass(frozen=True)
class Kernel:
    """The compiled kernel, or why there is none.

    isa: ``avx512``, ``avx2``, ``neon`` or ``generic``; None without a library. compiler: its path, where there is one.
    reason: why there is no library, in one line.
    """

    library: ctypes.CDLL | None = None
    isa: str | None = None
    compiler: str | None = None
    reason: str | None = None

    def __str__(self) -> str:
        if self.library is None:
            return f"torch's matrix products, as the kernel is not compiled: {self.reason}"
        asked = f" ({ISA_SWITCH})" if _asked() else ""
        return f"compiled kernel for {self.isa}{asked}, by {self.compiler}"


def find_kernel() -> Kernel:
    """The kernel that calls on this machine run in. It is compiled at most once.

    Raises:
        ValueError: ``$DIFFSPARSE_CPU_ISA`` names an instruction set that there is no kernel for, or that this
            processor or the compiler does not have.
        RuntimeError: it names one, and nothing can be compiled. (``DIFFSPARSE_COMPILE=0`` goes before it.)
    """
    asked, flags = _asked(), _flags()
    if asked and asked not in flags:
        raise ValueError(f"{ISA_SWITCH} is {asked!r}; on {platform.machine()} it takes {_either(flags)}")
    if os.environ.get(SWITCH) == "0":
        return Kernel(reason=f"{SWITCH}=0 switches it off")
    compiler = find_compiler()
    if compiler is None:
        kernel = Kernel(reason="no C compiler: neither $CC nor cc, gcc or clang is there")
    else:
        found = compile_with(compiler, _SOURCE, flags[asked or next(iter(flags))])
        if found.library is None:
            kernel = Kernel(compiler=compiler, reason=found.reason)
        elif not asked and _isa(found.library) == "generic":
            kernel = Kernel(compiler=compiler, reason=f"this processor has none of {_FAST}")
        else:
            kernel = Kernel(found.library, _isa(found.library), compiler)
    if asked and kernel.library is None:
        raise RuntimeError(f"{ISA_SWITCH} asks for {asked}, and the kernel cannot be compiled: {kernel.reason}")
    if asked and kernel.isa != asked:
        rest = list(flags)[list(flags).index(str(kernel.isa)) :]
        raise ValueError(
            f"{ISA_SWITCH} asks for {asked}, and {compiler} finds no more than {kernel.isa} on this processor; "
            f"it takes {_either(rest)} here"
        )
    return kernel


def instruction_sets() -> list[str]:
    """Those that the kernel can be compiled for and run with on this machine, best first, whatever is asked for."""
    compiler = find_compiler()
    if compiler is None:
        return []
    libraries = ((name, compile_with(compiler, _SOURCE, flags).library) for name, flags in _flags().items())
    return [name for name, library in libraries if library is not None and _isa(library) == name]


def _flags() -> dict[str, tuple[str, ...]]:
    return _KINDS.get(platform.machine().lower(), {"generic": (_GENERIC,)})


def _asked() -> str | None:
    name = os.environ.get(ISA_SWITCH, "").strip().lower()
    return None if name in ("", "auto") else name


def _either(names: Iterable[str]) -> str:
    *most, last = ("auto", *names)
    return f"{', '.join(most)} or {last}"


def _isa(library: ctypes.CDLL) -> str:
    library.diffsparse_isa.restype = ctypes.c_char_p
    return str(library.diffsparse_isa().decode())
