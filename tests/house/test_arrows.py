"""Imports point one way: vocabulary <- kernels <- pipelines <- search."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import diffsparse
from tests.house.imports import ROOMS, ROOT, SOURCES, Import, all_imports, imports_of

ALLOWED = {
    "diffsparse": set(),
    "diffsparse.kernels": {"diffsparse.kernels"},
    "diffsparse.pipelines": {"diffsparse.kernels", "diffsparse.pipelines"},
    "diffsparse.search": set(ROOMS),
}
#: They hand out the rooms' names, and only inside functions.
LAZY = {"__init__.py", "_autopatch.py"}


def room_of(item: Import) -> str | None:
    """The room that an import reaches; ``from diffsparse import NAME`` reaches the room that NAME comes from."""
    for room in ROOMS:
        if item.inside(room):
            return room
    name = item.module.removeprefix("diffsparse.")
    home = diffsparse._HOME.get(name, "")
    return home if home in ROOMS else None


def place(path: Path, item: Import) -> str:
    return f"{path.relative_to(ROOT)}:{item.line} imports {item.module}"


def there(item: Import) -> bool:
    parent, _, name = item.module.rpartition(".")
    try:
        return not parent or find_spec(item.module) is not None or hasattr(import_module(parent), name)
    except (
        ModuleNotFoundError
    ):  # find_spec imports the parent, which is a module without submodules or not there at all
        try:
            return hasattr(import_module(parent), name)
        except ModuleNotFoundError:
            return False


@pytest.mark.parametrize("package", SOURCES)
def test_arrows_point_one_way(package: str) -> None:
    wrong = []
    for path, item in all_imports(package):
        room = room_of(item)
        if room is None or room in ALLOWED[package]:
            continue
        if package == "diffsparse" and path.name in LAZY and not item.on_import:
            continue
        wrong.append(place(path, item))
    assert not wrong


@pytest.mark.parametrize("package", ["diffsparse", "diffsparse.kernels"])
def test_what_lies_below_the_pipelines_knows_no_diffusers(package: str) -> None:
    wrong = [
        place(path, item)
        for path, item in all_imports(package)
        if item.inside("diffusers") or item.inside("transformers") or item.inside("accelerate")
    ]
    assert not wrong


def test_only_kernels_know_triton() -> None:
    wrong = [
        place(path, item)
        for package in ("diffsparse", "diffsparse.pipelines")
        for path, item in all_imports(package)
        if item.inside("triton")
    ]
    assert not wrong


def test_rooms_are_imported_by_their_full_name() -> None:
    """``import kernels`` would be Hugging Face's, and ``kernels.src`` works in the clone only."""
    wrong = [
        place(path, item)
        for package in SOURCES
        for path, item in all_imports(package)
        if item.module.split(".")[0] in ("pipelines", "search") or item.inside("kernels.src")
    ]
    assert not wrong


@pytest.mark.parametrize("package", SOURCES)
def test_what_is_imported_from_this_package_exists(package: str) -> None:
    """Imports inside functions too, which no import of the module would try."""
    wrong = [place(path, item) for path, item in all_imports(package) if item.inside("diffsparse") and not there(item)]
    assert not wrong


def test_the_reader_of_imports_sees_every_form() -> None:
    source = (
        "import a.b\n"
        "from . import c\n"
        "from ..d import e\n"
        "if TYPE_CHECKING:\n    from t import u\n"
        "try:\n    import v\nexcept ImportError: pass\n"
        "def f():\n    from g import h\n    importlib.import_module('i.j')\n"
    )
    found = {(item.module, item.on_import) for item in imports_of(source, "p.q.r")}
    assert found == {
        ("a.b", True),
        ("p.q.c", True),
        ("p.d.e", True),
        ("t.u", False),
        ("v", True),
        ("g.h", False),
        ("i.j", False),
    }
    assert {item.module for item in imports_of("from . import c\nfrom .d import e", "p.q", True)} == {
        "p.q.c",
        "p.q.d.e",
    }
