"""Outputs that are used again, put in place in a call: in eager code, and as one operator in compiled code."""

from __future__ import annotations

import torch

from diffsparse.pipelines.call import Call
from diffsparse.pipelines.context import CTX

__all__ = ["exchange_compiled"]

_NAME = "diffsparse::exchange_outputs"


# What it reads and keeps differs from step to step, so that a CUDA graph must not replay it.
@torch.library.custom_op(
    _NAME, mutates_args=("out",), tags=[tag] if (tag := getattr(torch.Tag, "cudagraph_unsafe", None)) else []
)
def _exchange(out: torch.Tensor, layer: torch.Tensor) -> None:
    call: Call | None = CTX.call
    if call is None or not call.state.plan or not call.state.plan.reuses:
        raise RuntimeError("compiled attention that uses outputs again ran outside its model's forward")
    call.exchange(int(layer), out, call.recalled.get(int(layer), ()))


def exchange_compiled(out: torch.Tensor, layer: torch.Tensor) -> torch.Tensor:
    """:meth:`Call.exchange` of the forward that runs, in place, of a layer by its index (int64, on the CPU)."""
    torch.ops.diffsparse.exchange_outputs(out, layer)
    return out
