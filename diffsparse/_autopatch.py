"""The methods ``pipe.enable_sparse_attention()`` and its kin, on every diffusers pipeline.

They are sugar for the functions of the same names in :mod:`diffsparse`, and importing diffsparse is all it takes. Two
things make that less simple than two lines of ``setattr``:

* importing diffsparse must not import diffusers (seconds), so where diffusers is not loaded yet a finder at the front
  of ``sys.meta_path`` waits for the two modules that define pipelines, and leaves once it has seen both;
* a method is only *added*: an attribute of the same name that is not ours, say from a later diffusers, stays as it is.

``ModularPipeline`` is not a subclass of ``DiffusionPipeline`` and gets the methods separately.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

from diffsparse._on_import import OnImport

__all__ = ["MARK", "METHODS", "TARGETS", "install", "uninstall"]

#: Module that defines a base class of pipelines -> that class.
TARGETS = {
    "diffusers.pipelines.pipeline_utils": "DiffusionPipeline",
    "diffusers.modular_pipelines.modular_pipeline": "ModularPipeline",
}

#: The attribute that says that a method is ours.
MARK = "_diffsparse"


def enable_sparse_attention(
    self: Any,
    plan: Any = "auto",
    *,
    backend: str = "auto",
    strict: bool = True,
    timing: bool = False,
    dense_backend: str | None = None,
) -> Any:
    """Compute only the attention blocks that ``plan`` keeps. See :func:`diffsparse.enable_sparse_attention`."""
    from diffsparse import pipelines

    return pipelines.enable_sparse_attention(
        self, plan, backend=backend, strict=strict, timing=timing, dense_backend=dense_backend
    )


def disable_sparse_attention(self: Any) -> Any:
    """Back to dense attention, bit for bit. See :func:`diffsparse.disable_sparse_attention`."""
    from diffsparse import pipelines

    return pipelines.disable_sparse_attention(self)


def sparse_attention(self: Any, plan: Any = "auto", **options: Any) -> AbstractContextManager[Any]:
    """``with pipe.sparse_attention(plan): ...``. See :func:`diffsparse.sparse_attention`."""
    from diffsparse import pipelines

    return pipelines.sparse_attention(self, plan, **options)


def sparse_attention_summary(self: Any) -> Any:
    """What ran sparse, what ran dense, and why. See :func:`diffsparse.sparse_attention_summary`."""
    from diffsparse import pipelines

    return pipelines.sparse_attention_summary(self)


METHODS: tuple[Callable[..., Any], ...] = (
    enable_sparse_attention,
    disable_sparse_attention,
    sparse_attention,
    sparse_attention_summary,
)
for _method in METHODS:
    setattr(_method, MARK, True)


def _add_methods(cls: type) -> None:
    for method in METHODS:
        present = getattr(cls, method.__name__, None)
        if present is None or getattr(present, MARK, False):
            setattr(cls, method.__name__, method)


def _patch(module: ModuleType) -> None:
    cls = getattr(module, TARGETS[module.__name__], None)
    if isinstance(cls, type):
        _add_methods(cls)


class _Finder(OnImport):
    """Waits for the modules in ``waiting``; takes itself off ``sys.meta_path`` after the last one has run."""

    def __init__(self, waiting: set[str]) -> None:
        self.waiting = waiting

    def wants(self, name: str) -> bool:
        return name in self.waiting

    def ran(self, module: ModuleType) -> None:
        _patch(module)
        self.waiting.discard(module.__name__)
        if not self.waiting and self in sys.meta_path:
            sys.meta_path.remove(self)


def install() -> None:
    """Adds the methods now where diffusers is loaded, and on its import where it is not. Safe to call twice."""
    loaded = [name for name in TARGETS if _is_loaded(name)]
    for name in loaded:
        _patch(sys.modules[name])
    waiting = set(TARGETS).difference(loaded)
    if waiting and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(waiting))


def _is_loaded(name: str) -> bool:
    """True where the module has run to the class that we want."""
    return isinstance(getattr(sys.modules.get(name), TARGETS[name], None), type)


def uninstall() -> None:
    """Takes our methods off again, and the finder with them."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
    for name, class_name in TARGETS.items():
        cls = getattr(sys.modules.get(name), class_name, None)
        for method in METHODS:
            if cls is not None and getattr(cls.__dict__.get(method.__name__), MARK, False):
                delattr(cls, method.__name__)
