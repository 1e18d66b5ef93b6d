"""The scripts of ``benchmarks`` as modules, for tests of their parts."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock


def load_script(path: Path) -> ModuleType:
    """Run a script's definitions. What it does to ``sys.path``, as a script has to, is undone."""
    spec = importlib.util.spec_from_file_location(f"diffsparse_benchmark_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    with mock.patch.object(sys, "path", [*sys.path]):
        spec.loader.exec_module(module)
    return module
