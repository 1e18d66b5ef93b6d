"""The repair of an output (``diffsparse.repair``), on a GPU in one pass: ``device`` has it, ``host`` launches it."""

from __future__ import annotations

import torch

from diffsparse.kernels.backends.installed import no_triton_for
from diffsparse.repair import HeadRepair

__all__ = ["mend_", "no_fused_pass"]

#: The largest head_dim that a GPU's registers hold a tile's sums of.
_MAX_DIM = 256
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def no_fused_pass(out: torch.Tensor) -> str | None:
    """Why an output ``[B, S, H, D]`` is repaired by torch's products, or None where one kernel does it."""
    if (reason := no_triton_for(out)) is not None:
        return reason
    if out.dtype not in _DTYPES or out.shape[3] > _MAX_DIM or out.stride(3) != 1:
        return (
            f"the kernel takes float32, float16 or bfloat16, heads of up to {_MAX_DIM} and a contiguous last axis; "
            f"got {out.dtype}, heads of {out.shape[3]} and strides {tuple(out.stride())}"
        )
    return None


def mend_(out: torch.Tensor, repair: HeadRepair, text_before: int, num_visual: int) -> torch.Tensor:
    """Correct the visual tokens of ``out``, ``[B, S, H, D]``, in place; returns ``out``.

    On a GPU it is one pass over memory, with sums in fp32; elsewhere :meth:`HeadRepair.apply_`. Nothing waits for the
    device, and nothing is kept between calls.
    """
    if no_fused_pass(out) is not None:
        return repair.apply_(out, text_before, num_visual)
    from diffsparse.kernels.repair.host import launch

    launch(out, repair, text_before, num_visual)
    return out
