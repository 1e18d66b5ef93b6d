"""A hook of mkdocs: puts a section of README.md where a page says ``<!-- README: Title -->``.

Figures then stand in one place only. Links to files of the clone, which the pages do not have, become plain names.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parents[2] / "README.md"
MARK = re.compile(r"^<!-- README: (.+?) -->$", re.MULTILINE)


def section(title: str) -> str:
    """The text under a heading of the second level, without the heading. Raises ValueError where there is none."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    if found is None:
        raise ValueError(f"README.md has no section {title!r}")
    return re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:)[^)]+\)", r"\1", found[1]).strip()


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Called by mkdocs for every page."""
    return MARK.sub(lambda mark: section(mark[1]), markdown)
