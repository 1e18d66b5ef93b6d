"""Where versions of Gluon differ, and how a tensor becomes a TMA descriptor."""

from __future__ import annotations

from typing import Any

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

__all__ = ["copy_tile", "tensor_descriptor"]

#: ``(descriptor, coordinates, barrier, destination)``; renamed after Triton 3.7.
copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared

_TYPES = {
    torch.float16: gl.float16,
    torch.bfloat16: gl.bfloat16,
    torch.int8: gl.int8,
    torch.float8_e4m3fn: gl.float8e4nv,
}


def tensor_descriptor(x: torch.Tensor, shape: list[int], strides: list[int], box: list[int]) -> Any:
    """A descriptor of ``x`` as ``shape`` with ``strides`` (in elements), fetched in boxes, as operands of the matrix
    units lie in shared memory. What a box has beyond the tensor is filled with zeros.

    Raises:
        AssertionError: where base or strides are no multiples of 16 bytes.
    """
    layout = gl.NVMMASharedLayout.get_default_for(box, _TYPES[x.dtype])
    return TensorDescriptor(x, shape, strides, box, layout)
