"""What several test modules need is in a module of helpers: no test module imports another one, or a ``conftest``."""

from __future__ import annotations

from tests.house.imports import ROOT, imports_of

TESTS = ROOT / "tests"


def imported_tests(source: str) -> list[str]:
    """Names that ``source`` imports from test modules and from ``conftest``, whose fixtures are found without."""
    found = [item.module for item in imports_of(source, "tests.x") if item.inside("tests")]
    return [m for m in found if any(part == "conftest" or part.startswith("test_") for part in m.split("."))]


def test_no_test_module_is_imported() -> None:
    paths = sorted(TESTS.rglob("*.py"))
    found = {
        str(path.relative_to(TESTS)): names for path in paths if (names := imported_tests(path.read_text("utf-8")))
    }
    assert not found, "move them to tests/helpers, or to the helpers of the room"


def test_such_an_import_is_found() -> None:
    source = "import tests.tolerance\nfrom tests.x.test_y import z\ndef f():\n    from tests.x.conftest import Cli\n"
    assert imported_tests(source) == ["tests.x.test_y.z", "tests.x.conftest.Cli"]
