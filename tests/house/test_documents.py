"""What the documents show can be run."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.helpers.process import run_python


def blocks(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", path.read_text("utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_python_in_documents_is_python(repo_root: Path, name: str) -> None:
    found = blocks(repo_root / name)
    assert found
    for block in found:
        ast.parse(block)


def test_python_in_contributing_runs(repo_root: Path, tmp_path: Path) -> None:
    path = f"import sys; sys.path.insert(0, {str(repo_root)!r})\n"  # what a block writes is not for the clone
    for block in blocks(repo_root / "CONTRIBUTING.md"):
        run_python(path + block, cwd=tmp_path)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_make_targets_in_documents_exist(repo_root: Path, name: str) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (repo_root / "Makefile").read_text("utf-8"), re.MULTILINE))
    text = (repo_root / name).read_text("utf-8")
    spans = "\n".join([*re.findall(r"```\n(.*?)```", text, re.DOTALL), *re.findall(r"`([^`\n]+)`", text)])
    named = set(re.findall(r"\bmake (?:[A-Z]+=\S+ )*([a-z][a-z-]*)", spans))
    assert named
    assert named <= targets
