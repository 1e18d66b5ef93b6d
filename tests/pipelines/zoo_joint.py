"""Tiny video models whose text and video share one sequence."""

from __future__ import annotations

from tests.pipelines.case import Case

CASES: dict[str, Case] = {}
