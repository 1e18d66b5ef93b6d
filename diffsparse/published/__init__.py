"""Published methods that pick blocks while the model runs or by a fixed window, each as a plan for any model.

They are written from the papers' formulas. Each docstring says what is kept of the method and what is not. Blocks,
budgets and parameters are those that the authors use for video. Their dense steps are counted; here they go by noise
level, which is the same where a scheduler's levels fall evenly, and later where it is shifted towards noise: then more
steps are dense. A method's text is dense here as everywhere in this library.
"""

from __future__ import annotations

from diffsparse.published.base import Published
from diffsparse.published.language import LANGUAGE
from diffsparse.published.video import VIDEO

__all__ = ["PUBLISHED", "Published"]

#: By name, with blocks and the noise level below which it is sparse.
PUBLISHED: dict[str, Published] = {**VIDEO, **LANGUAGE}
