"""Whether Triton is here, and how it runs: what everything that has a Triton kernel asks."""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache

import torch

__all__ = ["interpreting", "no_triton_for", "not_installed"]


def interpreting() -> bool:
    """True where Triton kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@lru_cache(maxsize=1)
def not_installed() -> str | None:
    """Why there is no Triton here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    return None


def no_triton_for(x: torch.Tensor) -> str | None:
    """Why Triton's kernels do not run a tensor where it lies, or None where they do."""
    if not x.is_cuda and not (x.device.type == "cpu" and interpreting()):
        return f"Triton's kernels run tensors on a GPU, got {x.device}"
    return not_installed()
