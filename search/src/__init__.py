"""From a model and prompts to a sparsity plan: search, evaluation, command line.  Knows all rooms."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Loaded when they are first used: they bring diffusers along.
_HOME = {
    "SearchConfig": "diffsparse.search.config",
    "compare_methods": "diffsparse.search.compare.api",
    "compose_plan": "diffsparse.search.recompose",
    "evaluate_plan": "diffsparse.search.api",
    "search_plan": "diffsparse.search.api",
}

__all__ = ["SearchConfig", "compare_methods", "compose_plan", "evaluate_plan", "search_plan"]

if TYPE_CHECKING:
    from diffsparse.search.api import evaluate_plan as evaluate_plan
    from diffsparse.search.api import search_plan as search_plan
    from diffsparse.search.compare.api import compare_methods as compare_methods
    from diffsparse.search.config import SearchConfig as SearchConfig
    from diffsparse.search.recompose import compose_plan as compose_plan


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value
