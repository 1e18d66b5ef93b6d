"""One row for each step: its figures, how it compares with dense attention, and the files it goes to."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

__all__ = ["DENSE_NAMES", "OK", "Row", "describe", "extras", "ratios", "write"]

OK = "ok"


@dataclass(frozen=True)
class Row:
    """One step.

    what: ``dense``, ``unmasked`` (dense, without the padding mask of a model that has one), ``rest``, ``fastest``
    (dense, on the fastest kernel that is installed) or ``sparse``. asked: the density asked for. density: of a call as
    it ran, tails counted, mean over layers and heads. backend: what ran. attention_share: of this step. speedup: the
    dense step of the same mode over this one; attention_speedup: the same of what is not ``rest``. peak_gib: memory at
    the highest, the weights included.
    """

    model: str
    tokens: int
    layers: int
    heads: int
    head_dim: int
    dtype: str
    mode: str
    what: str
    asked: float = 1.0
    tail: str = "none"
    numerics: str = "auto"
    block_size: int = 0
    density: float = 1.0
    backend: str = ""
    status: str = OK
    ms: float | None = None
    ms_low: float | None = None
    ms_high: float | None = None
    samples: int = 0
    attention_share: float | None = None
    speedup: float | None = None
    attention_speedup: float | None = None
    peak_gib: float | None = None
    peak_vs_dense: float | None = None


def ratios(rows: list[Row]) -> list[Row]:
    """Fill in what is relative to ``dense`` and ``rest`` of the same mode."""
    dense = next((r for r in rows if r.what == "dense"), None)
    rest_ms = next((r.ms for r in rows if r.what == "rest"), None)
    done = []
    for row in rows:
        if row.ms is not None and dense is not None and dense.ms is not None:
            ms, own = row.ms, None if rest_ms is None or row.what == "rest" else row.ms - rest_ms
            row = replace(row, speedup=dense.ms / ms)
            if row.peak_gib and dense.peak_gib:
                row = replace(row, peak_vs_dense=row.peak_gib / dense.peak_gib)
            if own is not None and rest_ms is not None:
                row = replace(row, attention_share=own / ms)
                if own > 0:
                    row = replace(row, attention_speedup=(dense.ms - rest_ms) / own)
        done.append(row)
    return done


#: What a dense step is called where people read it.
DENSE_NAMES = {"dense": "dense", "fastest": "dense, fastest", "unmasked": "dense, no mask"}


def extras(row: Row) -> list[str]:
    """Its tail and its numerics, each where it has one."""
    return [word for word, usual in ((row.tail, "none"), (row.numerics, "auto")) if word != usual]


def describe(row: Row) -> str:
    """The row as one line of text."""
    what = DENSE_NAMES.get(row.what, row.what)
    if row.what == "sparse":
        what = " ".join([f"sparse {row.asked:g}", *extras(row)])
    head = f"{row.model:<15}{row.mode:<10}{what:<22}"
    if row.ms is None:
        return f"{head}not timed: {row.status}"
    share = "" if row.attention_share is None else f"  attention {row.attention_share:5.1%}"
    speed = "" if row.what not in ("sparse", "fastest", "unmasked") or row.speedup is None else f"  {row.speedup:.2f}x"
    peak = "" if row.peak_gib is None else f"  peak {row.peak_gib:.1f} GiB"
    peak += "" if not row.backend else f"  {row.backend}"
    wrong = "" if row.status == OK else f"  NOT COUNTED: {row.status}"
    return f"{head}{row.ms:12.2f} ms  density {row.density:.3f}{share}{speed}{peak}{wrong}"


def write(rows: list[Row], machine: dict[str, str], as_csv: Path | None, as_json: Path | None) -> None:
    """Write all rows to the files that were asked for, the machine in each row."""
    table: list[dict[str, Any]] = [{**asdict(row), **machine} for row in rows]
    if as_json is not None:
        as_json.write_text(json.dumps(table, indent=1) + "\n")
    if as_csv is not None:
        with as_csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(table[0]))
            writer.writeheader()
            writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in line.items()} for line in table)
