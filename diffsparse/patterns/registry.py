"""The kinds of patterns by name, and patterns as JSON values of a plan file."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

import numpy as np

from diffsparse.limits import MAX_NESTING, MAX_PATTERN_PARTS
from diffsparse.messages import shown
from diffsparse.patterns.base import Pattern
from diffsparse.typed import PlanError, Reading, Shape, know, plain, read_object, shapes_of

__all__ = ["RETIRED", "decode_pattern", "encode_pattern", "pattern_kinds", "register_pattern"]

P = TypeVar("P", bound=type[Pattern])

#: Kinds of older plan files, and the kind that keeps the same blocks. Text is always exact, so that the patterns
#: which asked for text rows or columns added no pair.
RETIRED = {"text_rows": "empty", "text_columns": "empty"}

_KINDS: dict[str, type[Pattern]] = {}


def register_pattern(cls: P, *, replace: bool = False) -> P:
    """Make a pattern known to the reader of plan files; works as a decorator, too.

    ``cls``: a frozen dataclass, a subclass of :class:`Pattern` with a ``kind`` of its own and a docstring. Its fields
    may be int, float, bool, str, None, Literal, tuples and ``|`` of these, other patterns, grids and orders. A plan
    that uses it is read wherever it has been registered before. Raises TypeError for a class that plan files cannot
    carry, and ValueError for a kind that is taken, unless ``replace``.
    """
    if not (isinstance(cls, type) and issubclass(cls, Pattern) and "kind" in vars(cls)):
        raise TypeError(f"register_pattern takes a subclass of diffsparse.Pattern with a kind of its own, got {cls!r}")
    settings = vars(cls).get("__dataclass_params__")  # of the class itself, not of its base
    if settings is None or not settings.frozen:
        raise TypeError(f"a pattern is a frozen dataclass: put @dataclass(frozen=True) above {cls.__name__}")
    if not (isinstance(cls.kind, str) and cls.kind.isidentifier() and cls.kind.isascii()):
        raise TypeError(f"a pattern's kind is its name in plan files, a word such as 'window'; got {shown(cls.kind)}")
    if any(f.name == "kind" for f in fields(cls)):
        raise TypeError(f"{cls.__name__}.kind must be a ClassVar[str], not a field")
    try:
        shapes_of(cls)  # type: ignore[arg-type]  # to mypy a class of patterns is not hashable
    except (TypeError, NameError) as error:
        raise TypeError(f"{cls.__name__}: {error}") from error
    taken = _KINDS.get(cls.kind)
    if cls.kind in RETIRED or (taken not in (None, cls) and not replace):
        raise ValueError(f"the kind {cls.kind!r} is taken; choose another, or pass replace=True to replace it")
    _KINDS[cls.kind] = cls
    return cls


def pattern_kinds() -> dict[str, type[Pattern]]:
    """All kinds that plan files may name, sorted by name."""
    return dict(sorted(_KINDS.items()))


def encode_pattern(pattern: Pattern, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """A pattern as JSON values; bitmaps put their bits into ``arrays`` and keep the name."""
    if _KINDS.get(pattern.kind) is not type(pattern):
        raise PlanError(
            f"plan files cannot carry a {type(pattern).__name__}: call diffsparse.register_pattern on its class first"
        )
    values = {f.name: plain(getattr(pattern, f.name), arrays, encode_pattern) for f in fields(pattern)}
    return {"kind": pattern.kind, **values}


def decode_pattern(data: Any, reading: Reading, where: str = "pattern") -> Pattern:
    """The inverse of :func:`encode_pattern`; raises :class:`PlanError`."""
    if reading.depth >= MAX_NESTING:
        raise PlanError(f"{where} is nested more than {MAX_NESTING} deep")
    reading.parts += 1
    if reading.parts > MAX_PATTERN_PARTS:
        raise PlanError(f"{where}: one entry has more than {MAX_PATTERN_PARTS} patterns in it")
    kind = data.get("kind") if isinstance(data, dict) else None
    if isinstance(kind, str):
        kind = RETIRED.get(kind, kind)
    cls = _KINDS.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise PlanError(
            f"{where}: unknown pattern kind {shown(kind)}; update diffsparse, or call diffsparse.register_pattern "
            f"first; known are {', '.join(sorted(_KINDS))}"
        )
    reading.depth += 1
    try:
        pattern: Pattern = read_object(cls, data, f"pattern {kind!r}", where, reading, extra="kind")
        return pattern
    finally:
        reading.depth -= 1


know(Pattern, Shape("a pattern", (dict,), lambda value, where, reading: decode_pattern(value, reading, where)))
