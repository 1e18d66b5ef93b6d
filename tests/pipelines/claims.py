"""Which test shows which feature of which transformer class: the last column of the table of supported models."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from diffsparse.pipelines.families.tested import more

Test = TypeVar("Test", bound=Callable[..., object])

#: (class, feature) pairs that some test shows.
SHOWN: set[tuple[str, str]] = set()


def shows(feature: str, *classes: str) -> Callable[[Test], Test]:
    """Marks a test as the one that shows a feature; the table must have it."""
    for name in classes:
        assert feature in more(name), f"pipelines/src/families/tested.py does not list {feature!r} for {name}"
        SHOWN.add((name, feature))
    return lambda test: test
