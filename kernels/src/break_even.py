"""Whether sparse attention pays on a device: break-even tables, where they are kept and how one is measured.

A break-even table is a :class:`~diffsparse.kernels.costs.CostTable` of several lengths. Tables that were measured
elsewhere are in ``break_even.json`` beside this module; one that is measured on the machine itself (``diffsparse bench
break-even``) lies in the cache folder and goes before them. A device without a table is unknown, and nothing is
predicted for it.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from diffsparse.entry import NUMERICS as NUMERICS_NAMES
from diffsparse.entry import TAILS, Execution, HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.heads import GATHERED, NUMERICS, SKIP, TAIL
from diffsparse.kernels.api import sparse_attention
from diffsparse.kernels.backends import way_of
from diffsparse.kernels.cache import cache_root
from diffsparse.kernels.checks import choose_backend
from diffsparse.kernels.clock import samples_ms, timing
from diffsparse.kernels.costs import CostTable
from diffsparse.kernels.dense import DENSE_KERNELS, dense_attention, race_dense
from diffsparse.kernels.random_rows import random_rows
from diffsparse.layout import BlockLayout
from diffsparse.online import OnlineRepair
from diffsparse.order import AxisOrder, RasterOrder
from diffsparse.saving import write_whole
from diffsparse.tails import tail_name
from diffsparse.work import HeadWork

__all__ = ["device_name", "find_table", "local_file", "measure_break_even", "save_local", "work_of"]

logger = logging.getLogger("diffsparse")

FORMAT = 1
TOKENS = (1024, 2048, 4096, 8192, 16384, 32768)
DENSITIES = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
#: Gathering costs the same at every density; this is where it is measured.
_GATHER_DENSITY = 0.25
_TURNS = 3
_SHIPPED = Path(__file__).with_name("break_even.json")


def work_of(layout: BlockLayout) -> list[HeadWork]:
    """What each head of a layout has to do."""
    heads, n, picks = layout.num_heads, layout.num_blocks, layout.heads.picks
    counts = layout.index.row_ptr[0].diff().view(heads, n).sum(1).tolist()
    blocks = (layout.tokens.lengths() > 0).sum(1).tolist()
    online = layout.heads.repair
    extra = online.time(layout.grid) if isinstance(online, OnlineRepair) else 0.0
    order, table = layout.tokens.head_order.tolist(), layout.heads.table.tolist()
    kept = [counts[h] / blocks[order[h]] ** 2 for h in range(heads)]
    shares = kept if picks is None else [s if of is None else of for s, of in zip(kept, picks.shares)]
    return [
        HeadWork(
            density=layout.densities[h],
            blocks=shares[h],
            tail=tail_name(table[h][TAIL]),
            gathered=table[h][GATHERED] > 0,
            skipped=bool(table[h][SKIP]),
            numerics=NUMERICS_NAMES[table[h][NUMERICS]],
            extra=extra,
            varies=picks is not None and picks.varies[h],
        )
        for h in range(heads)
    ]


def device_name(device: torch.device) -> str:
    """What tables are kept by: the GPU's name, or the processor's and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


@lru_cache(maxsize=1)
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        import platform

        return platform.processor() or platform.machine() or "cpu"


def local_file(device: str, root: Path | None = None) -> Path:
    """Where this machine keeps a device's tables."""
    return (root or cache_root()) / "break_even" / (re.sub(r"[^A-Za-z0-9]+", "_", device).strip("_") + ".json")


def save_local(table: CostTable, root: Path | None = None) -> Path:
    """Add a table to the machine's own; it replaces one for the same backend, way and head_dim. Returns the file."""
    path = local_file(table.device, root)
    path.parent.mkdir(parents=True, exist_ok=True)
    same = (table.backend, table.way, table.head_dim)
    kept = [t for t in _read(path) if (t.backend, t.way, t.head_dim) != same] if path.is_file() else []
    text = json.dumps({"format": FORMAT, "tables": [t.to_dict() for t in (*kept, table)]}, indent=1) + "\n"
    write_whole(path, text.encode())
    _read_cached.cache_clear()
    return path


def _read(path: Path) -> tuple[CostTable, ...]:
    """A file's tables; of one that is damaged none, with a line in the log, since it must not stop a pipeline."""
    try:
        data = json.loads(path.read_text("utf-8"))
        if data["format"] != FORMAT:
            raise ValueError(f"it has format {data['format']!r}, this version reads {FORMAT}")
        return tuple(CostTable.from_dict(table) for table in data["tables"])
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        logger.warning(
            "the break-even table %s cannot be read (%s: %s); measure it again with `diffsparse bench break-even`",
            path, type(error).__name__, error,
        )  # fmt: skip
        return ()


