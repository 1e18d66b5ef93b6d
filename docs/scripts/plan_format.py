"""Writes ``docs/plan_format.md`` from the code that reads and writes plans.

    python docs/scripts/plan_format.py          # to stdout
    python docs/scripts/plan_format.py --write  # the page itself

A test holds the page fresh.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from dataclasses import MISSING, Field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from diffsparse import plan as plans
from diffsparse import repair
from diffsparse.architecture import TEXT_POSITIONS
from diffsparse.codec import encode_entry, encode_pattern
from diffsparse.entry import MODES, NUMERICS, SELECTIONS, TAILS, Execution, HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.limits import (
    MAX_ARRAY_BYTES,
    MAX_BITMAP_BITS,
    MAX_ENTRIES,
    MAX_GRID_TOKENS,
    MAX_HEADS,
    MAX_INTEGER,
    MAX_ITEMS,
    MAX_JSON_BYTES,
    MAX_JSON_VALUES,
    MAX_NAME,
    MAX_NESTING,
    MAX_PATTERN_PARTS,
)
from diffsparse.online import LEAST_ROWS, MOST_ROWS
from diffsparse.order import AxisOrder, CurveOrder, PhaseOrder, RasterOrder, TileOrder, TokenOrder, parse_order
from diffsparse.patterns import Bitmap, Pattern, Sink, Window, pattern_kinds
from diffsparse.patterns.registry import RETIRED
from diffsparse.plan import Architecture, SparsityPlan
from diffsparse.reader import FORMAT_VERSION
from diffsparse.repair import REPAIR_KEY, Repair
from diffsparse.saving import DIGEST_KEY
from diffsparse.schedule import Schedule
from diffsparse.selection import BUDGETS, CADENCES, RULES, Budget, OnlineSelection
from diffsparse.tokens import BLOCK_SIZES

PAGE = Path(__file__).resolve().parents[1] / "plan_format.md"

# What a field's annotation is in the file. A new annotation has to be described here before the page can be made.
JSON_FORM = {
    "int": "integer",
    "int | str": "integer or string",
    "float": "number",
    "str": "string",
    "bytes": "name of an array in the safetensors file",
    "Pattern": "pattern",
    "TokenGrid": "`[frames, height, width]`",
    "TokenOrder": "order",
    "Execution": "object, below",
    "Budget": "object, below",
    "BudgetKind": f"one of {', '.join(f'`{kind}`' for kind in BUDGETS)}",
    "str | OnlineSelection": "string, or object, below",
    "tuple[tuple[str, float], ...]": "object: numbers by name",
    "str | tuple[float, ...]": f"{', '.join(f'`{c}`' for c in CADENCES)}, or list of numbers",
    "tuple[Pattern, ...]": "list of patterns",
    "tuple[float, ...]": "list of numbers",
    "tuple[str, ...]": "list of strings",
    "tuple[tuple[float, float], ...]": "list of `[high, low]`",
    "tuple[int, int, int]": "`[t, h, w]`, integers",
    "tuple[Extent, Extent, Extent]": "`[t, h, w]`: integers, fractions or null",
    "tuple[tuple[int, int, int], ...]": "list of `[f, h, w]`",
    "tuple[tuple[float, float, float, float, float, float], ...]": "list of `[f0, f1, h0, h1, w0, w1]`",
}

ORDERS: tuple[TokenOrder, ...] = (
    RasterOrder(),
    *(AxisOrder(axes) for axes in ("FHW", "FWH", "HWF", "HFW", "WHF", "WFH")),
    TileOrder(1, 8, 8),
    PhaseOrder("frame"),
    PhaseOrder("row"),
    PhaseOrder(16),
    CurveOrder(),
)

# The file's keys at the top, in the order in which they are written.
TOP = {
    "format": '`"diffsparse.sparse_plan"`.',
    "format_version": f"`{FORMAT_VERSION}`. A higher one is refused.",
    "block_size": f"Tokens of a block, {' or '.join(map(str, BLOCK_SIZES))}.",
    "architecture": "What the plan shares with the model it is for, with its fingerprint; null for any model.",
    "schedule": "When the plan runs sparse.",
    "entries": "The distinct choices that heads make.",
    "layers": f'Paths of the attention modules, one for each row of `index`; `["{plans.ANY_LAYER}"]` for any model.',
    "index": "For each phase a list with one string a layer: the heads' places in `entries`, parted by spaces.",
    "record": "Where the plan comes from: free JSON. No number of the output depends on it.",
}
# Only where heads have a repair.
WITH_REPAIR = {
    REPAIR_KEY: "What the outputs of heads are corrected by. Of maps that were fitted for them: `kind` (`affine`), "
    "`maps` (how many), and `rank` (null where matrices are whole); their arrays are described below. Of maps that are "
    f"fitted in every call: `kind` (`online`), and `rows` ({LEAST_ROWS} to {MOST_ROWS:,}), of which it has no arrays.",
}
# Only where there are arrays.
WITH_ARRAYS = {
    DIGEST_KEY: f"SHA-256 of the arrays in `{plans.ARRAYS_NAME}`, which binds them to this file: those of another "
    "plan are refused. It is taken over the arrays in the order of their names: of each the line "
    "`[name, type, shape]` as JSON, then its bytes. Files without it are read too.",
    "ignorable": "Names of keys that no number of the output depends on.",
}


def prose(text: str) -> str:
    """A docstring as Markdown: without roles, with single backticks, consecutive lines joined."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", inspect.cleandoc(text)).replace("``", "`")
    text = re.sub(r"\n+>>>.*", "", text, flags=re.DOTALL)
    return "\n\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", text))


