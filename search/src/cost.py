"""What attention costs on this device, measured on a search's own call with the kernels that will run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch.nn import functional as F

from diffsparse.entry import TAILS, Execution, HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.kernels import sparse_attention
from diffsparse.kernels.clock import samples_ms, timing
from diffsparse.kernels.costs import CostTable
from diffsparse.layout import build_layout
from diffsparse.order import TokenOrder
from diffsparse.patterns import Full
from diffsparse.work import block_fill

__all__ = ["MEASUREMENTS", "measure_costs"]

DENSITIES = (0.02, 0.1, 0.3, 0.6)
#: How often :func:`measure_costs` measures.
MEASUREMENTS = 1 + len(TAILS) * len(DENSITIES)
#: Random masks of a measurement; more heads than that share them.
MASKS = 4


def _median_seconds(fn: Callable[[], object], device: torch.device, seconds: float) -> float:
    return timing(samples_ms(fn, device, 1e3 * seconds, least=3)).ms / 1e3


@torch.no_grad()
def measure_costs(
    grid: TokenGrid,
    heads: int,
    head_dim: int,
    order: TokenOrder,
    block_size: int,
    device: torch.device,
    dtype: torch.dtype,
    done: Callable[[], None] = lambda: None,
    seconds: float = 0.3,
) -> CostTable:
    """Time dense and sparse calls on random inputs and random lists: :data:`MEASUREMENTS` of ``seconds`` each.

    ``done`` is called after each of them.
    """
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, grid.seq_len, heads, head_dim)
    q, k, v = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(3))
    dense = _median_seconds(
        lambda: F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)), device, seconds
    )
    done()
    share: dict[str, tuple[float, ...]] = {}
    rng = np.random.default_rng(0)
    full = build_layout(grid, [HeadEntry(order, Full())], block_size)
    n = int(full.mask(0).any(1).sum())
    for tail in TAILS:
        times = []
        for density in DENSITIES:
            masks = [rng.random((n, n)) < density for _ in range(min(heads, MASKS))]
            text = [(grid.text_before, slice(0, -(-grid.text_before // block_size)))]
            text.append((grid.text_after, slice(n - -(-grid.text_after // block_size), n)))
            for mask in masks:
                for length, blocks in text:
                    if length:
                        mask[blocks], mask[:, blocks] = True, True
            entries = [HeadEntry(order, Full(), execution=Execution(tail=tail))] * heads
            every = [masks[head % len(masks)] for head in range(heads)]
            layout = build_layout(grid, entries, block_size, masks=every).to(device)
            times.append(_median_seconds(partial(sparse_attention, q, k, v, layout), device, seconds))
            done()
        share[tail] = tuple(t / dense for t in times)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return CostTable.of_call(name, dense, DENSITIES, share, block_fill(order, grid, block_size))
