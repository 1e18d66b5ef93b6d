"""Of cases in a process of their own it is said which one failed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.house.imports import ROOT
from tests.kernels.apart import check_cases

MODULE = """
import sys
from tests.kernels.apart import case, finish
for n in range(4):
    with case("number", n) as told:
        FAULT
        told.append("fine")
finish()
"""


def made(tmp_path: Path, fault: str) -> str:
    (tmp_path / "made_here.py").write_text(MODULE.replace("FAULT", fault))
    return f"{ROOT}:{tmp_path}"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("assert n != 2, 'two is wrong'", r"1 of 4 cases failed: \['number 2'\](.|\n)*two is wrong"),
        ("assert False", "4 of 4 cases failed"),
        ("if n == 2: sys.exit(3)", r"it ended after \['number 1 fine'\]"),
        ("if n == 2: sys.exit(0)", r"2 cases ran where 4 should: \['number 0 fine', 'number 1 fine'\]"),
    ],
)
def test_the_case_that_failed_is_named(fault: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=message):
        check_cases(ROOT, 4, "made_here", PYTHONPATH=made(tmp_path, fault))


def test_cases_that_pass(tmp_path: Path) -> None:
    check_cases(ROOT, 4, "made_here", PYTHONPATH=made(tmp_path, "pass"))
