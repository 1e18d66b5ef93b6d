"""What the user can put right: one line, and no traceback."""

from __future__ import annotations

__all__ = ["BadInput"]


class BadInput(ValueError):
    """Input that cannot work: what was wrong, the value received, what is allowed, and what to do next, in one line."""
