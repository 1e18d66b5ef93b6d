"""Reads which modules a source file imports, without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Import name of a room -> its folder.  The links in diffsparse/ are not followed.
SOURCES = {
    "diffsparse": ROOT / "diffsparse",
    "diffsparse.kernels": ROOT / "kernels" / "src",
    "diffsparse.pipelines": ROOT / "pipelines" / "src",
    "diffsparse.search": ROOT / "search" / "src",
}
ROOMS = tuple(name for name in SOURCES if name != "diffsparse")


@dataclass(frozen=True)
class Import:
    """``module`` with dots and all (``a.b.c`` for ``from a.b import c`` too); whether it runs on import of its file."""

    module: str
    line: int
    on_import: bool

    def inside(self, package: str) -> bool:
        return self.module == package or self.module.startswith(package + ".")


def source_files(package: str) -> list[Path]:
    folder = SOURCES[package]
    if package == "diffsparse":
        links = {folder / room.removeprefix("diffsparse.") for room in ROOMS}
        return sorted(path for path in folder.rglob("*.py") if not links & set(path.parents))
    return sorted(folder.rglob("*.py"))


def module_name(package: str, path: Path) -> str:
    parts = path.relative_to(SOURCES[package]).with_suffix("").parts
    return ".".join([package, *(part for part in parts if part != "__init__")])


def imports_of(source: str, module: str, is_package: bool = False) -> list[Import]:
    """Every import statement in ``source``, and ``import_module("...")`` and ``__import__("...")`` with a literal."""
    return list(_walk(ast.parse(source), module, is_package, on_import=True))


def _walk(node: ast.AST, module: str, is_package: bool, on_import: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            # Types are part of what a module knows, but are not imported when it runs.
            for part in child.body:
                yield from _walk(ast.Module([part], []), module, is_package, on_import=False)
            for part in child.orelse:
                yield from _walk(ast.Module([part], []), module, is_package, on_import)
            continue
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, on_import)
        elif isinstance(child, ast.ImportFrom):
            base = child.module or ""
            if child.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                package = package[: len(package) - (child.level - 1)]
                base = ".".join([*package, base] if base else package)
            for alias in child.names:
                yield Import(f"{base}.{alias.name}", child.lineno, on_import)
        elif isinstance(child, ast.Call) and child.args and isinstance(child.args[0], ast.Constant):
            called = ast.unparse(child.func)
            if called.endswith(("import_module", "__import__")) and isinstance(child.args[0].value, str):
                yield Import(child.args[0].value, child.lineno, on_import)
        inner = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _walk(child, module, is_package, on_import and not inner)


def all_imports(package: str) -> Iterator[tuple[Path, Import]]:
    for path in source_files(package):
        found = imports_of(path.read_text("utf-8"), module_name(package, path), path.name == "__init__.py")
        for item in found:
            yield path, item
