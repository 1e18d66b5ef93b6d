"""Whether a kernel takes the means of blocks."""

from __future__ import annotations

import torch

from diffsparse.kernels.backends.installed import no_triton_for

__all__ = ["no_blocks_kernel"]

#: The largest head_dim, and the most parts of a block, that a program holds in its registers.
_MAX_DIM, _MOST_PARTS = 256, 16


def no_blocks_kernel(x: torch.Tensor, parts: int = 1) -> str | None:
    """Why torch takes the means of blocks of ``x``, ``[B, S, H, D]``, or None where a kernel does."""
    if (reason := no_triton_for(x)) is not None:
        return reason
    if x.dtype == torch.float64 or x.shape[-1] > _MAX_DIM or x.stride(-1) != 1 or parts > _MOST_PARTS:
        return (
            f"the kernel takes heads of up to {_MAX_DIM} numbers that lie side by side, in 32 bits or fewer, and "
            f"{_MOST_PARTS} parts"
        )
    return None
