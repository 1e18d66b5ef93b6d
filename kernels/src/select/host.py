"""Launches the kernels of this folder."""

from __future__ import annotations

from typing import Any

import torch
import triton

from diffsparse.kernels.select.device import (
    best_kernel,
    parts_kernel,
    parts_score_kernel,
    prefix_kernel,
    reach_kernel,
)
from diffsparse.kernels.select.tail_device import excess_kernel, sum_kernel
from diffsparse.tokens import TokenLayout

__all__ = ["launch_best", "launch_excess", "launch_parts", "launch_parts_score", "launch_prefix", "launch_reach"]

#: A GPU has up to about 150 multiprocessors, of which each runs a few programs at a time.
_ENOUGH_PROGRAMS = 2048


def _rows(n: int) -> dict[str, int]:
    """How a program takes a row of ``n`` numbers."""
    return {"BLOCK": triton.next_power_of_2(n), "num_warps": 4 if n <= 1024 else 8}


def launch_parts(
    x: torch.Tensor,
    tokens: TokenLayout,
    parts: int = 1,
    unit: bool = False,
    bounds: bool = False,
    warmup: bool = False,
) -> Any:
    """Mean rows of the parts of every block of ``x``, ``[B, S, H, D]``: fp32 ``[B, H, N, parts, D]``.

    unit: of rows brought to length 1. bounds: also the least and the largest numbers of blocks, ``[B, H, N, D]``; else
    None. warmup: compile only, and return the kernel.
    """
    batch, seq, heads, dim = x.shape
    blocks = tokens.num_blocks
    mean = torch.empty(batch, heads, blocks, parts, dim, dtype=torch.float32, device=x.device)
    least, largest = (
        torch.empty(batch, heads, blocks, dim, dtype=torch.float32, device=x.device) if bounds else None
        for _ in range(2)
    )  # fmt: skip
    args: list[Any] = [x, tokens.gather, tokens.block_start, tokens.head_order, mean]
    args += [mean if least is None else least, mean if largest is None else largest, seq, blocks, *x.stride()[:3]]
    constants: dict[str, Any] = dict(
        HEADS=heads, D=dim, WIDTH=tokens.block_size, BLOCK_D=triton.next_power_of_2(dim), PARTS=parts,
        UNIT=unit, BOUNDS=bounds, num_warps=4 if dim <= 128 else 8,
    )  # fmt: skip
    grid = (blocks, heads, batch)
    if warmup:
        return parts_kernel.warmup(*args, grid=grid, **constants)
    if mean.numel():
        parts_kernel[grid](*args, **constants)
    return mean, least, largest


def launch_best(scores: torch.Tensor, candidates: torch.Tensor, wanted: torch.Tensor, warmup: bool = False) -> Any:
    """The ``wanted`` largest candidates of each row: bool of the shape of ``scores``, fp32 ``[..., N]``.

    candidates: bool of that shape. wanted: int32 ``[...]``, at most as many as a row has candidates. All contiguous.
    """
    mask = torch.empty_like(candidates)
    n = scores.shape[-1]
    args: list[Any] = [scores, candidates.view(torch.uint8), wanted, mask.view(torch.uint8), n]
    grid = (wanted.numel(),)
    if warmup:
        return best_kernel.warmup(*args, grid=grid, **_rows(n))
    if scores.numel():
        best_kernel[grid](*args, **_rows(n))
    return mask


def launch_prefix(
    scores: torch.Tensor, candidates: torch.Tensor, weights: torch.Tensor, target: float, warmup: bool = False
) -> Any:
    """How many of a row's best candidates have weights that sum to ``target``, or all: int32 ``[...]``.

    scores, weights: fp32 ``[..., N]``; candidates: bool of that shape. All contiguous.
    """
    count = torch.empty(scores.shape[:-1], dtype=torch.int32, device=scores.device)
    n = scores.shape[-1]
    args: list[Any] = [scores, candidates.view(torch.uint8), weights, count, n, float(target)]
    grid = (count.numel(),)
    if warmup:
        return prefix_kernel.warmup(*args, grid=grid, **_rows(n))
    if scores.numel():
        prefix_kernel[grid](*args, **_rows(n))
    return count


