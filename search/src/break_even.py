"""`diffsparse bench break-even`: measure this device's table, keep it, and show where sparse attention pays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from diffsparse.kernels.break_even import (
    DENSITIES,
    FORMAT,
    TOKENS,
    local_file,
    measure_break_even,
    save_local,
)
from diffsparse.kernels.costs import CostTable
from diffsparse.saving import write_whole
from diffsparse.search.columns import fold, text_table
from diffsparse.search.environment import stamp
from diffsparse.search.errors import BadInput, writing
from diffsparse.tokens import BLOCK_SIZES

__all__ = ["bench_break_even", "break_even_text"]


def _tokens(text: str, device: torch.device) -> tuple[int, ...]:
    """``1024,4096``; where nothing is given, what the device can be expected to take."""
    if not text:
        return TOKENS if device.type == "cuda" else TOKENS[:3]
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or any(v < 1 for v in values) or list(values) != sorted(set(values)):
        raise BadInput(f"--tokens {text!r}: a rising list of numbers of tokens, for example 1024,4096,32768")
    return values


def bench_break_even(
    device: torch.device,
    *,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    block_size: int,
    tokens: str = "",
    out: str = "",
    say: Callable[[str], None] = lambda line: None,
) -> tuple[CostTable, Path]:
    """The table and the file that it was written to: ``out``, or the machine's own. Raises :class:`BadInput`."""
    if block_size not in BLOCK_SIZES:
        raise BadInput(f"--block-size {block_size}: it is one of {', '.join(map(str, BLOCK_SIZES))}")
    table = measure_break_even(
        device,
        heads=heads,
        head_dim=head_dim,
        dtype=dtype,
        block_size=block_size,
        tokens=_tokens(tokens, device),
        densities=DENSITIES,
        about={**stamp(device), "command": "diffsparse bench break-even"},
        say=say,
    )
    path = Path(out) if out else local_file(table.device)
    try:
        with writing(path):
            if not out:
                return table, save_local(table)
            path.parent.mkdir(parents=True, exist_ok=True)
            content = json.dumps({"format": FORMAT, "tables": [table.to_dict()]}, indent=1) + "\n"
            return table, write_whole(path, content.encode())
    except BadInput:
        say(_figures(table))  # minutes of measuring are not lost with the file
        raise


def break_even_text(table: CostTable, path: Path) -> str:
    """For each length the density up to which sparse is faster, by tail; and the file."""
    return f"{_figures(table)}\nwritten: {path}"


def _figures(table: CostTable) -> str:
    tails = list(table.ratio)
    rows = [
        [f"{n:,}", *(f"{table.break_even(n, tail):.2f}" for tail in tails), f"{share:.2f}"]
        for n, share in zip(table.tokens, table.gather)
    ]
    backend = f"{table.backend} ({table.way})" if table.way else table.backend
    head = f"{table.device}, backend {backend}, {table.heads} heads of {table.head_dim}, {table.dtype}:"
    what = "share of kept blocks up to which sparse attention is faster"
    header = ["tokens", *(f"tail {tail}" for tail in tails), "gather / dense"]
    grid = text_table(rows, header=header, right=range(len(header)))
    return f"{fold(head)}\n{what}\n\n{grid}"
