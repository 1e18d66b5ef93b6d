"""The documents and what is fenced in them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```([a-z]*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def documents() -> list[Path]:
    """README, CONTRIBUTING, and every page of the documentation."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, *languages: str) -> list[str]:
    """Fenced blocks of the given languages (``""``: none named), in order."""
    return [body for language, body in FENCE.findall(path.read_text("utf-8")) if language in languages]


def command_lines(path: Path) -> list[list[str]]:
    """Every line of an unnamed or bash block, split as a shell would, continuation lines joined."""
    lines = []
    for block in blocks(path, "", "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip() and not line.lstrip().startswith("#"):
                lines.append(shlex.split(line, comments=True))
    return lines