def default_of(field: Field[Any]) -> str:
    if field.default is not MISSING:
        value = field.default
    elif field.default_factory is not MISSING:
        value = field.default_factory()
    else:
        return "required"
    if field.name == "parameters":
        value = dict(value)
    if isinstance(value, Pattern):
        value = encode_pattern(value, {})
    elif isinstance(value, TokenOrder):
        value = str(value)
    elif isinstance(value, Budget):
        return "required"  # in a file: what reads it wants to know the budget
    elif isinstance(value, Execution):
        value = {f.name: getattr(value, f.name) for f in fields(value)}
    return f"`{json.dumps(value)}`"


def field_table(cls: type) -> list[str]:
    known = fields(cls)  # type: ignore[arg-type]
    if not known:
        return ["No fields.", ""]
    lines = ["| field | in the file | default |", "|---|---|---|"]
    lines += [f"| `{f.name}` | {JSON_FORM[str(f.type)]} | {default_of(f)} |" for f in known]
    return [*lines, ""]


def order_rows() -> list[str]:
    """A row for each kind of order, with all forms that are shown of it."""
    forms: dict[type, list[str]] = {}
    for order in ORDERS:
        assert parse_order(str(order)) == order
        forms.setdefault(type(order), []).append(f"`{order}`")
    return [f"| {', '.join(shown)} | {prose(cls.__doc__ or '')} |".replace("\n\n", " ") for cls, shown in forms.items()]


def example() -> SparsityPlan:
    """A small plan for no model in particular: the same in every version of the page."""
    near = HeadEntry(TileOrder(1, 8, 8), Window((2, 0.4, 0.4)) | Sink(frames=1), execution=Execution(tail="mean"))
    return SparsityPlan.uniform(near, HeadEntry(), schedule=Schedule(sparse_below=0.9, phase_bounds=(0.3,)))


def picked() -> HeadEntry:
    """An entry whose blocks are picked while the model runs."""
    rule = OnlineSelection("pooled", Budget("top_p", 0.9, most=0.5), cadence=(0.8, 0.4))
    return HeadEntry(TileOrder(1, 8, 8), selection=rule)


def rule_words() -> list[str]:
    """Each rule of the library, with its parameters, their defaults and bounds."""
    words = []
    for rule, parameters in RULES.items():
        told = [f"`{name}` {p.default:g}, from {p.least:g} to {p.most:g}" for name, p in parameters.items()]
        words.append(f"`{rule}`" + (f" ({'; '.join(told)})" if told else ""))
    return words


def with_arrays() -> SparsityPlan:
    """A plan whose file has every key."""
    grid, order = TokenGrid(1, 16, 16), RasterOrder()
    entry = HeadEntry(order, Bitmap.from_mask(np.eye(4, dtype=bool), grid, order, 64))
    maps = Repair(np.zeros((1, 1, 1), np.int32), np.zeros((1, 8, 8), np.float16), np.zeros((1, 8), np.float16))
    return replace(SparsityPlan.from_table({"blocks.0.attn": [[entry]]}), repair=maps)


def _keys(plan: SparsityPlan) -> list[str]:
    return list(json.loads(plan.to_files()[plans.JSON_NAME]))


