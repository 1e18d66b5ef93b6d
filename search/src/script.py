"""What the scripts in ``benchmarks`` share: options whose values are checked as they are read, and one line for input
that cannot work."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from diffsparse.codec import PlanError
from diffsparse.search import load
from diffsparse.search.errors import BadInput

__all__ = ["at_least_one", "device", "exit_with", "out_file", "seconds"]


def at_least_one(text: str) -> int:
    """Of how many there are: an integer, 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


at_least_one.__name__ = "integer"  # what argparse calls a value that cannot be read


def seconds(text: str) -> float:
    """A time above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def device(text: str) -> torch.device:
    """``auto``, or a device that is here."""
    try:
        return load.choose_device(text)
    except BadInput as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def out_file(text: str) -> Path:
    """A file that can be written: seen before anything is measured. Its folder is made."""
    path = Path(text)
    was_there = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
        if not was_there:
            path.unlink()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write to {text!r}: {error.strerror}") from None
    return path


def exit_with(main: Callable[[], int | None]) -> NoReturn:
    """Run a script and end the process: with its status, or with 2 and one line on stderr for a mistake of the user."""
    try:
        status = main()
    except (BadInput, PlanError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        status = 2
    raise SystemExit(status)
