"""The transformer classes that are known without further ado: one module a family or a few of one kind.

A module has ``FAMILIES``, and ``UNSUITABLE`` where some classes cannot have one. Adding a family is adding a module.
"""

from importlib import import_module
from pkgutil import iter_modules

from diffsparse.pipelines.family import Family, register_family, register_unsuitable

__all__ = ["FAMILIES", "UNSUITABLE"]

_modules = [import_module(f"{__name__}.{found.name}") for found in iter_modules(__path__)]
FAMILIES: tuple[Family, ...] = tuple(family for m in _modules for family in getattr(m, "FAMILIES", ()))
UNSUITABLE: dict[str, str] = {name: why for m in _modules for name, why in getattr(m, "UNSUITABLE", {}).items()}
for _family in FAMILIES:
    register_family(_family, replace=True)
register_unsuitable(UNSUITABLE)
