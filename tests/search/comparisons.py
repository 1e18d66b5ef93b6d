"""Comparisons of the tiny pipeline, and made-up rows of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffsparse.search.compare.api import compare_methods
from diffsparse.search.compare.result import Comparison, RowResult
from tests.search.plans import make_plan
from tests.search.tiny import PROMPTS, SHAPE

__all__ = ["METHODS", "compare", "made_up_row"]

#: One of every kind: a window, a rule whose density is known, one whose density is measured, one that stays too dense.
METHODS = ("window", "subblock", "xattention", "vmoba")


def compare(pipe: Any, out: Path, **changes: Any) -> Comparison:
    """Of two prompts with one seed, in four steps."""
    asked: dict[str, Any] = {
        "methods": METHODS,
        "densities": (0.7,),
        "plans": {"mine": make_plan()},
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "seeds": (1,),
        "say": lambda line: None,
        **SHAPE,
    }
    return compare_methods(pipe, PROMPTS, out=out, progress=False, **asked | changes)


def made_up_row(
    name: str, seconds: float | None, psnr: list[float], kind: str = "method", asked: float = 0.5
) -> RowResult:
    """A finished row with these PSNRs."""
    clips = {i: {"psnr": value, "sparse_defects": [], "density": asked} for i, value in enumerate(psnr)}
    return RowResult(f"{name}-{asked:g}", name, kind, asked, "done", clips=clips, loop_seconds=seconds)
