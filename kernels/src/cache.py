"""Where this machine keeps what was found out about it."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_root"]


def cache_root() -> Path:
    """``$DIFFSPARSE_CACHE``, or ``~/.cache/diffsparse``."""
    root = os.environ.get("DIFFSPARSE_CACHE")
    return Path(root) if root else Path.home() / ".cache" / "diffsparse"
