"""Tiny video models whose self-attention holds no text."""

from __future__ import annotations

from tests.pipelines.case import Case

CASES: dict[str, Case] = {}
