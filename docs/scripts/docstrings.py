"""Docstrings as this project writes them, made into Markdown for the API pages.

Two habits of the docstrings mean nothing to Markdown: roles (``:class:`PlanError` ``), and lists of attributes that are
plain lines (``name: what it is``), which would run together into one paragraph.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":\w+:`~?([^`]+)`")
# "name: text" or "``name``: text" or "a, b: text" at the left margin; further lines of it are indented or not.
ATTRIBUTE = re.compile(r"^(`{0,2}[a-z_][a-z0-9_]*(?:`{0,2}, `{0,2}[a-z_][a-z0-9_]*)*`{0,2}): (?=\S)")


def to_markdown(text: str) -> str:
    """A docstring with roles as code and runs of attribute lines as lists."""
    lines = []
    in_list = False
    # Two attributes described in one line of the source.
    text = re.sub(r"(?<=\.) (?=``[a-z_]+``: )", "\n", text)
    for line in ROLE.sub(r"`\1`", text).split("\n"):
        found = ATTRIBUTE.match(line)
        if found:
            if not in_list:
                lines.append("")
            names = ", ".join(f"`{name.strip('`')}`" for name in found.group(1).split(", "))
            lines.append(f"- {names}: {line[found.end() :]}")
            in_list = True
        elif not line.strip():
            in_list = False
            lines.append(line)
        else:
            lines.append(f"  {line.lstrip()}" if in_list else line)
    return "\n".join(lines)


class Docstrings(griffe.Extension):
    """Rewrites every docstring that is read."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
