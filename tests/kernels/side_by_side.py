"""Run beside other processes on one Hopper GPU: the same call over and over, every time with the same output.

``python -m tests.kernels.side_by_side BLOCK_SIZE`` ends with status 1 where a call differs from the first.
"""

from __future__ import annotations

import sys
import time

import torch

from diffsparse.grid import TokenGrid
from diffsparse.kernels import sparse_attention
from diffsparse.order import TileOrder
from tests.kernels.cases import head, inputs, random_layout

#: Long enough for thousands of turns of some milliseconds each.
SECONDS = 15.0


def main() -> int:
    block = int(sys.argv[1])
    grid = TokenGrid(5, 32, 32)
    kinds = [head(), head(TileOrder(1, 8, 8), "moments"), head(TileOrder(1, 8, 8), "centroids"), head(tail="mean")]
    layout = random_layout(grid, kinds, block, 0.3, diagonal=True).to("cuda")
    q, k, v = (x.to("cuda") for x in inputs(grid, len(kinds), 64, batch=2, dtype=torch.bfloat16))
    first = sparse_attention(q, k, v, layout, backend="gluon_sm90")
    wrong, calls, begin = torch.zeros((), dtype=torch.int64, device="cuda"), 0, time.monotonic()
    while time.monotonic() - begin < SECONDS:
        for _ in range(50):  # without waiting, so that the GPU always has work
            wrong += (sparse_attention(q, k, v, layout, backend="gluon_sm90") != first).any()
        calls += 50
        torch.cuda.synchronize()
    print(f"{int(wrong)} of {calls} calls differ from the first; finite: {bool(torch.isfinite(first).all())}")
    return int(bool(wrong) or not bool(torch.isfinite(first).all()))


if __name__ == "__main__":
    sys.exit(main())
