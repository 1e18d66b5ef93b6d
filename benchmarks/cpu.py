"""The CPU backend against torch's dense attention, for each instruction set that its kernel can be compiled for here:

    python benchmarks/cpu.py                                  # 5,120 tokens, 4 heads of 64, fp32
    python benchmarks/cpu.py --dtype bfloat16 --density 0.1,0.5

All ways take turns, so that what else the machine does falls on all of them, and a ratio is the median over the rounds.
Torch uses the best instructions that it has; ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
MKL_ENABLE_INSTRUCTIONS=AVX2 keep it to AVX2.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

# ruff: noqa: E402
# The clone in the place of this folder, in which kernels.py would stand in for Hugging Face's package `kernels`.
_HERE = Path(__file__).resolve().parent
sys.path[:] = [str(_HERE.parent), *(p for p in sys.path if Path(p or ".").resolve() != _HERE)]

import torch
import torch.nn.functional as F

from diffsparse.entry import HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.kernels import sparse_attention
from diffsparse.kernels.backends.cpu.compiler import SWITCH
from diffsparse.kernels.backends.cpu.instructions import ISA_SWITCH, instruction_sets
from diffsparse.kernels.random_rows import random_rows
from diffsparse.search.environment import stamp

DTYPES = ("float32", "bfloat16", "float16")
UNCOMPILED = "uncompiled"


def choose(way: str) -> None:
    """Let calls from now on run in the kernel for an instruction set, or uncompiled."""
    os.environ[SWITCH] = "0" if way == UNCOMPILED else "1"
    os.environ[ISA_SWITCH] = "auto" if way == UNCOMPILED else way


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(
    ways: list[str], density: float, tokens: int, heads: int, dim: int, dtype: torch.dtype, rounds: int
) -> dict[str, tuple[float, float]]:
    """For ``dense`` and each way the median time in ms, and dense attention's time over its own."""
    torch.manual_seed(0)
    grid = TokenGrid(1, tokens // 32, 32)
    q, k, v = (torch.randn(1, grid.seq_len, heads, dim).to(dtype) for _ in range(3))
    layout = random_rows(grid, [HeadEntry()] * heads, 64, density)
    dense = partial(F.scaled_dot_product_attention, *(x.transpose(1, 2) for x in (q, k, v)))
    times: dict[str, list[float]] = {name: [] for name in ("dense", *ways)}
    for turn in range(rounds + 1):
        took = {"dense": seconds(dense)}
        for way in ways:
            choose(way)
            took[way] = seconds(partial(sparse_attention, q, k, v, layout, backend="cpu"))
        if turn:  # the first one compiles, and makes tables
            for name, one in took.items():
                times[name].append(one)
    ratios = {name: statistics.median(d / t for d, t in zip(times["dense"], times[name])) for name in times}
    return {name: (1e3 * statistics.median(times[name]), ratios[name]) for name in times}


def arguments() -> argparse.Namespace:
    """The command line's; what cannot be measured ends the script with one line. ``density`` is a list of numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", default="0.3,0.7", help="shares of blocks kept, 0.3,0.7")
    parser.add_argument("--tokens", type=int, default=5120, help="a multiple of 64")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64, help="16 to 256 in multiples of 4")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    text = options.density
    try:
        options.density = [float(part) for part in text.split(",")]
    except ValueError:
        options.density = []
    if not options.density or not all(0 < density < 1 for density in options.density):
        parser.error(f"--density {text!r}: numbers between 0 and 1, for example 0.3,0.7")
    if options.tokens < 128 or options.tokens % 64:
        parser.error(f"--tokens {options.tokens}: a multiple of 64, at least 128")
    if options.heads < 1 or options.rounds < 1:
        parser.error("--heads and --rounds: 1 at least")
    if options.head_dim not in range(16, 257, 4):
        parser.error(f"--head-dim {options.head_dim}: 16 to 256 in multiples of 4")
    return options


def main() -> int:
    options = arguments()
    ways = [*instruction_sets(), UNCOMPILED]
    print(", ".join(filter(None, stamp("cpu").values())), f"torch with {torch.backends.cpu.get_cpu_capability()}")
    print(f"{options.tokens} tokens, {options.heads} heads of {options.head_dim}, {options.dtype}, dense over sparse:")
    for density in options.density:
        shape = (options.tokens, options.heads, options.head_dim)
        found = measure(ways, density, *shape, getattr(torch, options.dtype), options.rounds)
        for name, (ms, ratio) in found.items():
            print(f"{density:<6g} {name:<10} {ms:8.2f} ms  {ratio:5.2f}x", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
