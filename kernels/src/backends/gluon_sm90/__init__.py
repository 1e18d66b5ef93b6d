"""Hopper GPUs: a warp-specialised kernel in Gluon. ``device`` and ``eight`` (products in 8 bits) have the kernel and
``parts`` what they share; ``host`` launches it; ``prepare``, ``quantize`` and ``wide`` make what it reads."""

from __future__ import annotations

import importlib.util
from functools import lru_cache

import torch

from diffsparse.blocks import BlockIndex
from diffsparse.kernels.backends.installed import not_installed
from diffsparse.kernels.backends.protocol import KernelBackend
from diffsparse.kernels.backends.triton import lists_of
from diffsparse.kernels.call import AttentionCall
from diffsparse.tokens import TokenLayout

__all__ = ["GLUON_SM90"]


@lru_cache(maxsize=1)
def _no_gluon() -> str | None:
    if (reason := not_installed()) is not None:
        return reason
    if importlib.util.find_spec("triton.experimental.gluon.language.nvidia.hopper") is None:
        return "this triton has no Gluon for Hopper (pip install 'triton>=3.6')"
    return None


class _GluonSm90(KernelBackend):
    name = "gluon_sm90"
    devices = ("cuda",)
    dtypes = (torch.float16, torch.bfloat16)
    head_dims = range(64, 129, 8)
    numerics = {"int8": (64, 128), "fp8": (64, 128)}

    def missing(self, device: torch.device | None) -> str | None:
        if (reason := _no_gluon()) is not None:
            return reason
        if device is not None and device.type != "cuda":
            return f"the gluon_sm90 backend runs tensors on a Hopper GPU, got {device}"
        if not torch.cuda.is_available() or torch.version.hip:
            return "gluon_sm90 needs a Hopper GPU, and torch sees none"
        capability = torch.cuda.get_device_capability(device)
        if capability != (9, 0):
            return f"gluon_sm90 needs a GPU of compute capability 9.0, got {capability[0]}.{capability[1]}"
        return None

    def lists(self, packed: BlockIndex, tokens: TokenLayout) -> BlockIndex:
        return lists_of(packed, tokens)

    def run(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        from diffsparse.kernels.backends.gluon_sm90.host import run

        return run(call)


GLUON_SM90 = _GluonSm90()
