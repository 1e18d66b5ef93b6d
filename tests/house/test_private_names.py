"""What diffusers may rename without notice is touched in one module."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import diffusers
import pytest
import torch

from tests.house.imports import ROOT, SOURCES, imports_of, module_name, source_files

#: Packages of diffusers whose contents are documented; deeper paths and everything else are its own business.
PUBLIC = ("diffusers", "diffusers.utils", "diffusers.models", "diffusers.schedulers", "diffusers.pipelines")
#: Attributes of diffusers' objects that are not documented.
PRIVATE_ATTRIBUTES = {
    "_attention_backend",
    "_AttentionBackendRegistry",
    "_cp_plan",
    "_current_timestep",
    "_diffusers_hook",
    "_parallel_config",
    "_repeated_blocks",
    "_templated_context_parallel_attention",
    "_ulysses_local_rank",
}
#: The module, and the one that only waits for two public classes to be defined.
HOME = ROOT / "pipelines" / "src" / "_diffusers.py"
WAITS = ROOT / "diffsparse" / "_autopatch.py"
DOTTED = re.compile(r"diffusers(\.[A-Za-z_]\w*)+")


def contacts(package: str, path: Path) -> list[str]:
    source = path.read_text("utf-8")
    found = []
    for item in imports_of(source, module_name(package, path), path.name == "__init__.py"):
        if not item.inside("diffusers") or item.module == "diffusers":
            continue
        module, name = item.module.rsplit(".", 1)
        if module not in PUBLIC or name.startswith("_"):
            found.append(f"line {item.line}: {item.module}")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in PRIVATE_ATTRIBUTES:
            found.append(f"line {node.lineno}: .{node.attr}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value  # getattr(x, "_name"), sys.modules["diffusers.x.y"]
            private = text in PRIVATE_ATTRIBUTES or (DOTTED.fullmatch(text) and text not in PUBLIC)
            if private:
                found.append(f"line {node.lineno}: {text!r}")
    return found


def test_private_names_of_diffusers_live_in_one_module() -> None:
    elsewhere = {
        str(path.relative_to(ROOT)): found
        for package in SOURCES
        for path in source_files(package)
        if path not in (HOME, WAITS) and (found := contacts(package, path))
    }
    assert not elsewhere, f"move these to {HOME.relative_to(ROOT)}: {elsewhere}"
    assert HOME.is_file()


def test_diffusers_still_has_the_names_in_use() -> None:
    from diffsparse.pipelines import _diffusers

    assert not (lost := _diffusers.lost_names()), f"diffusers {diffusers.__version__} has no {', '.join(lost)}"
    assert _diffusers._find("diffusers.models.attention_processor.F.scaled_dot_product_attention") is not None


def test_a_name_that_vanished_is_told_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models import attention_dispatch

    from diffsparse.pipelines import _diffusers

    monkeypatch.delattr(attention_dispatch, "dispatch_attention_fn")
    name = "diffusers.models.attention_dispatch.dispatch_attention_fn"
    assert _diffusers.lost_names() == [name]
    with pytest.raises(ImportError, match=rf"diffusers {re.escape(diffusers.__version__)} has no {name} \(the call"):
        _diffusers._need(name)


def test_the_attribute_that_hooks_set() -> None:
    """``replaced_forward`` looks for it, and for hooks in it: pipelines leave an empty one on their transformer."""
    from diffusers.hooks import HookRegistry, ModelHook

    from diffsparse.pipelines import _diffusers

    module = torch.nn.Linear(1, 1)
    assert not _diffusers.replaced_forward(module)
    registry = HookRegistry.check_if_exists_or_initialize(module)
    assert not _diffusers.replaced_forward(module)
    registry.register_hook(ModelHook(), "any")
    assert _diffusers.replaced_forward(module)
    registry.remove_hook("any")
    assert not _diffusers.replaced_forward(module)
