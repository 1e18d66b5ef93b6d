"""What an evaluation means: one sentence on whether somebody would see the difference."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffsparse.search.clip_report import ClipReport

__all__ = ["SAME_SSIM", "SIMILAR_SSIM", "verdict"]

#: Structural similarity of the worst clip from which two clips, one after the other, are taken for the same.
SAME_SSIM = 0.95
#: And from which they show the same, with differences side by side.
SIMILAR_SSIM = 0.85
# The same in dB of PSNR above another seed, where SSIM cannot be had.
_SAME_DB, _SIMILAR_DB = 12.0, 7.0


def verdict(clips: list[ClipReport], broken: bool) -> str:
    """A sentence for the worst of the clips; ``broken``: some are black, flat, frozen or not finite."""
    if broken:
        return "Anyone would see it: some clips are broken."
    values = [c.ssim for c in clips if c.ssim is not None]
    if len(values) == len(clips):
        least, same, similar, figure = min(values), SAME_SSIM, SIMILAR_SSIM, f"worst SSIM {min(values):.3f}"
    else:
        above = [c.above_other_seed for c in clips if c.above_other_seed is not None]
        if len(above) < len(clips) or any(math.isnan(value) for value in above):
            return "Look at the clips: without SSIM or another seed to compare with, nothing tells whether it shows."
        least, same, similar = min(above), _SAME_DB, _SIMILAR_DB
        figure = f"worst clip {least:+.1f} dB above another seed"
    if least >= same:
        return f"You would not see it: every clip is taken for its dense twin ({figure})."
    if least >= similar:
        return f"You would see it side by side only: the clips show the same, details differ ({figure})."
    return f"You would see it: some clips differ plainly from their dense twins ({figure}); give the plan more density."
