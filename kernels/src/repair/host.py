"""Launches the kernel of the repair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from diffsparse.kernels.repair.device import repair_kernel
from diffsparse.repair import HeadRepair

__all__ = ["Tiles", "choose_tiles", "launch"]

#: A GPU has up to about 150 multiprocessors, of which each runs a few programs at a time.
_ENOUGH_PROGRAMS = 512


@dataclass(frozen=True)
class Tiles:
    """How a launch is cut: ``rows`` tokens a tile, ``depth`` channels a product, ``count`` tiles a program."""

    rows: int
    depth: int
    warps: int
    count: int = 1


def choose_tiles(dim: int, dtype: torch.dtype, tokens: int, heads: int) -> Tiles:
    """For so many visual tokens, and heads over all items."""
    wide = max(16, triton.next_power_of_2(dim))
    if dtype == torch.float32:
        return Tiles(32, 16, 4 if wide <= 128 else 8)
    if wide > 128:
        return Tiles(64, 64, 8)
    # A map is as large as two tiles: read once for several of them, where there is work enough to go round.
    several = 8 if heads * (-(-tokens // (8 * 64))) >= _ENOUGH_PROGRAMS else 1
    return Tiles(64, wide, 4, several)


def launch(
    out: torch.Tensor,
    repair: HeadRepair,
    text_before: int,
    num_visual: int,
    tiles: Tiles | None = None,
    warmup: bool = False,
) -> Any:
    """Repair ``out``, ``[B, S, H, D]``, in place. With ``warmup`` only compile, and return the compiled kernel."""
    batch, _, heads, dim = out.shape
    if not num_visual or not out.numel():
        return None
    tiles = tiles or choose_tiles(dim, out.dtype, num_visual, batch * heads)
    weight, bias, used = (x.contiguous() for x in repair.tensors)
    args = [out, weight, bias, used.view(torch.uint8), text_before, num_visual]
    args += [out.stride(0), out.stride(1), out.stride(2), heads if weight.ndim == 4 else 0]
    constants = dict(
        D=dim,
        BLOCK_D=max(16, triton.next_power_of_2(dim)),
        BLOCK_M=tiles.rows,
        BLOCK_K=tiles.depth,
        TILES=tiles.count,
        PRECISION="ieee" if out.dtype == torch.float32 else "tf32",
        num_warps=tiles.warps,
        num_stages=2,
    )
    grid = (-(-num_visual // (tiles.rows * tiles.count)), heads, batch)
    if warmup:
        return repair_kernel.warmup(*args, grid=grid, **constants)
    repair_kernel[grid](*args, **constants)
    return None
