"""Any GPU that Triton supports. ``device`` has the kernel, ``host`` launches it; ``prepare`` and ``unpack`` make what
it reads."""

from __future__ import annotations

from dataclasses import replace

import torch

from diffsparse.blocks import BlockIndex
from diffsparse.kernels.backends.installed import interpreting, not_installed
from diffsparse.kernels.backends.protocol import KernelBackend
from diffsparse.kernels.call import AttentionCall
from diffsparse.tokens import TokenLayout

__all__ = ["TRITON", "lists_of"]


def lists_of(packed: BlockIndex, tokens: TokenLayout) -> BlockIndex:
    """The lists of a packed index that serves all items, on a GPU without waiting for it."""
    if not packed.col_idx.is_cuda:
        return packed.unpacked(tokens)
    from diffsparse.kernels.backends.triton.unpack import unpack_lists

    return replace(packed, col_idx=unpack_lists(packed, tokens))


class _Triton(KernelBackend):
    name = "triton"
    devices = ("cuda",)
    head_dims = range(16, 257, 8)

    def missing(self, device: torch.device | None) -> str | None:
        if (reason := not_installed()) is not None:
            return reason
        if device is None and not interpreting() and not torch.cuda.is_available():
            return "triton needs a GPU (or TRITON_INTERPRET=1), and torch sees none"
        if device is not None and device.type == "mps":
            return f"the triton backend runs tensors on a GPU that Triton knows, got {device}"
        if device is not None and device.type == "cpu" and not interpreting():
            return (
                "the triton backend runs tensors on a GPU, got cpu (TRITON_INTERPRET=1 runs it in Triton's interpreter)"
            )
        return None

    def lists(self, packed: BlockIndex, tokens: TokenLayout) -> BlockIndex:
        return lists_of(packed, tokens)

    def run(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        from diffsparse.kernels.backends.triton.host import run

        return run(call)


TRITON = _Triton()
