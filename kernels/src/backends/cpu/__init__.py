"""The CPU: compiled C where there is a compiler, else torch's operators. Blocks that are dropped cost nothing.

``forward`` takes a call apart into heads, ``rows`` has the tables of one head, ``table`` its keys and values in blocks,
``compiled`` and ``attend.c`` the code that ``compiler`` compiles for the instruction set that ``instructions`` finds,
``workers`` the threads.
"""

from __future__ import annotations

import torch

from diffsparse.kernels.backends.protocol import KernelBackend
from diffsparse.kernels.call import AttentionCall

__all__ = ["CPU"]


class _Cpu(KernelBackend):
    name = "cpu"
    devices = ("cpu",)

    def missing(self, device: torch.device | None) -> str | None:
        if device is not None and device.type != "cpu":
            return f"the cpu backend runs tensors on the CPU, got {device}"
        return None

    def way(self) -> str:
        from diffsparse.kernels.backends.cpu.instructions import find_kernel

        return find_kernel().isa or "uncompiled"

    def about_way(self) -> str:
        from diffsparse.kernels.backends.cpu.instructions import find_kernel

        try:
            return str(find_kernel())
        except (ValueError, RuntimeError) as error:  # what a call will raise
            return str(error)

    def run(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        from diffsparse.kernels.backends.cpu.forward import run

        return run(call)


CPU = _Cpu()