@lru_cache(maxsize=8)
def _read_cached(path: Path, changed: int) -> tuple[CostTable, ...]:
    return _read(path)


def find_table(device: torch.device, head_dim: int, tails: Collection[str] = ()) -> CostTable | None:
    """The table for this device and the backend that ``"auto"`` takes on it, or None where none was measured.

    ``tails``: those that heads have, for which ``"auto"`` may take another backend.

    One measured on this machine goes before one that is shipped, then the one of the nearest head_dim. One that was
    measured with another backend than runs now, or in another of its ways, says nothing.
    """
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    probe = torch.empty(1, 1, 1, head_dim, dtype=dtype, device=device)
    backend, name = choose_backend("auto", probe, tails), device_name(device)
    for path in (local_file(name), _SHIPPED):
        if not path.is_file():
            continue
        fitting = [t for t in _read_cached(path, path.stat().st_mtime_ns) if (t.device, t.backend) == (name, backend)]
        if any(t.way for t in fitting):
            fitting = [t for t in fitting if t.way in ("", way_of(backend))]
        if fitting:
            return min(fitting, key=lambda t: abs(t.head_dim - head_dim))
    return None


def _ratio(function: Callable[[], Any], over: Callable[[], Any], device: torch.device, budget_ms: float) -> float:
    """Median time of one over that of the other, timed in turn, so that what else the machine does falls on both."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(_TURNS):
        for one, samples in zip((function, over), times):
            samples += samples_ms(one, device, budget_ms / _TURNS, least=2)
    return timing(times[0]).ms / timing(times[1]).ms


@torch.no_grad()
def measure_break_even(
    device: torch.device,
    *,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    block_size: int = 128,
    tokens: Sequence[int] = TOKENS,
    densities: Sequence[float] = DENSITIES,
    budget_ms: float = 100.0,
    about: dict[str, str] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> CostTable:
    """Time sparse calls with random lists and every tail against the fastest dense attention of torch, batch 1."""
    draw = torch.Generator(device).manual_seed(0)
    ratio: dict[str, list[tuple[float, ...]]] = {tail: [] for tail in TAILS}
    gather, dense_names = [], []
    sdpa = [name for name in DENSE_KERNELS if name.endswith("_sdpa")]
    every_tail = [tail for tail in TAILS if tail != "none"]
    backend = choose_backend("auto", torch.empty(1, 1, 1, head_dim, dtype=dtype, device=device), every_tail)
    for size in tokens:
        shape = (1, size, heads, head_dim)
        q, k, v = (torch.randn(*shape, generator=draw, device=device, dtype=dtype) for _ in range(3))
        race = race_dense(q, k, v, kernels=sdpa, budget_ms=budget_ms)
        dense_names.append(race.fastest)
        dense = partial(dense_attention, q, k, v, kernel=race.fastest)
        attend = partial(sparse_attention, q, k, v, backend=backend)
        # Orders are bijections of a box, so the sequence is one: rows of 32 tokens.
        grid = TokenGrid(1, size // 32, 32) if size % 32 == 0 else TokenGrid(1, 1, size)

        def over_dense(entry: HeadEntry, density: float) -> float:
            layout = random_rows(grid, [entry] * heads, block_size, density).to(device)  # noqa: B023
            return _ratio(partial(attend, layout), dense, device, budget_ms)  # noqa: B023

        for tail in TAILS:
            entry = HeadEntry(RasterOrder(), execution=Execution(tail=tail))
            ratio[tail].append(tuple(over_dense(entry, density) for density in densities))
        plain = over_dense(HeadEntry(RasterOrder()), _GATHER_DENSITY)
        gather.append(max(0.0, over_dense(HeadEntry(AxisOrder("WHF")), _GATHER_DENSITY) - plain))
        told = ", ".join(f"{d:g}: {r:.2f}" for d, r in zip(densities, ratio["none"][-1]))
        say(
            f"{size} tokens: dense {race.ms[race.fastest]:.3g} ms ({race.fastest}); sparse over dense by density {told}"
        )
    return CostTable(
        device=device_name(device),
        backend=backend,
        dtype=str(dtype).removeprefix("torch."),
        heads=heads,
        head_dim=head_dim,
        block_size=block_size,
        tokens=tuple(tokens),
        densities=tuple(densities),
        ratio={tail: tuple(rows) for tail, rows in ratio.items()},
        gather=tuple(gather),
        dense=tuple(dense_names),
        about=dict(about or {}),
        way=way_of(backend),
    )
