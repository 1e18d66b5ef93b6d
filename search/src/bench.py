"""`diffsparse bench kernels`: every attention backend against the fastest dense attention of torch on this machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from diffsparse.entry import TAILS, Execution, HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.kernels import sparse_attention
from diffsparse.kernels.backends import backend_names, last_resort
from diffsparse.kernels.checks import cannot_run
from diffsparse.layout import build_layout
from diffsparse.search.columns import fold, text_table
from diffsparse.search.environment import environment
from diffsparse.search.errors import BadInput
from diffsparse.tokens import BLOCK_SIZES

__all__ = ["bench_kernels", "bench_table", "parse_densities"]


def parse_densities(text: str) -> list[float]:
    """``0.1,0.3,1.0``. Raises :class:`BadInput`."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 < v <= 1 for v in values):
        raise BadInput(f"--density {text!r}: a list of shares above 0 and at most 1, for example 0.1,0.3,1.0")
    return values


def _seconds(function: Callable[[], Any], at_least: float = 0.4) -> float:
    """Median time of a call after a warm-up; torch's timer waits for the device."""
    from torch.utils.benchmark import Timer

    function()
    return float(Timer("f()", globals={"f": function}).blocked_autorange(min_run_time=at_least).median)


def _dense_times(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, float]:
    """Seconds of torch's dense attention on each of its backends that runs here."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    names = ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"] if q.is_cuda else ["FLASH_ATTENTION"]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))

    def attend() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    times = {}
    for name in names:
        with sdpa_kernel([getattr(SDPBackend, name)]):
            try:
                times[name.lower()] = _seconds(attend)
            except RuntimeError:  # this backend does not take these inputs
                continue
    if not times:
        times["default"] = _seconds(attend)
    return times


def bench_kernels(
    grid: TokenGrid,
    *,
    heads: int,
    head_dim: int,
    densities: Sequence[float],
    block_size: int = 64,
    tail: str = "moments",
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
) -> dict[str, Any]:
    """Times of one call, batch 1, with block lists drawn at random: a plain object of JSON values."""
    if block_size not in BLOCK_SIZES:
        raise BadInput(f"--block-size {block_size}: it is one of {', '.join(map(str, BLOCK_SIZES))}")
    if tail not in TAILS:
        raise BadInput(f"--tail {tail!r}: it is one of {', '.join(TAILS)}")
    generator = torch.Generator().manual_seed(seed)
    shape = (1, grid.seq_len, heads, head_dim)
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    dense = _dense_times(q, k, v)
    fastest = min(dense, key=lambda name: dense[name])
    rng = np.random.default_rng(seed)
    entries = [HeadEntry(execution=Execution(tail=tail))] * heads
    blocks = math.ceil(grid.seq_len / block_size)
    # The last resort says what is right and is not made for speed.
    timed = [name for name in backend_names() if name != last_resort().name]
    backends = {name: cannot_run(name, q, {tail} - {"none"}) for name in timed}
    rows = []
    for density in densities:
        masks = [rng.random((blocks, blocks)) < density for _ in range(heads)]
        layout = build_layout(grid, entries, block_size, masks=masks).to(device)
        for name, why in backends.items():
            if why is not None:
                continue
            seconds = _seconds(lambda name=name, layout=layout: sparse_attention(q, k, v, layout, backend=name))  # type: ignore[misc]
            rows.append(
                {
                    "backend": name,
                    "density": layout.density,
                    "seconds": seconds,
                    "speedup": dense[fastest] / seconds,
                    "tflops": layout.density * 4 * heads * head_dim * grid.seq_len**2 / seconds / 1e12,
                }
            )
    return {
        "grid": str(grid),
        "tokens": grid.seq_len,
        "heads": heads,
        "head_dim": head_dim,
        "block_size": block_size,
        "tail": tail,
        "dtype": str(dtype).removeprefix("torch."),
        "dense_seconds": dense,
        "fastest_dense": fastest,
        "sparse": rows,
        "unavailable": {name: why for name, why in backends.items() if why is not None},
        "environment": environment(device),
    }


def bench_table(result: dict[str, Any]) -> str:
    """The result for readers."""
    head = (
        f"{result['grid']} = {result['tokens']} tokens, {result['heads']} heads of {result['head_dim']}, "
        f"{result['dtype']}, blocks of {result['block_size']}, tail {result['tail']}; "
        f"{result['environment']['device']}, {result['environment']['threads']} threads"
    )
    dense = [[f"dense: {name}", "1.000", f"{s * 1e3:.2f}", ""] for name, s in result["dense_seconds"].items()]
    sparse = [
        [r["backend"], f"{r['density']:.3f}", f"{r['seconds'] * 1e3:.2f}", f"{r['speedup']:.2f}x"]
        for r in result["sparse"]
    ]
    table = text_table([*dense, *sparse], header=["attention", "density", "ms", "against dense"], right=[1, 2, 3])
    notes = [f"{name} cannot run here: {why}" for name, why in result["unavailable"].items()]
    return "\n".join([fold(head), "", table, *(fold(note, indent="  ") for note in notes)])
