"""``diffsparse bench``"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from diffsparse.search.commands.common import Device, Dtype, Json, answers, check_numbers, interruptible

__all__ = ["bench_kernels_command", "bench_break_even_command"]


@interruptible("nothing was written")
def bench_kernels_command(
    grid: Annotated[str, typer.Option("--grid", metavar="T,H,W", help="Latent tokens of one call.")] = "5,32,32",
    heads: Annotated[int, typer.Option("--heads")] = 4,
    head_dim: Annotated[int, typer.Option("--head-dim")] = 64,
    density: Annotated[str, typer.Option("--density", help="Kept blocks, a list.")] = "0.1,0.3,0.5,0.7,1.0",
    block_size: Annotated[int, typer.Option("--block-size", help="64 or 128.")] = 64,
    tail: Annotated[str, typer.Option("--tail", help="none, mean, moments or centroids.")] = "moments",
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Time every attention backend against the fastest dense attention of torch.

    \b
    Example:
      diffsparse bench kernels --grid 21,30,52 --heads 12 --head-dim 128 --device cuda
    """
    with answers(as_json) as answer:
        check_numbers(heads=heads, head_dim=head_dim)
        from diffsparse.search import load
        from diffsparse.search.bench import bench_kernels, bench_table, parse_densities
        from diffsparse.search.show import parse_grid

        place = load.choose_device(device)
        result = bench_kernels(
            parse_grid(grid),
            heads=heads,
            head_dim=head_dim,
            densities=parse_densities(density),
            block_size=block_size,
            tail=tail,
            device=place,
            dtype=load.choose_dtype(dtype, place),
        )
        answer(result, bench_table(result))


@interruptible("nothing was written")
def bench_break_even_command(
    heads: Annotated[int, typer.Option("--heads")] = 24,
    head_dim: Annotated[int, typer.Option("--head-dim")] = 128,
    block_size: Annotated[int, typer.Option("--block-size", help="64 or 128.")] = 128,
    tokens: Annotated[str, typer.Option("--tokens", help="Sequence lengths, a rising list.")] = "",
    out: Annotated[str, typer.Option("--out", metavar="FILE", help="Write the table here, not to the cache.")] = "",
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Measure from which length and density on sparse attention pays, and keep it for `backend="auto"`.

    \b
    Example:
      diffsparse bench break-even --heads 24 --head-dim 128
    """
    with answers(as_json) as answer:
        check_numbers(heads=heads, head_dim=head_dim)
        from diffsparse.search import load
        from diffsparse.search.break_even import bench_break_even, break_even_text

        place = load.choose_device(device)
        table, path = bench_break_even(
            place,
            heads=heads,
            head_dim=head_dim,
            dtype=load.choose_dtype(dtype, place),
            block_size=block_size,
            tokens=tokens,
            out=out,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
        answer({**table.to_dict(), "file": str(path)}, break_even_text(table, path))
