"""Run in a process of its own: compile the Triton kernels for a GPU that is not there, and say what came out.

``python -m tests.kernels.compile_for 90 [--slow]`` prints one JSON object a kernel.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from diffsparse.grid import TokenGrid
from diffsparse.kernels.call import make_call
from diffsparse.kernels.triton_fwd import choose_config, launch
from diffsparse.kernels.triton_prepare import summaries
from diffsparse.order import TileOrder
from tests.kernels.cases import head, inputs, random_layout

#: Shared memory that one program may use, bytes.
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}


class AbsentGpu:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("capability", type=int, choices=SHARED)
    parser.add_argument("--slow", action="store_true")
    arguments = parser.parse_args()
    capability = arguments.capability
    from triton.runtime import driver

    driver.set_active(AbsentGpu(capability))
    cases = [(128, 128, torch.bfloat16, "none")]
    if arguments.slow:
        cases += [(d, b, torch.bfloat16, "moments") for d in (32, 64, 72, 128, 256) for b in (64, 128)]
        cases += [(128, 64, torch.float16, "mean"), (64, 64, torch.float32, "moments")]
        cases += [(d, b, torch.bfloat16, "centroids") for d in (64, 128, 256) for b in (64, 128)]
    grid = TokenGrid(2, 16, 16, text_after=70)
    for dim, block, dtype, tail in cases:
        entries = [head(tail=tail), head(TileOrder(1, 8, 8))] if arguments.slow else [head(tail=tail)]
        layout = random_layout(grid, entries, block, 0.5)
        q, k, v = inputs(grid, len(entries), dim, dtype=dtype)
        call = make_call(q, k, v, layout, return_lse=True)
        config = choose_config(block, dim, dtype, tail != "none", divmod(capability, 10), SHARED[capability])
        kernels = launch(call, config, warmup=True)
        if tail == "centroids":
            kernels.append(summaries(call, warmup=True))
        for kernel in kernels:
            text = kernel.asm["ptx"]
            found = {
                "kernel": kernel.metadata.name,
                "case": f"{dim}-{block}-{str(dtype)[6:]}-{tail}",
                "shared": kernel.metadata.shared,
                "allowed": SHARED[capability],
                "wgmma": text.count("wgmma.mma_async"),
                "mma": text.count("mma.sync"),
                "tcgen05": text.count("tcgen05.mma"),
                "bulk": text.count("cp.async.bulk.tensor"),
            }
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
