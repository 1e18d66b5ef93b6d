"""What picking blocks while a model runs costs: every rule's time, beside the attention over the blocks that it picks.

    python benchmarks/online.py --csv benchmarks/results/online_h200.csv

Queries and keys are made up: queries lie near the keys of their place, and some channels stand out.
"""

from __future__ import annotations

import argparse
import csv
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

# ruff: noqa: E402
# The clone in the place of this folder, in which kernels.py would stand in for Hugging Face's package `kernels`.
_HERE = Path(__file__).resolve().parent
sys.path[:] = [str(_HERE.parent), *(p for p in sys.path if Path(p or ".").resolve() != _HERE)]

import torch

from diffsparse import Budget, HeadEntry, OnlineSelection, TileOrder, TokenGrid
from diffsparse.kernels import sparse_attention
from diffsparse.kernels.clock import samples_ms, timing
from diffsparse.kernels.select.pick import pick_blocks
from diffsparse.kernels.select.rules import selectors
from diffsparse.layout import build_layout
from diffsparse.search import load, script


@dataclass(frozen=True)
class Row:
    """One rule with one budget. kept: density of the call. share: the time of picking over that of the attention."""

    rule: str
    budget: str
    tokens: int
    heads: int
    head_dim: int
    kept: float = 0.0
    pick_ms: float = 0.0
    attention_ms: float = 0.0
    share: float = 0.0
    status: str = "ok"


def grid_of(text: str) -> TokenGrid:
    """A grid by frames, rows and columns."""
    sides = text.split("x")
    if len(sides) != 3 or not all(side.isdigit() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f"frames, rows and columns of tokens, as 21x45x80; got {text!r}")
    return TokenGrid(*map(int, sides))


def budget_of(text: str) -> Budget:
    """A budget by its kind and value."""
    kind, _, value = text.partition(":")
    try:
        return Budget(kind, float(value))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"a budget's kind and value, as density:0.25; got {text!r} ({error})"
        ) from error


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=grid_of, default="21x45x80", help="latent tokens (default: Wan2.1 at 720p)")
    parser.add_argument("--heads", type=script.at_least_one, default=40)
    parser.add_argument("--head-dim", type=script.at_least_one, default=128)
    parser.add_argument("--block", type=script.at_least_one, default=128, help="tokens")
    parser.add_argument("--budgets", type=budget_of, nargs="+", default=[Budget("density", 0.25)])
    parser.add_argument("--rules", default=",".join(selectors()), help="all by default")
    parser.add_argument("--ms", type=float, default=300.0, help="milliseconds that each timing takes, about")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--csv", type=script.out_file, help="write the rows here, after every rule")
    a = parser.parse_args()
    a.rules = [name.strip() for name in a.rules.split(",") if name.strip()]
    if unknown := [name for name in a.rules if name not in selectors()]:
        parser.error(f"unknown rules {', '.join(unknown)}; use {', '.join(selectors())}")
    return a


def made_up(grid: TokenGrid, heads: int, dim: int, device: torch.device) -> list[torch.Tensor]:
    """q, k and v, ``[1, S, heads, dim]``."""
    g = torch.Generator(device).manual_seed(0)
    dtype = load.choose_dtype("auto", device)
    shape = (1, grid.seq_len, heads, dim)
    channels = (0.5 * torch.randn(heads, dim, generator=g, device=device)).exp().to(dtype)
    places = torch.randn(1, -(-grid.seq_len // 64), heads, dim, generator=g, device=device, dtype=dtype)
    places = places.repeat_interleave(64, 1)[:, : grid.seq_len]
    q, k, v = (torch.randn(shape, generator=g, device=device, dtype=dtype) for _ in range(3))
    return [(q + places) * channels, (k + places) * channels, v]


def bench(rule: str, budget: Budget, a: argparse.Namespace, inputs: list[torch.Tensor]) -> Row:
    """The row of one rule with one budget; one that fails says why."""
    row = Row(rule, f"{budget.kind} {budget.value:g}", a.grid.seq_len, a.heads, a.head_dim)
    q, k, v = inputs
    try:
        entry = HeadEntry(TileOrder(1, 8, 16), selection=OnlineSelection(rule, budget))
        layout = build_layout(a.grid, [entry] * a.heads, a.block, packed=True).to(q.device)
        index, kept = pick_blocks(layout, q, k, v)
        picked = replace(layout, index=index, heads=replace(layout.heads, picks=None))
        pick = timing(samples_ms(lambda: pick_blocks(layout, q, k, v), q.device, a.ms)).ms
        rest = timing(samples_ms(lambda: sparse_attention(q, k, v, picked), q.device, a.ms)).ms
    except (RuntimeError, ValueError) as failure:  # out of memory, too
        return replace(row, status=f"{type(failure).__name__}: {str(failure).splitlines()[0][:200]}")
    return replace(row, kept=float(kept), pick_ms=pick, attention_ms=rest, share=pick / rest)


def main() -> int:
    """Time all rules, print and write their rows. The exit status."""
    a = arguments()
    device = load.choose_device(a.device)
    inputs = made_up(a.grid, a.heads, a.head_dim, device)
    rows: list[Row] = []
    print(f"{a.grid.seq_len} tokens, {a.heads} heads of {a.head_dim}, blocks of {a.block}")
    for budget in a.budgets:
        for rule in a.rules:
            row = bench(rule, budget, a, inputs)
            rows.append(row)
            times = f"{row.pick_ms:9.2f} ms of {row.attention_ms:9.2f} ms: {row.share:6.1%}, density {row.kept:.3f}"
            print(f"{rule:>16} {row.budget:<16} {times if row.status == 'ok' else row.status}", flush=True)
            if a.csv:
                with a.csv.open("w", newline="") as file:
                    writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
                    writer.writeheader()
                    writer.writerows(asdict(each) for each in rows)
    return int(any(row.status != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
