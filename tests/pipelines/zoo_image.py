"""Tiny image models of the Flux kind: text and image in one sequence."""

from __future__ import annotations

from tests.pipelines.case import Case

CASES: dict[str, Case] = {}
