"""Tolerances come from what is computed (tests/tolerance.py), and what has one is run with other instructions, too."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from tests import tolerance
from tests.house.imports import ROOT
from tests.numeric import COMPARISONS, REPEATS, compares_numbers
from tests.tolerance import Work, assert_near, near

#: Errors there are those of formats of 8 and 16 bits on one kind of device, which no instruction set of a CPU changes.
DEVICE_CODE = ("emulate.py", "test_gpu.py")
THIS = Path(__file__).name
#: A literal from here on is no matter of rounding: how far an estimate from a sample may be off, say.
NOT_ROUNDING = 1e-2


def literals(source: str) -> Iterator[str]:
    """Comparisons of tensors whose tolerance is a literal, or none at all: torch's own knows no sums and no sizes."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or ast.unparse(node.func) not in (
            "torch.testing.assert_close",
            "torch.allclose",
        ):
            continue
        given = {k.arg: k.value for k in node.keywords if k.arg in ("rtol", "atol")}
        values = [v.value for v in given.values() if isinstance(v, ast.Constant)]
        if (len(given) < 2 and "rtol" not in given) or any(0 < v < NOT_ROUNDING for v in values):
            yield f"line {node.lineno}: {ast.unparse(node)[:100]}"


def test_no_tolerance_is_a_literal() -> None:
    found = {
        str(path.relative_to(ROOT)): lines
        for path in sorted((ROOT / "tests").rglob("*.py"))
        if path.name not in (*DEVICE_CODE, THIS) and (lines := list(literals(path.read_text("utf-8"))))
    }
    assert not found, f"take tests/tolerance.py's: {found}"


def test_literals_are_seen() -> None:
    for seen in ("a, b", "a, b, atol=1e-5", "a, b, rtol=1e-4, atol=1e-5", "a, b, rtol=0, atol=1e-5"):
        assert list(literals(f"torch.testing.assert_close({seen})")), seen
    for fine in ("a, b, rtol=0, atol=most", "a, b, rtol=0.6, atol=0"):
        assert not list(literals(f"assert torch.allclose({fine})")), fine


def test_a_tolerance_grows_with_values_sums_and_the_type() -> None:
    want = torch.tensor([1.0, -4.0, torch.inf, torch.nan])
    work = Work(length=16)
    assert work.tolerance(want, want) == pytest.approx(torch.finfo(torch.float32).eps * 4 * 4)
    assert Work(16, sums=9, gain=2).tolerance(want, want) == pytest.approx(3 * 2 * work.tolerance(want, want))
    assert work.tolerance(10 * want, 10 * want) == pytest.approx(10 * work.tolerance(want, want))
    assert work.tolerance(want.double(), want.double()) == work.tolerance(want, want)
    half = want.half()
    assert (
        work.tolerance(half, half) == work.tolerance(half, want) == pytest.approx(2.0**13 * work.tolerance(want, want))
    )
    assert work.tolerance(torch.zeros(3), torch.zeros(3)) == 0


def test_what_is_further_off_fails() -> None:
    want = torch.linspace(-3, 3, 100)
    off = tolerance.ATTENTION.tolerance(want, want)
    assert near(want + 0.9 * off, want, tolerance.ATTENTION) and not near(want + 1.2 * off, want, tolerance.ATTENTION)
    with pytest.raises(AssertionError):
        assert_near(want + 1.2 * off, want, tolerance.ATTENTION)
    for wrong in (torch.nan, torch.inf):
        other = want.clone()
        other[3] = wrong
        with pytest.raises(AssertionError):
            assert_near(other, want, tolerance.ATTENTION)


def _helper(x: torch.Tensor) -> None:
    assert_near(x, x, tolerance.MODEL)


def _twice_removed(x: torch.Tensor) -> None:
    _helper(x)


def test_tests_that_compare_are_found() -> None:
    def inside(x: torch.Tensor) -> bool:
        return all(torch.allclose(y, x) for y in (x, x))

    def within() -> None:
        def inner(x: torch.Tensor) -> None:
            torch.testing.assert_close(x, x)

        inner(torch.zeros(1))

    def without(x: torch.Tensor) -> bool:
        return torch.equal(x, x)

    assert all(map(compares_numbers, (_helper, _twice_removed, inside, within)))
    assert not compares_numbers(without) and not compares_numbers(partial(without))


def test_every_test_that_compares_is_in_the_selection(request: pytest.FixtureRequest) -> None:
    """Of those that were collected with this one: all, in a whole run."""
    call = re.compile(rf"\b({'|'.join(COMPARISONS)})\(")
    tests = [i for i in request.session.items if isinstance(i, pytest.Function) and i.path.name not in REPEATS]
    left_out = {
        item.originalname
        for item in tests
        if not item.get_closest_marker("numeric") and call.search(inspect.getsource(item.function))
    }
    # This file writes the names down in texts.
    assert not left_out - {name for name in globals() if name.startswith("test_")}
