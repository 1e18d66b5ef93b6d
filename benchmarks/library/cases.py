"""The attention calls that the kernel benchmark times, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from diffsparse.entry import Execution, HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.kernels.random_rows import random_rows
from diffsparse.layout import BlockLayout, build_layout
from diffsparse.online import OnlineRepair
from diffsparse.order import AxisOrder, CurveOrder, PhaseOrder, RasterOrder, TileOrder, TokenOrder
from diffsparse.patterns import Band, Columns, Diagonals, Full, Radial, Window
from diffsparse.repair import HeadRepair

__all__ = ["CASES", "Case", "Setting", "cases", "uniform_case", "with_outliers"]


@dataclass(frozen=True)
class Setting:
    """One layout of a case.

    entries: of one call's heads. density: draws every row's kept blocks at random, as many in each; None takes the
    entries' own patterns. like: draw at the share of blocks that this other setting keeps. shared: the same lists for
    all heads. baseline: the setting whose time is the yardstick. masked_text: text tokens at the end that are padding.
    repair: how the output is corrected in the layouts of :meth:`Case.layout`. 0: by maps that are drawn at random;
    above 0: online, by so many exact rows.
    """

    label: str
    entries: tuple[HeadEntry, ...]
    density: float | None = None
    like: str | None = None
    shared: bool = False
    baseline: str | None = None
    masked_text: int = 0
    repair: int | None = None

    def layout(self, grid: TokenGrid, block_size: int, density: float | None = None) -> BlockLayout:
        """On the CPU. ``density``: of a setting that is drawn ``like`` another."""
        wanted = self.density if density is None else density
        if wanted is None:
            return build_layout(grid, self.entries, block_size)
        return random_rows(grid, self.entries, block_size, wanted, shared=self.shared)


@dataclass(frozen=True)
class Case:
    """Calls on one shape, batch 1.

    peers: its layouts are of the form that peers know, so they are timed too. outliers: of q, k and v some channels
    stand out, as in trained models.
    """

    name: str
    about: str
    grid: TokenGrid
    heads: int
    head_dim: int
    settings: tuple[Setting, ...]
    block_size: int = 128
    peers: bool = False
    outliers: bool = False

    def layout(self, setting: Setting, density: float | None = None) -> BlockLayout:
        """That of a setting, with its repair, on the CPU. ``density``: as in :meth:`Setting.layout`."""
        found = setting.layout(self.grid, self.block_size, density)
        if setting.repair is None:
            return found
        if setting.repair:
            return found.repaired(OnlineRepair(setting.repair))
        return replace(found, heads=replace(found.heads, repair=_random_maps(self.heads, self.head_dim)))


def with_outliers(x: torch.Tensor) -> torch.Tensor:
    """``x`` ``[..., D]`` with every sixteenth channel 8 times as wide, and off zero by as much."""
    x = x.clone()
    x[..., 3::16] = 8 * x[..., 3::16] + 8
    return x


def _random_maps(heads: int, dim: int) -> HeadRepair:
    """One for every head, about half as large as what it is added to."""
    draw = torch.Generator().manual_seed(0)
    weight = 0.5 * torch.randn(heads, dim, dim, generator=draw) / dim**0.5
    bias = 0.1 * torch.randn(heads, dim, generator=draw)
    return HeadRepair(weight.half(), bias.half(), torch.ones(heads, dtype=torch.bool))


def _heads(count: int, order: TokenOrder | None = None, tail: str = "none") -> tuple[HeadEntry, ...]:
    return (HeadEntry(order=order or RasterOrder(), execution=Execution(tail=tail)),) * count


def uniform_case(
    name: str,
    about: str,
    tokens: int,
    heads: int,
    head_dim: int,
    densities: Sequence[float] = (1.0, 0.5, 0.25, 0.1),
    *,
    shared: bool = False,
    tails: Sequence[str] = ("none",),
    block_size: int = 128,
) -> Case:
    """Lists of equal length drawn at random, on a sequence without text."""
    settings = [
        Setting(
            f"d={density:g}" + ("" if tail == "none" else f" {tail}"), _heads(heads, tail=tail), density, None, shared
        )
        for tail in tails
        for density in densities
    ]
    return Case(name, about, TokenGrid(1, 1, tokens), heads, head_dim, tuple(settings), block_size, peers=True)


def _radial(grid: TokenGrid, heads: int) -> tuple[Setting, ...]:
    radial = (HeadEntry(RasterOrder(), Radial()),) * heads
    return (
        Setting("uniform lists", _heads(heads), like="radial"),
        Setting("radial", radial, baseline="uniform lists"),
    )


def _mixed_entries(heads: int) -> tuple[HeadEntry, ...]:
    """Heads as a search gives them: each its own order, pattern and density, some dense, skipped or with tails."""
    kinds = (
        HeadEntry(TileOrder(2, 8, 8), Window((0.5, 0.4, 0.4)), execution=Execution(tail="moments")),
        HeadEntry(RasterOrder(), Band(0.06)),
        HeadEntry(AxisOrder("HWF"), Band(0.1), execution=Execution(tail="mean")),
        HeadEntry(RasterOrder(), Full()),
        HeadEntry(RasterOrder(), Diagonals(((0, 0, 0), (1, 0, 0), (2, 0, 0)), (0, 0.05, 0.3))),
        HeadEntry(TileOrder(2, 8, 8), Window((None, 0.25, 0.25))),
        HeadEntry(PhaseOrder("frame"), Band(0.04), execution=Execution(tail="moments")),
        HeadEntry(CurveOrder(), Band(0.08), execution=Execution(tail="mean")),
        HeadEntry(RasterOrder(), Radial()),
        HeadEntry(RasterOrder(), Full(), execution=Execution(mode="skip")),
        HeadEntry(
            TileOrder(2, 8, 8),
            Columns(((0.0, 1.0, 0.4, 0.5, 0.0, 1.0),)) | Window((0.3, 0.2, 0.2)),
            execution=Execution(tail="moments"),
        ),
        HeadEntry(AxisOrder("WHF"), Band(0.05)),
    )
    return tuple(kinds[i % len(kinds)] for i in range(heads))


def _mixed(grid: TokenGrid, heads: int) -> tuple[Setting, ...]:
    text = grid.text_after
    return (
        Setting("uniform lists", _heads(heads), like="mixed plan"),
        Setting("mixed plan", _mixed_entries(heads), baseline="uniform lists", masked_text=text // 3),
    )


def _orders(grid: TokenGrid, heads: int) -> tuple[Setting, ...]:
    orders = (
        AxisOrder("HWF"),
        AxisOrder("WHF"),
        TileOrder(1, 8, 16),
        TileOrder(2, 8, 8),
        PhaseOrder("frame"),
        CurveOrder(),
    )
    return (
        Setting("raster", _heads(heads), 0.25),
        *(Setting(str(order), _heads(heads, order), 0.25, baseline="raster") for order in orders),
    )


def _tails(grid: TokenGrid, heads: int) -> tuple[Setting, ...]:
    return (
        Setting("no tail", _heads(heads), 0.08),
        Setting("moments", _heads(heads, tail="moments"), 0.08, baseline="no tail"),
    )


def _repaired(grid: TokenGrid, heads: int) -> tuple[Setting, ...]:
    return (
        Setting("no repair", _heads(heads), 0.25),
        Setting("repaired", _heads(heads), 0.25, baseline="no repair", repair=0),
        *(
            Setting(f"online, {rows} rows", _heads(heads), 0.25, baseline="no repair", repair=rows)
            for rows in (64, 256)
        ),
    )


_WAN, _WAN_480P, _HUNYUAN = TokenGrid(21, 45, 80), TokenGrid(21, 30, 52), TokenGrid(33, 45, 80)


def _structured(
    name: str,
    about: str,
    grid: TokenGrid,
    heads: int,
    settings: Callable[[TokenGrid, int], tuple[Setting, ...]],
    tiny: bool,
) -> Case:
    if tiny:
        grid = TokenGrid(3, 9, 16, text_after=min(grid.text_after, 20))
        heads = 12 if settings is _mixed else 2
    return Case(name, about, grid, heads, 16 if tiny else 128, settings(grid, heads), 64 if tiny else 128)


#: Case names, in the order in which they are run.
CASES = (
    "uniform-32k",
    "uniform-118k",
    "outliers-32k",
    "outliers-118k",
    "outliers-head-dim-64",
    "shared-32k",
    "head-dim-64",
    "radial",
    "mixed",
    "mixed-text",
    "orders",
    "tail",
    "repair",
    "repair-480p",
)


def cases(names: Sequence[str] = CASES, *, tiny: bool = False) -> list[Case]:
    """The named cases; ``tiny`` cuts each one to a few hundred tokens, for a CPU. Raises ValueError for other names."""
    if unknown := [name for name in names if name not in CASES]:
        raise ValueError(f"no case called {', '.join(map(repr, unknown))}; there are {', '.join(CASES)}")
    found = {
        "uniform-32k": uniform_case("uniform-32k", "random lists per head", 32768, 24, 128),
        "uniform-118k": uniform_case("uniform-118k", "random lists per head, HunyuanVideo 720p", 118800, 24, 128),
        "shared-32k": uniform_case("shared-32k", "random lists, one for all heads", 32768, 24, 128, shared=True),
        "head-dim-64": uniform_case("head-dim-64", "random lists per head, CogVideoX-1.5", 45106, 30, 64),
        "radial": _structured("radial", "radial attention, Wan 14B 720p", _WAN, 40, _radial, tiny),
        "mixed": _structured("mixed", "every head its own entry, Wan 14B 720p", _WAN, 40, _mixed, tiny),
        "mixed-text": _structured(
            "mixed-text",
            "the same with text, a third of it padding",
            replace(_HUNYUAN, text_after=256),
            24,
            _mixed,
            tiny,
        ),
        "orders": _structured("orders", "the cost of orders, Wan 14B 720p", _WAN, 40, _orders, tiny),
        "tail": _structured("tail", "the cost of the moments tail, HunyuanVideo 720p", _HUNYUAN, 24, _tails, tiny),
        "repair": _structured("repair", "the cost of a repair, Wan 14B 720p", _WAN, 40, _repaired, tiny),
        "repair-480p": _structured(
            "repair-480p", "the cost of a repair, Wan 1.3B 480p", _WAN_480P, 12, _repaired, tiny
        ),
    }
    for name, like in (("32k", "uniform-32k"), ("118k", "uniform-118k"), ("head-dim-64", "head-dim-64")):
        name, about = f"outliers-{name}", f"{found[like].about}, channels that stand out"
        found[name] = replace(found[like], name=name, about=about, outliers=True)
    if tiny:
        for name in [name for name, case in found.items() if case.peers]:
            case, heads = found[name], 2
            settings = tuple(replace(s, entries=s.entries[:heads]) for s in case.settings)
            # 410 tokens: the last block is short.
            found[name] = replace(case, grid=TokenGrid(1, 1, 410), heads=heads, head_dim=16, settings=settings)
    return [found[name] for name in names]