def launch_reach(values: torch.Tensor, least: torch.Tensor, warmup: bool = False) -> Any:
    """How many values of a row have keys from ``least`` on, int32 ``[B, G, R, T]``; and fp32 sums of those above 0.

    values: fp32 ``[B, G, R, N]``. least: int32 ``[B, G, T]``, keys that are ordered as numbers are. Both contiguous.
    """
    rows, n = values.shape[2:]
    tries = least.shape[-1]
    count = torch.empty(*values.shape[:3], tries, dtype=torch.int32, device=values.device)
    total = torch.empty_like(count, dtype=torch.float32)
    args: list[Any] = [values, least, count, total, n, rows]
    grid = (count[..., 0].numel(),)
    if warmup:
        return reach_kernel.warmup(*args, grid=grid, TRIES=tries, **_rows(n))
    if values.numel():
        reach_kernel[grid](*args, TRIES=tries, **_rows(n))
    return count, total


def launch_parts_score(
    q: torch.Tensor,
    k: torch.Tensor,
    asking: torch.Tensor,
    asked: torch.Tensor,
    scale: float,
    warmup: bool = False,
) -> Any:
    """Log-sum-exps of products of mean queries and keys over the parts of two blocks: fp32 ``[B, H, N, N]``.

    q, k: fp32 ``[B, H, N, parts, D]``. asking, asked: int64 ``[H or 1, N, parts]``, tokens of each part.
    """
    batch, heads, blocks, parts, dim = q.shape
    out = torch.empty(batch, heads, blocks, blocks, dtype=torch.float32, device=q.device)
    tile = 16 if blocks <= 32 else 64
    each = blocks * parts if len(asking) > 1 else 0
    args: list[Any] = [
        q.contiguous(),
        k.contiguous(),
        asking.contiguous(),
        asked.contiguous(),
        out,
        blocks,
        scale,
        each,
    ]
    constants: dict[str, Any] = dict(
        HEADS=heads, D=dim, BLOCK_D=min(64, max(16, triton.next_power_of_2(dim))), PARTS=parts, TILE=tile,
        # Three products of 19-bit numbers are as good as one of 32 bits, and take the matrix units.
        PRECISION="tf32x3", num_warps=4, num_stages=2,
    )  # fmt: skip
    grid = (triton.cdiv(blocks, tile) ** 2, heads, batch)
    if warmup:
        return parts_score_kernel.warmup(*args, grid=grid, **constants)
    if out.numel():
        parts_score_kernel[grid](*args, **constants)
    return out


def launch_excess(
    q: torch.Tensor, k: torch.Tensor, count: torch.Tensor, products: torch.Tensor, warmup: bool = False
) -> Any:
    """``log |sum_i n_i (e^{s_i} - e^{s}) v_i|^2`` of pairs of blocks: fp32 ``[B, H, N, N]``.

    q: fp32 ``[B, H, N, D]``, mean queries, scaled. k: ``[B, H, N, parts, D]``, mean keys of a block's parts, in the
    precision of the products with them. count: int64 ``[H or 1, N, parts]``, tokens of each part. products: fp32
    ``[B, H, N, parts, parts]``, of the parts' mean values with each other.
    """
    batch, heads, blocks, parts, dim = k.shape
    out = torch.empty(batch, heads, blocks, blocks, dtype=torch.float32, device=q.device)
    lse = torch.empty(batch, heads, blocks, dtype=torch.float32, device=q.device)
    tile = 64
    tiles = triton.cdiv(blocks, tile)
    shares = min(blocks, triton.cdiv(_ENOUGH_PROGRAMS, max(1, tiles * heads * batch)))
    each = triton.cdiv(blocks, max(1, shares))
    q, k, count, products = (x.contiguous() for x in (q, k, count, products))
    step = blocks * parts if len(count) > 1 else 0
    common: dict[str, Any] = dict(
        HEADS=heads, D=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)), PARTS=parts, BLOCK_M=tile,
        PRECISION="tf32x3" if k.dtype == torch.float32 else "tf32", num_warps=4, num_stages=1 if dim > 128 else 2,
    )  # fmt: skip
    sums: list[Any] = [q, k, count, lse, blocks, step]
    errors: list[Any] = [q, k, count, products, lse, out, blocks, each, step]
    some, grid = (tiles, heads, batch), (tiles, triton.cdiv(blocks, each), heads * batch)
    block_p = max(16, triton.next_power_of_2(parts))
    if warmup:
        return [
            sum_kernel.warmup(*sums, grid=some, BLOCK_N=64, **common),
            excess_kernel.warmup(*errors, grid=grid, BLOCK_P=block_p, **common),
        ]
    if out.numel():
        sum_kernel[some](*sums, BLOCK_N=64, **common)
        excess_kernel[grid](*errors, BLOCK_P=block_p, **common)
    return out
