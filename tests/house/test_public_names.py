"""The public names, and the methods on diffusers' pipelines."""

from __future__ import annotations

import ast
import inspect
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import diffsparse
from diffsparse import _autopatch
from tests.helpers.process import run_python
from tests.house.imports import SOURCES, module_name, source_files

NAMES = [name for name in diffsparse.__all__ if name != "__version__"]
METHODS = [method.__name__ for method in _autopatch.METHODS]


@pytest.mark.parametrize("name", NAMES)
def test_name_is_there_and_documented(name: str) -> None:
    value = getattr(diffsparse, name)
    assert not isinstance(value, ModuleType), f"diffsparse.{name} is hidden by a module of that name"
    if callable(value):
        assert inspect.getdoc(value), f"diffsparse.{name} has no docstring"
    assert name in dir(diffsparse)


def test_no_module_takes_the_place_of_a_name() -> None:
    """``import diffsparse.NAME`` would set the module on the package, over the lazy name."""
    modules = {path.stem for path in source_files("diffsparse") if path.parent == SOURCES["diffsparse"]}
    assert not modules & set(NAMES)


def test_unknown_name_raises() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        diffsparse.no_such_name  # noqa: B018


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((SOURCES["diffsparse"] / "__init__.py").read_text("utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {
        alias.asname: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen == diffsparse._HOME


def test_vocabulary_modules_name_what_they_export() -> None:
    for path in source_files("diffsparse"):
        if path.stem in ("__init__", "__main__"):
            continue
        module = import_module(module_name("diffsparse", path))
        missing = [name for name in getattr(module, "__all__", [None]) if name is None or not hasattr(module, name)]
        assert not missing, f"{path.name}: __all__ is missing or names what is not there: {missing}"


CHECK = """
from diffusers import DiffusionPipeline, ModularPipeline, WanPipeline
for cls in (DiffusionPipeline, ModularPipeline, WanPipeline):
    for name in {names!r}:
        assert getattr(cls, name)._diffsparse, (cls, name)
import sys, inspect
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("diffsparse")]
module = sys.modules["diffusers.pipelines.pipeline_utils"]
assert type(module.__loader__).__module__ != "diffsparse._autopatch"
assert type(module.__spec__.loader).__module__ != "diffsparse._autopatch"
assert "class DiffusionPipeline" in inspect.getsource(module)
"""


@pytest.mark.parametrize(
    "order",
    [
        "import diffsparse, diffusers",
        "import diffusers, diffsparse",
        "from diffusers import DiffusionPipeline, ModularPipeline; import diffsparse",
        "from diffusers import DiffusionPipeline; import diffsparse",
        # a look-up that is not followed by an import must not use the patch up
        "import diffsparse, importlib.util as u; u.find_spec('diffusers.pipelines.pipeline_utils')",
    ],
)
def test_methods_come_in_any_order_of_import(order: str) -> None:
    run_python(order + "\n" + CHECK.format(names=METHODS))


def test_methods_are_those_of_the_functions() -> None:
    for method in _autopatch.METHODS:
        function = getattr(diffsparse, method.__name__)
        ours = list(inspect.signature(method).parameters.values())[1:]
        theirs = list(inspect.signature(function).parameters.values())[1:]
        if any(p.kind is p.VAR_KEYWORD for p in ours):
            continue
        assert [(p.name, p.default, p.kind) for p in ours] == [(p.name, p.default, p.kind) for p in theirs]


def test_an_attribute_of_somebody_else_stays() -> None:
    def theirs(self: object) -> str:
        return "theirs"

    class Base:
        enable_sparse_attention = theirs

    class Later(Base):
        pass

    _autopatch._add_methods(Later)
    assert Later.enable_sparse_attention is theirs
    assert Later.disable_sparse_attention._diffsparse
    _autopatch._add_methods(Later)  # ours may be renewed
    assert Later.disable_sparse_attention._diffsparse


def test_install_twice_and_uninstall() -> None:
    code = (
        "import sys, diffsparse\n"
        "from diffsparse import _autopatch\n"
        "count = lambda: sum(type(finder) is _autopatch._Finder for finder in sys.meta_path)\n"
        "_autopatch.install(); assert count() == 1\n"
        "from diffusers import DiffusionPipeline\n"
        "assert DiffusionPipeline.enable_sparse_attention._diffsparse\n"
        "_autopatch.uninstall(); assert count() == 0\n"
        "assert not hasattr(DiffusionPipeline, 'enable_sparse_attention')\n"
    )
    run_python(code)


def test_package_is_typed(repo_root: Path) -> None:
    assert (repo_root / "diffsparse" / "py.typed").is_file()
