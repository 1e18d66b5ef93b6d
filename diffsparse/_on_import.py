"""Do something to modules right after they have run: what a package has to do to one that it must not import."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["OnImport"]


class _Loader(Loader):
    """The loader that would have run, and the finder's work after it."""

    def __init__(self, inner: Any, finder: OnImport) -> None:
        self._inner = inner
        self._finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # From here on the module is its own loader's again, for importlib.resources, inspect, pickle and reload.
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        module.__loader__ = self._inner
        self._inner.exec_module(module)
        self._finder.ran(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class OnImport(MetaPathFinder):
    """Put at the front of ``sys.meta_path`` it finds nothing by itself, but sees what the finders behind it find."""

    def wants(self, name: str) -> bool:
        """Whether a module of this name is one to act on."""
        raise NotImplementedError

    def ran(self, module: ModuleType) -> None:
        """Called when such a module has run."""
        raise NotImplementedError

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not self.wants(fullname):
            return None
        behind = list(sys.meta_path)
        behind = behind[behind.index(self) + 1 :] if self in behind else behind
        for finder in behind:  # whoever would have found it
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None
