"""Launches the kernels of this folder."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton

from diffsparse.kernels.rows.device import attend_kernel, combine_kernel, error_kernel
from diffsparse.kernels.rows.plain import Summaries

__all__ = ["launch_attend", "launch_errors"]

#: A GPU has up to about 150 multiprocessors, of which each runs a few programs at a time.
_ENOUGH_PROGRAMS = 512
#: Keys that a program takes at least: its queries and its sums have to be moved too.
_LEAST_KEYS = 512


def _tile(dim: int) -> tuple[int, int]:
    """Queries and keys of a tile: what registers hold beside one another."""
    return (64, 64) if dim <= 128 else (32, 32)


def launch_attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor,
    scale: float,
    key_mask: torch.Tensor | None,
    splits: int | None = None,
    warmup: bool = False,
) -> Any:
    """``attend_rows``. ``splits``: programs that share the keys. ``warmup``: compile only, and return the kernels."""
    batch, seq, heads, dim = k.shape
    count = len(rows)
    tile, keys = _tile(dim)
    tiles = triton.cdiv(count, tile)
    if splits is None:  # as many as it takes to occupy the GPU
        splits = min(triton.cdiv(_ENOUGH_PROGRAMS, max(1, tiles * heads * batch)), max(1, seq // _LEAST_KEYS))
    chunk = triton.cdiv(triton.cdiv(seq, splits), keys) * keys
    out = torch.empty(batch, count, heads, dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(batch, count, heads, dtype=torch.float32, device=q.device)
    acc = torch.empty(batch, heads, splits, count, dim, dtype=torch.float32, device=q.device)
    top, total = (torch.empty(batch, heads, splits, count, dtype=torch.float32, device=q.device) for _ in range(2))
    mask = rows if key_mask is None else key_mask.contiguous().view(torch.uint8)
    strides = [*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]]
    columns = max(16, triton.next_power_of_2(dim))
    args: list[Any] = [q, k, v, rows, mask, acc, top, total, seq, count, chunk, splits, scale, *strides]
    constants: dict[str, Any] = dict(
        HEADS=heads, HAS_MASK=key_mask is not None, D=dim, BLOCK_D=columns, BLOCK_M=tile, BLOCK_N=keys,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    parts: list[Any] = [acc, top, total, out, lse, count, splits]
    few: dict[str, Any] = dict(HEADS=heads, D=dim, BLOCK_D=columns, BLOCK_M=16, num_warps=4)
    grid, joined = (tiles * splits, heads, batch), (triton.cdiv(count, 16), heads, batch)
    if warmup:
        return [
            attend_kernel.warmup(*args, grid=grid, **constants),
            combine_kernel.warmup(*parts, grid=joined, **few),
        ]
    if count:
        attend_kernel[grid](*args, **constants)
        combine_kernel[joined](*parts, **few)
    return out, lse


@functools.cache
def _shared_memory(device: int) -> int:
    """Bytes of shared memory that a block may have. Asking the driver takes a millisecond."""
    return int(triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"])


def _stages(k: torch.Tensor) -> int:
    """Blocks of keys and values that are loaded ahead: as many as a multiprocessor has room for beside the queries."""
    if not k.is_cuda:
        return 1
    shared = _shared_memory(k.device.index)
    one = k.shape[2] * k.shape[3] * k.element_size()
    return max(1, min(3, (shared // one - 1) // 2))


def launch_errors(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    length: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    summaries: Summaries,
    weights: torch.Tensor,
    scale: float,
    warmup: bool = False,
) -> Any:
    """``block_errors``. With ``warmup`` compile only, and return the kernel."""
    heads, rows, dim = q.shape
    blocks, width = k.shape[1:3]
    error = torch.empty(len(weights), heads, blocks, rows, dtype=torch.float32, device=q.device)
    mass = torch.empty(heads, blocks, rows, dtype=torch.float32, device=q.device)
    tile = 128 if dim <= 128 else 32
    tiles = triton.cdiv(rows, tile)
    parts = min(triton.cdiv(_ENOUGH_PROGRAMS, max(1, tiles * heads)), blocks)
    each = triton.cdiv(blocks, max(1, parts))
    means = summaries.values.contiguous()
    along = means @ out.mT
    squares = torch.cat([means.square().sum(-1), (means[1] * means[2]).sum(-1)[None]])
    args: list[Any] = [q.contiguous(), k.contiguous(), v.contiguous(), length, out.contiguous(), lse.contiguous()]
    args += [weights.contiguous(), means, along, squares, error, mass, rows, blocks, each]
    args += [mass.numel(), heads * blocks * dim, heads * blocks, scale]
    constants: dict[str, Any] = dict(
        D=dim, WIDTH=width, BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK_M=tile,
        BLOCK_N=max(16, triton.next_power_of_2(width)), num_warps=8 if dim > 64 else 4, num_stages=_stages(k),
    )  # fmt: skip
    grid = (tiles, heads, triton.cdiv(blocks, each))
    if warmup:
        return error_kernel.warmup(*args, grid=grid, **constants)
    if rows:
        error_kernel[grid](*args, **constants)
    return error, mass
