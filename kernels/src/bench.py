"""Speed of the kernels on this machine, each figure behind a correctness gate."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from diffsparse.entry import Execution, HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.kernels.api import sparse_attention
from diffsparse.kernels.checks import cannot_run
from diffsparse.layout import BlockLayout, build_layout

__all__ = ["bench", "dense_backends", "gate", "median_ms"]


def median_ms(function: Callable[[], Any], device: torch.device, budget_ms: float = 300.0) -> float:
    """Median time of one call in milliseconds, after warming up, over about ``budget_ms`` (at least three calls)."""

    def once() -> float:
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            function()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end)
        start = time.perf_counter()
        function()
        return (time.perf_counter() - start) * 1e3

    once()
    first = once()
    return statistics.median(once() for _ in range(max(3, min(50, int(budget_ms / max(first, 1e-3))))))


def random_rows(grid: TokenGrid, entries: Sequence[HeadEntry], block_size: int, density: float) -> BlockLayout:
    """A layout in which every row of every head keeps the same number of blocks, drawn at random (seeded)."""
    rng = np.random.default_rng(0)
    n = -(-grid.seq_len // block_size)
    count = max(1, round(density * n))
    masks = []
    for _ in entries:
        mask = np.zeros((n, n), bool)
        np.put_along_axis(mask, np.argsort(rng.random((n, n)), axis=1)[:, :count], True, axis=1)
        masks.append(mask)
    return build_layout(grid, entries, block_size, masks=masks)


def dense_backends(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, float]:
    """Milliseconds of torch's dense attention, per backend of it that runs here."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
    kinds = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION") if q.is_cuda else ("FLASH_ATTENTION",)
    times = {}
    for kind in kinds:
        try:
            with sdpa_kernel(getattr(SDPBackend, kind)):
                times[kind.lower()] = median_ms(lambda: F.scaled_dot_product_attention(qt, kt, vt), q.device)
        except RuntimeError:
            continue  # this build or device does not have it
    return times


def gate(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int, tail: str) -> float:
    """Relative error of a backend against the fp64 oracle on a small case. Raises AssertionError above 1%."""
    from diffsparse.kernels.reference import reference_attention

    grid = TokenGrid(3, 13, 17, text_after=20)
    n = -(-grid.num_visual // block_size) + 1
    mask = np.random.default_rng(0).random((n, n)) < 0.4
    entries = [HeadEntry(execution=Execution(tail=tail))]
    layout = build_layout(grid, entries, block_size, masks=[mask]).to(device)
    q, k, v = (torch.randn(1, grid.seq_len, 1, head_dim, device=device).to(dtype) for _ in range(3))
    want, _ = reference_attention(q, k, v, layout)
    error = float((sparse_attention(q, k, v, layout, backend=backend).double() - want).norm() / want.norm())
    if not error < 1e-2:
        raise AssertionError(f"{backend} is off by {error:.2g} (relative) in {dtype}: not timed")
    return error


def bench(
    grid: TokenGrid,
    *,
    heads: int,
    head_dim: int,
    densities: Sequence[float],
    block_size: int = 64,
    tails: Sequence[str] = ("none", "moments"),
    backends: Sequence[str] = ("triton", "cpu"),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
) -> list[dict[str, Any]]:
    """Time dense attention and the backends, heads in the model's order, at each density and tail.

    Returns rows with ``name``, ``tail``, ``density`` (of kept blocks), ``ms`` (median), ``tflops`` (of executed blocks:
    ``4 * batch * heads * seq^2 * head_dim * density / time``) and ``speedup`` over the fastest dense attention.
    """
    device = torch.device(device)
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, grid.seq_len, heads, head_dim, device=device).to(dtype) for _ in range(3))
    work = 4 * batch * heads * grid.seq_len**2 * head_dim / 1e9

    def row(name: str, tail: str, density: float, ms: float, fastest: float, error: float | None) -> dict[str, Any]:
        tflops = work * density / ms
        return dict(name=name, tail=tail, density=density, ms=ms, tflops=tflops, speedup=fastest / ms, gate_error=error)

    dense = dense_backends(q, k, v)
    fastest = min(dense.values())
    rows = [row(f"dense:{name}", "none", 1.0, ms, fastest, None) for name, ms in dense.items()]
    for backend in backends:
        if cannot_run(backend, q) is not None:
            continue
        for tail in tails:
            error = gate(backend, device, dtype, head_dim, block_size, tail)
            entries = [HeadEntry(execution=Execution(tail=tail))] * heads
            for density in densities:
                layout = random_rows(grid, entries, block_size, density).to(device)
                kept = layout.col_idx.numel() / (heads * layout.max_blocks**2)
                ms = median_ms(lambda: sparse_attention(q, k, v, layout, backend=backend), device)  # noqa: B023
                rows.append(row(backend, tail, kept, ms, fastest, error))
    return rows
