"""diffsparse: sparse attention for diffusion transformers.

>>> import diffsparse  # doctest: +SKIP
>>> pipe.enable_sparse_attention("path/to/plan")  # doctest: +SKIP

The names below are loaded when they are first used: importing this package loads neither diffusers nor triton.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffsparse import _autopatch

__version__ = "0.1.0"

#: module -> the public names it gives
_PUBLIC: dict[str, tuple[str, ...]] = {
    "diffsparse.grid": ("TokenGrid",),
    "diffsparse.order": (
        "TokenOrder",
        "RasterOrder",
        "AxisOrder",
        "TileOrder",
        "PhaseOrder",
        "CurveOrder",
        "parse_order",
    ),
    "diffsparse.patterns": (
        "Pattern",
        "Full",
        "Empty",
        "Window",
        "Radial",
        "Diagonals",
        "Band",
        "Columns",
        "GridStripes",
        "Sink",
        "Bitmap",
        "Union",
        "Intersection",
        "register_pattern",
    ),
    "diffsparse.entry": (
        "HeadEntry",
        "Execution",
    ),
    "diffsparse.tokens": ("TokenLayout",),
    "diffsparse.blocks": ("BlockIndex",),
    "diffsparse.heads": ("HeadSpec",),
    "diffsparse.selection": (
        "Budget",
        "OnlineSelection",
    ),
    "diffsparse.kernels.select": (
        "register_selector",
        "register_signal",
    ),
    "diffsparse.layout": (
        "BlockLayout",
        "build_layout",
    ),
    "diffsparse.kernels.backends": ("register_backend",),
    "diffsparse.kernels.tails": ("register_tail",),
    "diffsparse.schedule": ("Schedule",),
    "diffsparse.architecture": ("Architecture",),
    "diffsparse.plan": (
        "SparsityPlan",
        "PlanError",
    ),
    "diffsparse.online": ("OnlineRepair",),
    "diffsparse.preset_plans": (
        "presets",
        "preset",
    ),
    "diffsparse.pipelines": (
        "enable_sparse_attention",
        "disable_sparse_attention",
        "sparse_attention",
        "sparse_attention_summary",
        "register_family",
    ),
    "diffsparse.search.api": ("evaluate_plan", "search_plan"),
    "diffsparse.search.compare.api": ("compare_methods",),
    "diffsparse.search.recompose": ("compose_plan",),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = ["__version__", *_HOME]  # noqa: PLE0604

if TYPE_CHECKING:  # the same table, for type checkers and editors (a test compares the two)
    from diffsparse.architecture import Architecture as Architecture
    from diffsparse.blocks import BlockIndex as BlockIndex
    from diffsparse.entry import Execution as Execution
    from diffsparse.entry import HeadEntry as HeadEntry
    from diffsparse.grid import TokenGrid as TokenGrid
    from diffsparse.heads import HeadSpec as HeadSpec
    from diffsparse.kernels.backends import register_backend as register_backend
    from diffsparse.kernels.select import register_selector as register_selector
    from diffsparse.kernels.select import register_signal as register_signal
    from diffsparse.kernels.tails import register_tail as register_tail
    from diffsparse.layout import BlockLayout as BlockLayout
    from diffsparse.layout import build_layout as build_layout
    from diffsparse.online import OnlineRepair as OnlineRepair
    from diffsparse.order import AxisOrder as AxisOrder
    from diffsparse.order import CurveOrder as CurveOrder
    from diffsparse.order import PhaseOrder as PhaseOrder
    from diffsparse.order import RasterOrder as RasterOrder
    from diffsparse.order import TileOrder as TileOrder
    from diffsparse.order import TokenOrder as TokenOrder
    from diffsparse.order import parse_order as parse_order
    from diffsparse.patterns import Band as Band
    from diffsparse.patterns import Bitmap as Bitmap
    from diffsparse.patterns import Columns as Columns
    from diffsparse.patterns import Diagonals as Diagonals
    from diffsparse.patterns import Empty as Empty
    from diffsparse.patterns import Full as Full
    from diffsparse.patterns import GridStripes as GridStripes
    from diffsparse.patterns import Intersection as Intersection
    from diffsparse.patterns import Pattern as Pattern
    from diffsparse.patterns import Radial as Radial
    from diffsparse.patterns import Sink as Sink
    from diffsparse.patterns import Union as Union
    from diffsparse.patterns import Window as Window
    from diffsparse.patterns import register_pattern as register_pattern
    from diffsparse.pipelines import disable_sparse_attention as disable_sparse_attention
    from diffsparse.pipelines import enable_sparse_attention as enable_sparse_attention
    from diffsparse.pipelines import register_family as register_family
    from diffsparse.pipelines import sparse_attention as sparse_attention
    from diffsparse.pipelines import sparse_attention_summary as sparse_attention_summary
    from diffsparse.plan import PlanError as PlanError
    from diffsparse.plan import SparsityPlan as SparsityPlan
    from diffsparse.preset_plans import preset as preset
    from diffsparse.preset_plans import presets as presets
    from diffsparse.schedule import Schedule as Schedule
    from diffsparse.search.api import evaluate_plan as evaluate_plan
    from diffsparse.search.api import search_plan as search_plan
    from diffsparse.search.compare.api import compare_methods as compare_methods
    from diffsparse.search.recompose import compose_plan as compose_plan
    from diffsparse.selection import Budget as Budget
    from diffsparse.selection import OnlineSelection as OnlineSelection
    from diffsparse.tokens import TokenLayout as TokenLayout


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_autopatch.install()
