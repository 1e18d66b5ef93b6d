"""What is told of values that come from outside: short, on one line, and without what a terminal would obey."""

from __future__ import annotations

from collections.abc import Iterable
from reprlib import Repr
from typing import Any

__all__ = ["named", "one_line", "shown"]

_SHORT = Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict = 3, 6, 6, 3
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 70


def one_line(text: str, length: int = 300) -> str:
    """The text with control characters escaped, cut in the middle to ``length`` characters."""
    text = text[: 4 * length] + text[-length:] if len(text) > 5 * length else text
    text = "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
    if len(text) <= length:
        return text
    end = length // 3
    return f"{text[: length - end - 3]}...{text[-end:]}"


def shown(value: Any, length: int = 80) -> str:
    """A value as Python writes it, at most ``length`` characters; long ones are never written out whole."""
    return one_line(_SHORT.repr(value), length)


def named(names: Iterable[str], most: int = 3) -> str:
    """Names from outside in a sentence: the first few, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(one_line(str(name), 40) for name in names[:most]) + more
