"""The files that a comparison ends with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from diffsparse.saving import write_whole
from diffsparse.search.compare.result import Comparison
from diffsparse.search.compare.table import comparison_csv
from diffsparse.search.errors import writing

__all__ = ["write_comparison"]


def write_comparison(folder: Path, comparison: Comparison, shown: Sequence[int]) -> Comparison:
    """Write ``compare.json`` and ``compare.csv``; gives the comparison with their names.

    shown: the cases whose clips are in the page. Raises :class:`~diffsparse.search.errors.BadInput`.
    """
    found = replace(comparison, files=tuple(str(folder / name) for name in ("compare.json", "compare.csv")))
    text = json.dumps(found.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    for name, content in (("compare.json", text), ("compare.csv", comparison_csv(found))):
        with writing(folder / name):
            write_whole(folder / name, content.encode())
    return found
