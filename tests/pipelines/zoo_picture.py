"""More tiny image models."""

from __future__ import annotations

from tests.pipelines.case import Case

CASES: dict[str, Case] = {}
