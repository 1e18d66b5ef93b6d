"""What all tests share: no network, few threads, the same seed, and fresh memory full of NaN for those who ask."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before anything imports a library that reads them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Plans and break-even tables that this machine keeps would change what runs.
os.environ["DIFFSPARSE_CACHE"] = os.path.join(tempfile.gettempdir(), "diffsparse-tests-have-no-cache")

import pytest
import torch

from tests.numeric import REPEATS, compares_numbers

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    # Several workers, each with as many threads as there are cores, are slower than one.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    threads = max(1, (os.cpu_count() or 1) // workers)
    torch.set_num_threads(threads)
    if workers > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # for the processes that tests start


# First, so that -m knows the mark.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and item.path.name not in REPEATS and compares_numbers(item.function):
            item.add_marker(pytest.mark.numeric)
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The clone."""
    return ROOT


@pytest.fixture
def no_more_rules() -> Iterator[None]:
    """Rules that a test registers are gone after it."""
    from diffsparse import selection
    from diffsparse.kernels.select import rules

    tables: tuple[Any, ...] = (rules._SELECTORS, rules._SIGNALS, selection._ADDED, selection._BY_THEMSELVES)
    before = [table.copy() for table in tables]
    yield
    for table, known in zip(tables, before):
        table.clear()
        table.update(known)


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    if type(tensor) is not torch.Tensor or tensor.is_meta:  # fake tensors have no memory
        return tensor
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        return tensor.fill_(float("nan"))
    if tensor.dtype is torch.bool:
        return tensor.fill_(True)
    return tensor.fill_(torch.iinfo(tensor.dtype).max)


@pytest.fixture
def poison_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory holds NaN (integers: the largest value), so that whatever is read before it is written shows.

    Holds for ``torch.empty``, ``empty_like``, ``empty_strided``, ``empty_permuted`` and ``Tensor.new_empty``,
    ``new_empty_strided`` called from Python.
    """

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def fresh(*args: Any, **kwargs: Any) -> torch.Tensor:
            with torch.no_grad():
                requires_grad = kwargs.pop("requires_grad", False)
                return _poison(allocate(*args, **kwargs)).requires_grad_(requires_grad)

        return fresh

    for name in ("empty", "empty_like", "empty_strided", "empty_permuted"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))
    yield
