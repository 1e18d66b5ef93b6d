"""What is true of one backend stands in its folder: no other module of the package names a backend in its code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffsparse.kernels import BACKENDS
from tests.house.imports import ROOT, SOURCES, Import, all_imports, source_files

HOME = SOURCES["diffsparse.kernels"] / "backends"
#: Names that are words of other meanings too, which are allowed with that meaning: the file, and what it says there.
ALLOWED = {
    ("kernels/src/clock.py", "triton"): "the package, whose timer is used where it is installed",
    ("search/src/environment.py", "triton"): "the package, whose version is recorded",
    ("search/src/stages/sensitivity.py", "reference"): "a function",
}
#: The plain formulas are public.
ALLOWED_IMPORTS = {("kernels/src/__init__.py", "diffsparse.kernels.backends.reference.forward.reference_attention")}


def docstrings(tree: ast.AST) -> set[int]:
    """The nodes of strings that stand alone: of modules, classes, functions and attributes."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def names_in(source: str) -> Iterator[tuple[int, str]]:
    """Line and name wherever code names a backend. The name of a device type, ``cpu``, counts beside ``backend``."""
    tree = ast.parse(source)
    skipped = docstrings(tree)
    words = re.compile(rf"\b(?:{'|'.join(name for name in BACKENDS if name != 'cpu')})\b")
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            text = node.value
            about = re.search(r"\bbackends?\b", text) or text in BACKENDS or "gluon_sm90" in text
            yield from ((node.lineno, found) for found in words.findall(text) if about)
        if isinstance(node, ast.keyword) and node.arg == "backend":
            yield from cpu_in(node.value)
        if isinstance(node, ast.Compare) and "backend" in ast.unparse(node):
            for part in (node.left, *node.comparators):
                yield from cpu_in(part)


def cpu_in(node: ast.AST) -> Iterator[tuple[int, str]]:
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and part.value == "cpu":
            yield part.lineno, "cpu"


@pytest.mark.parametrize("package", SOURCES)
def test_no_module_names_a_backend(package: str) -> None:
    wrong = []
    for path in source_files(package):
        if HOME in path.parents:
            continue
        file = str(path.relative_to(ROOT))
        wrong += [
            f"{file}:{line} names the backend {name}"
            for line, name in names_in(path.read_text("utf-8"))
            if (file, name) not in ALLOWED
        ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", SOURCES)
def test_no_module_reaches_into_a_backends_folder(package: str) -> None:
    assert reaching(list(all_imports(package))) == []


def reaching(imports: list[tuple[Path, Import]]) -> list[str]:
    homes = [f"diffsparse.kernels.backends.{name}" for name in BACKENDS]
    return [
        f"{path.relative_to(ROOT)}:{item.line} imports {item.module}"
        for path, item in imports
        if HOME not in path.parents
        and any(item.inside(home) for home in homes)
        and (str(path.relative_to(ROOT)), item.module) not in ALLOWED_IMPORTS
    ]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('"""The backend `triton`."""', []),
        ('x = "triton"', ["triton"]),
        ('run(backend="gluon_sm90")', ["gluon_sm90"]),
        ("why = f\"backend='reference' runs {x}\"", ["reference"]),
        ('"a reference to it" + x', []),
        ('x.to("cpu"); torch.device("cpu")', []),
        ('run(backend="cpu")', ["cpu"]),
        ('device.type == "cpu"', []),
        ('backend in ("auto", "cpu")', ["cpu"]),
    ],
)
def test_names_are_found(source: str, found: list[str]) -> None:
    assert [name for _, name in names_in(source)] == found


def test_what_is_allowed_is_there() -> None:
    for file, name in ALLOWED:
        assert name in [found for _, found in names_in((ROOT / file).read_text("utf-8"))]
    for file, module in ALLOWED_IMPORTS:
        assert module in [item.module for path, item in all_imports("diffsparse.kernels") if path == ROOT / file]
    assert reaching([(ROOT / "kernels/src/ops.py", Import("diffsparse.kernels.backends.triton.unpack", 1, False))])
