"""Patterns: rules from a grid and an order to the block pairs that are kept.

A pattern's parameters are latent units or fractions, so one pattern serves every resolution and length. It is
evaluated on blocks' boxes and runs, never on a token-by-token matrix; where a block is not a box the result covers it
(a pair that holds one wanted token pair is always kept). Patterns combine with ``|`` and ``&``.

Text is not a pattern's business: a layout keeps text rows and columns whatever the pattern says.

One module a pattern or a few kin, with a tuple ``PATTERNS``: modules here are found by themselves.
"""

from importlib import import_module
from pkgutil import iter_modules

from diffsparse.patterns.base import Pattern
from diffsparse.patterns.bitmap import Bitmap
from diffsparse.patterns.columns import Columns, Sink
from diffsparse.patterns.combined import Intersection, Union
from diffsparse.patterns.diagonals import Band, Diagonals
from diffsparse.patterns.plain import Empty, Full
from diffsparse.patterns.radial import Radial
from diffsparse.patterns.registry import pattern_kinds, register_pattern
from diffsparse.patterns.stripes import GridStripes
from diffsparse.patterns.window import Window

__all__ = [
    "Band",
    "Bitmap",
    "Columns",
    "Diagonals",
    "Empty",
    "Full",
    "GridStripes",
    "Intersection",
    "Pattern",
    "Radial",
    "Sink",
    "Union",
    "Window",
    "pattern_kinds",
    "register_pattern",
]

for _found in iter_modules(__path__):
    for _cls in getattr(import_module(f"{__name__}.{_found.name}"), "PATTERNS", ()):
        register_pattern(_cls)
