"""The CPU: compiled C where there is a compiler, else torch's operators. Blocks that are dropped cost nothing.

``forward`` takes a call apart into heads, ``rows`` has the tables of one head, ``table`` its keys and values in blocks,
``compiled`` and ``attend.c`` the code that ``compiler`` compiles, ``workers`` the threads.
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

    def run(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        from diffsparse.kernels.backends.cpu.forward import run

        return run(call)


CPU = _Cpu()
