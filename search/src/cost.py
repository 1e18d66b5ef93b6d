"""What attention costs on this device, measured with the kernels that will run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from diffsparse.entry import TAILS, Execution, HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.kernels import sparse_attention
from diffsparse.kernels.clock import samples_ms, timing
from diffsparse.layout import build_layout
from diffsparse.order import TokenOrder
from diffsparse.patterns import Full
from diffsparse.search.candidates import fill
from diffsparse.tails import measured_as

__all__ = ["CostModel", "measure_costs"]

DENSITIES = (0.02, 0.1, 0.3, 0.6)


@dataclass(frozen=True)
class CostModel:
    """Time of one layer's attention call as a share of the dense call, by tail and density.

    ``dense_seconds``: the fastest dense call. ``share``: per tail, the relative time at each of ``densities``.
    ``fill``: how full the blocks were that were timed (:func:`diffsparse.search.candidates.fill`), or None where a plan
    does not say.
    """

    device: str
    dense_seconds: float
    densities: tuple[float, ...]
    share: dict[str, tuple[float, ...]]
    fill: float | None = None

    def relative(self, density: float, tail: str, fill: float | None = None) -> float:
        """Cost of a head at a density of kept pairs (tail not counted in it), 1 = dense. Never above dense.

        ``fill``: how full the blocks of its order are. Kernels multiply whole blocks, so that the same pairs take
        ``1 / fill ** 2`` times as many. None: as full as those that were timed.
        """
        tail = measured_as(tail, self.share)
        if density < 1 and fill is not None and self.fill is not None:
            density *= (self.fill / fill) ** 2
        times = float(np.interp(density, (*self.densities, 1.0), (*self.share[tail], max(1.0, self.share[tail][-1]))))
        low, high = self.densities[:2]
        if density < low:  # extend the first segment's line downwards
            slope = (self.share[tail][1] - self.share[tail][0]) / (high - low)
            times = max(0.0, self.share[tail][0] - slope * (low - density))
        return min(1.0, times)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> CostModel:
        share = {k: tuple(v) for k, v in data["share"].items()}
        full = None if data.get("fill") is None else float(data["fill"])
        if full is not None and not 0 < full <= 1:
            raise ValueError(f"blocks are filled by a share above 0 and of 1 at most, not {full}")
        return cls(data["device"], data["dense_seconds"], tuple(data["densities"]), share, full)


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
    seconds: float = 0.3,
) -> CostModel:
    """Time dense and sparse calls on random inputs and random lists; sixteen measurements of ``seconds`` each."""
    generator = torch.Generator("cpu").manual_seed(0)
    shape = (1, grid.seq_len, heads, head_dim)
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    dense = _median_seconds(
        lambda: F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)), device, seconds
    )
    share: dict[str, tuple[float, ...]] = {}
    rng = np.random.default_rng(0)
    full = build_layout(grid, [HeadEntry(order, Full())], block_size)
    n = int(full.mask(0).any(1).sum())
    for tail in TAILS:
        times = []
        for density in DENSITIES:
            masks = [rng.random((n, n)) < density for _ in range(heads)]
            text = [(grid.text_before, slice(0, -(-grid.text_before // block_size)))]
            text.append((grid.text_after, slice(n - -(-grid.text_after // block_size), n)))
            for mask in masks:
                for length, blocks in text:
                    if length:
                        mask[blocks], mask[:, blocks] = True, True
            entries = [HeadEntry(order, Full(), execution=Execution(tail=tail))] * heads
            layout = build_layout(grid, entries, block_size, masks=masks).to(device)
            times.append(_median_seconds(partial(sparse_attention, q, k, v, layout), device, seconds))
        share[tail] = tuple(t / dense for t in times)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return CostModel(name, dense, DENSITIES, share, fill(order, grid, block_size))
