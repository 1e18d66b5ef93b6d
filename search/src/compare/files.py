"""The files that a comparison ends with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from diffsparse.saving import write_whole
from diffsparse.search.compare.page import comparison_page
from diffsparse.search.compare.plot import pareto
from diffsparse.search.compare.result import Comparison
from diffsparse.search.compare.table import comparison_csv
from diffsparse.search.errors import writing
from diffsparse.search.report import write_picture

__all__ = ["write_comparison"]

NAMES = ("compare.json", "compare.csv", "pareto.png", "compare.html")


def write_comparison(folder: Path, comparison: Comparison, shown: Sequence[int]) -> Comparison:
    """Write :data:`NAMES`; gives the comparison with the names of its files.

    shown: the cases whose clips are in the page. Raises :class:`~diffsparse.search.errors.BadInput`.
    """
    found = replace(comparison, files=tuple(str(folder / name) for name in NAMES))
    text = json.dumps(found.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    plot = pareto(found)
    write_picture(plot, folder / "pareto.png")
    page = comparison_page(found, folder, shown, plot)
    for name, content in (("compare.json", text), ("compare.csv", comparison_csv(found)), ("compare.html", page)):
        with writing(folder / name):
            write_whole(folder / name, content.encode())
    return found
