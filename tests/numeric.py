"""Which tests compare computed numbers: those are run with other instruction sets, too (``make test-slow``)."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["COMPARISONS", "REPEATS", "compares_numbers"]

#: What compares tensors within a tolerance.
COMPARISONS = frozenset({"assert_near", "near", "assert_close", "allclose"})
#: Every class with every feature: what they compute is compared class by class in test_families.py, in a tenth of the
#: time.
REPEATS = ("test_every_feature.py",)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code, and that of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _texts(code: types.CodeType) -> Iterator[str]:
    """Texts in a function, which may be what another process runs."""
    for inner in _codes(code):
        yield from (constant for constant in inner.co_consts if isinstance(constant, str))


def compares_numbers(function: Callable[..., Any], seen: frozenset[Any] = frozenset()) -> bool:
    """Whether a test, or a helper of the tests that it calls by name, compares tensors within a tolerance."""
    # Hypothesis keeps the test that it calls beside the one that pytest sees.
    function = getattr(getattr(function, "hypothesis", None), "inner_test", function)
    function = getattr(function, "__wrapped__", function)
    code = getattr(function, "__code__", None)
    if code is None or code in seen:
        return False
    names = {name for inner in _codes(code) for name in inner.co_names}
    if names & COMPARISONS or any(f"{name}(" in text for text in _texts(code) for name in COMPARISONS):
        return True
    called = (function.__globals__.get(name) for name in names)
    helpers = [f for f in called if isinstance(f, types.FunctionType) and f.__module__.startswith("tests.")]
    return any(compares_numbers(helper, seen | {code}) for helper in helpers)
