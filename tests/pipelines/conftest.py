"""What a test leaves as it found it: compiled code, diffusers' attention backend, the plans that this machine keeps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.pipelines.models import wan


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing is compiled before the test or after it."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def native_afterwards() -> Iterator[None]:
    """diffusers keeps the last attention backend for the whole process."""
    yield
    wan().set_attention_backend("native")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Break-even tables and plans are kept in a folder of the test's own."""
    monkeypatch.setenv("DIFFSPARSE_CACHE", str(tmp_path))
