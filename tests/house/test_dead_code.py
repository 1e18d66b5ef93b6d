"""No function or class of the rooms that nothing uses: neither they, nor a test, nor the documentation."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

from tests.docs.pages import documents
from tests.house.imports import ROOT, SOURCES, source_files

_WORD = re.compile(r"\w+")
_CODE = ("kernels/src", "pipelines/src", "search/src", "tests", "benchmarks", "examples", "docs/scripts")


def _without_all(source: str) -> str:
    """A name in ``__all__`` is offered, which is not to say that anybody takes it."""
    return re.sub(r"^__all__ = [\[(].*?[\])]$", "", source, flags=re.DOTALL | re.MULTILINE)


def _words() -> Counter[str]:
    files = [*documents(), ROOT / "pyproject.toml", *source_files("diffsparse")]
    files += [path for folder in _CODE for kind in ("py", "html", "c") for path in (ROOT / folder).rglob(f"*.{kind}")]
    return Counter(word for path in files for word in _WORD.findall(_without_all(path.read_text("utf-8"))))


def unused(source: str, words: Counter[str]) -> list[str]:
    """Names that a module defines and that occur nowhere but there. What is decorated is somebody's already."""
    tree = ast.parse(source)
    names = [
        node.name
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.decorator_list
    ]
    return [name for name in names if words[name] == 1 and not name.startswith("__")]


def test_everything_is_used() -> None:
    words = _words()
    found = {
        str(Path(path).relative_to(ROOT)): names
        for package in SOURCES
        for path in source_files(package)
        if (names := unused(path.read_text("utf-8"), words))
    }
    assert not found, f"nothing uses these; remove them: {found}"


def test_what_is_unused_is_seen() -> None:
    source = "__all__ = ['offered']\ndef offered(): ...\ndef taken(): ...\n@app\ndef command(): taken()\n"
    assert unused(source, Counter(_WORD.findall(_without_all(source)))) == ["offered"]
