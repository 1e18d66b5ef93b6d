"""What a search for a target found, in a sentence. Loads nothing: the card and every command need it."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["quality_line"]


def quality_line(record: dict[str, Any]) -> str | None:
    """One sentence on the target that a plan was searched for; None where it had none."""
    about = record.get("quality")
    names = ("prompts", "target", "ssim_worst", "density", "loop_speedup", "reached")
    if not isinstance(about, dict) or any(about.get(name) is None for name in names):
        return None
    clips, target = about["prompts"], about["target"]
    kind = "held-out clips" if about.get("held_out") else "clips of new seeds"
    # Rounded down, and with the target's digits: what misses by a hair must not look as if it kept it.
    digits = min(max(3, len(f"{target:g}") - 2), 6)
    least = math.floor(about["ssim_worst"] * 10**digits + 1e-9) / 10**digits
    found = f"SSIM {least:.{digits}f} at density {about['density']:.3f}, loop {about['loop_speedup']:.3g}x"
    if about["reached"]:
        return f"worst of {clips} {kind}: {found} (target {target:g})"
    return f"the target of {target:g} is not reached; worst of {clips} {kind}: {found}"
