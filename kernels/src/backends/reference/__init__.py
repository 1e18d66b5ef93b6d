"""Plain torch in fp32: slow, and what every backend should compute."""

from __future__ import annotations

import torch

from diffsparse.kernels.backends.protocol import KernelBackend
from diffsparse.kernels.call import AttentionCall

__all__ = ["REFERENCE"]


class _Reference(KernelBackend):
    """Any device, dtype and head_dim, and every tail that is registered: ``forward`` runs their plain formulas."""

    name = "reference"
    dtypes = None
    tails = None

    def run(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        from diffsparse.kernels.backends.reference.forward import run

        return run(call)


REFERENCE = _Reference()
