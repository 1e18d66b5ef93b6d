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
    "diffsparse.entry": ("Execution", "HeadEntry"),
    "diffsparse.layout": ("BlockLayout", "build_layout"),
    "diffsparse.pipelines": (
        "enable_sparse_attention",
        "disable_sparse_attention",
        "sparse_attention",
        "sparse_attention_summary",
        "register_family",
    ),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:  # the same table, for type checkers and editors (a test compares the two)
    from diffsparse.entry import Execution as Execution
    from diffsparse.entry import HeadEntry as HeadEntry


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_autopatch.install()
