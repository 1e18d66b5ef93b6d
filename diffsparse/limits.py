"""How large what is read may be: plan files come from other people, and nothing is allocated before it is checked.

Each limit leaves room above what models need today. What is above it is refused with the limit in the message.
"""

from __future__ import annotations

__all__ = [
    "LEAST_ROWS",
    "MAX_ARRAY_BYTES",
    "MAX_BITMAP_BITS",
    "MAX_ENTRIES",
    "MAX_GRID_TOKENS",
    "MAX_HEADS",
    "MAX_INTEGER",
    "MAX_ITEMS",
    "MAX_JSON_BYTES",
    "MAX_JSON_VALUES",
    "MAX_NAME",
    "MAX_NESTING",
    "MAX_PATTERN_PARTS",
    "MAX_TEXT",
    "MOST_ROWS",
]

#: Bytes of a ``sparse_plan.json``. A plan of 9,600 distinct bitmaps has about 8 MiB.
MAX_JSON_BYTES = 64 * 2**20
#: Values in it, counted by commas and brackets before it is parsed: a value takes up to 200 bytes of memory, and two
#: bytes in the file. 9,600 distinct bitmaps have about 300,000.
MAX_JSON_VALUES = 2**21
#: Bytes of a ``sparse_plan.safetensors``: 9,600 bitmaps of 129 frames of 720p (118,800 tokens) have 3.9 GiB.
MAX_ARRAY_BYTES = 4 * 2**30
#: Tokens of one grid, text included. 129 frames of 720p are 118,800; block masks grow with the square: at the limit,
#: in blocks of 64, one has 64 MiB.
MAX_GRID_TOKENS = 2**19
#: Pairs of blocks in one bitmap: all of the largest grid in blocks of 64.
MAX_BITMAP_BITS = 2**26
#: Distinct entries of a plan. Four phases of 60 layers of 40 heads are 9,600 if no two heads share one.
MAX_ENTRIES = 2**15
#: Heads of a plan, over all layers and phases.
MAX_HEADS = 2**20
#: Integers: sizes, offsets, strides, counts. Products of two fit into 64 bits.
MAX_INTEGER = 2**31 - 1
#: Items of a list in a pattern: boxes, offsets, phases. Each is a pass over the block mask.
MAX_ITEMS = 8192
#: Patterns in one entry, parts and fallbacks counted, and how deep they may nest.
MAX_PATTERN_PARTS = 256
MAX_NESTING = 16
#: Characters of a name (a layer's path, a class) and of a text that the code reads (a device, a version).
MAX_NAME = 256
MAX_TEXT = 4096
#: Exact rows of an online repair: fewer say too little of a head; more are dear.
LEAST_ROWS, MOST_ROWS = 16, 4096
