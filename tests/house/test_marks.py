"""Slow tests say what they wait for: ``pytest.mark.slow(reason="compiles a model")``."""

from __future__ import annotations

import ast

from tests.house.imports import ROOT


def without_reason(source: str) -> list[int]:
    """Lines of marks ``slow`` that have no reason."""
    tree = ast.parse(source)
    marks = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n) == "pytest.mark.slow"]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    given = [call.func for call in calls for w in call.keywords if w.arg == "reason" and ast.unparse(w.value) != "''"]
    return [mark.lineno for mark in marks if mark not in given]


def test_every_slow_test_has_a_reason() -> None:
    found = {path.relative_to(ROOT): without_reason(path.read_text("utf-8")) for path in (ROOT / "tests").rglob("*.py")}
    assert not {str(path): lines for path, lines in found.items() if lines}, 'write pytest.mark.slow(reason="...")'


def test_a_missing_reason_is_found() -> None:
    source = "@pytest.mark.slow\ndef f(): ...\nmarks = [pytest.mark.slow(), pytest.mark.slow(reason='')]\n"
    assert without_reason(source) == [1, 3, 3]
    assert without_reason("pytestmark = pytest.mark.slow(reason='it compiles')") == []