def page() -> str:
    """The whole page."""
    assert list(TOP) == _keys(example()), "a key of the file is not described"
    assert list(TOP | WITH_REPAIR | WITH_ARRAYS) == _keys(with_arrays()), "a key of a file with arrays is not described"
    lines = [
        "# Plan format",
        "",
        "Made from the code by `python docs/scripts/plan_format.py --write`.",
        "",
        f"A plan is a folder, or a repository on the Hub, with `{plans.JSON_NAME}`; `{plans.ARRAYS_NAME}` where a "
        f"pattern is a bitmap or heads have a repair; and a generated `{plans.CARD_NAME}`, where there is none that "
        "somebody wrote. There is no pickle and no YAML in it, and nothing of it is run.",
        "",
        "What is larger than any model needs is refused before it is read:",
        "",
        "| what | at most |",
        "|---|---|",
        f"| `{plans.JSON_NAME}` | {MAX_JSON_BYTES >> 20} MiB, {MAX_JSON_VALUES:,} values |",
        f"| `{plans.ARRAYS_NAME}` | {MAX_ARRAY_BYTES >> 30} GiB |",
        f"| distinct entries | {MAX_ENTRIES:,} |",
        f"| heads, over all phases and layers | {MAX_HEADS:,} |",
        f"| tokens of a grid | {MAX_GRID_TOKENS:,} |",
        f"| block pairs of a bitmap | {MAX_BITMAP_BITS:,} |",
        f"| patterns in an entry, parts counted | {MAX_PATTERN_PARTS}, nested {MAX_NESTING} deep |",
        f"| a list in a pattern | {MAX_ITEMS:,} |",
        f"| a name | {MAX_NAME} characters, none of them a control character |",
        f"| an integer | {MAX_INTEGER:,} |",
        "",
        f"## `{plans.JSON_NAME}`",
        "",
        "| key | what it holds |",
        "|---|---|",
        *(f"| `{key}` | {text} |" for key, text in TOP.items()),
        "",
        "A plan with bitmaps or a repair has up to three more:",
        "",
        "| key | what it holds |",
        "|---|---|",
        *(f"| `{key}` | {text} |" for key, text in (WITH_REPAIR | WITH_ARRAYS).items()),
        "",
        "A key that this version does not know is refused, since it might change the output; a newer writer lists "
        "under `ignorable` the keys that do not, and those only warn. A key that stands twice, `NaN` and infinities "
        "are refused. The same plan always gives the same bytes.",
        "",
        "For example:",
        "",
        "```json",
        example().to_files()[plans.JSON_NAME].decode().rstrip(),
        "```",
        "",
        "## Architecture",
        "",
        prose(inspect.getdoc(Architecture) or ""),
        "",
        *field_table(Architecture),
        f"`text_position` is one of {', '.join(f'`{p}`' for p in TEXT_POSITIONS)}. Beside these the file has the "
        "`fingerprint` of them all: sixteen hexadecimal digits. One that does not match is refused.",
        "",
        "## Schedule",
        "",
        prose(inspect.getdoc(Schedule) or ""),
        "",
        *field_table(Schedule),
        "## Entries",
        "",
        prose(inspect.getdoc(HeadEntry) or ""),
        "",
        *field_table(HeadEntry),
        f"`selection` is {' or '.join(f'`{s}`' for s in SELECTIONS)}, or an object:",
        "",
        prose(inspect.getdoc(OnlineSelection) or ""),
        "",
        *field_table(OnlineSelection),
        f"Rules are {', '.join(rule_words())}; one from outside has to be made known with "
        "`diffsparse.register_signal` or `diffsparse.register_selector` before the plan is read. `budget`:",
        "",
        prose(inspect.getdoc(Budget) or ""),
        "",
        *field_table(Budget),
        "```json",
        json.dumps(encode_entry(picked(), {})["selection"], indent=1),
        "```",
        "",
        "`execution`:",
        "",
        prose(inspect.getdoc(Execution) or ""),
        "",
        *field_table(Execution),
        "Allowed: "
        + "; ".join(
            f"`{name}` {', '.join(f'`{v}`' for v in values)}"
            for name, values in (("mode", MODES), ("tail", TAILS), ("numerics", NUMERICS))
        )
        + ". `SparsityPlan.with_numerics` changes those of a whole plan.",
        "",
        "```json",
        json.dumps(encode_entry(example().entries[0], {}), indent=1),
        "```",
        "",
        "## Orders",
        "",
        "An order is a string.",
        "",
        "| order | what it does |",
        "|---|---|",
        *order_rows(),
        "",
        "## Patterns",
        "",
        "A pattern is an object with its `kind` and its fields. A field with a default may be left out.",
        "",
    ]
    for kind, cls in pattern_kinds().items():
        lines += [f"### `{kind}`", "", prose(cls.__doc__ or ""), "", *field_table(cls)]
    lines += [
        "Text is no pattern's business, so older kinds that asked for text rows or columns added no pair of blocks: "
        + ", ".join(f"`{old}` is read as `{new}`" for old, new in RETIRED.items())
        + ". A kind that is not listed here belongs to a pattern from outside, which `diffsparse.register_pattern` has "
        "to make known before the plan is read.",
        "",
        f"## `{plans.ARRAYS_NAME}`",
        "",
        "One uint8 array for each bitmap, named as the bitmap's `bits` says. "
        + prose(
            re.search(r"``bits``: .*", Bitmap.__doc__ or "", re.DOTALL)[0]  # type: ignore[index]
        ),
        "",
        prose(inspect.getdoc(repair) or ""),
        "",
        f"The arrays of a repair begin with `{REPAIR_KEY}.`. "
        + prose((inspect.getdoc(Repair) or "").split("\n\n", 1)[1]),
        "",
        "Beside a searched plan lies `attention.safetensors`: the attention that the search measured, pooled "
        "(`pooled`, `[phases, layers, heads, bins, bins]`, a byte each: 255 times the square root of the share of the "
        "map's `peak`), and of every head's entry the predicted "
        "error and the share of the attention that it keeps (`error` and `kept_mass`, `[phases, layers, heads]`). "
        "`diffsparse show` and the demo read it; no kernel does, and a plan is whole without it.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(), "utf-8")
    else:
        sys.stdout.write(page())
