"""The layouts that a model keeps."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from diffsparse.layout import BlockLayout

__all__ = ["MAX_LAYOUT_BYTES", "LayoutCache"]

# What was used last stays.
MAX_LAYOUT_BYTES = 2 * 2**30


class LayoutCache:
    """Layouts by the whole grid, the phase and the device; least recently used ones go first."""

    def __init__(self, max_bytes: int = MAX_LAYOUT_BYTES) -> None:
        self.max_bytes = max_bytes
        self.groups: OrderedDict[Any, dict[Any, Any]] = OrderedDict()
        self.lock = threading.RLock()

    def get(self, key: Any, item: Any, build: Callable[[], Any]) -> Any:
        with self.lock:
            group = self.groups.get(key)
            if group is None:
                group = self.groups[key] = {}
            elif next(reversed(self.groups)) != key:
                self.groups.move_to_end(key)
            if item not in group:
                group[item] = build()
                while len(self.groups) > 1 and self.num_bytes() > self.max_bytes:
                    self.groups.popitem(last=False)
            return group[item]

    def num_bytes(self) -> int:
        """Memory of all distinct block lists."""
        layouts = [x for group in self.groups.values() for x in group.values() if isinstance(x, BlockLayout)]
        # Layers with the same entries share lists, and each has a repair of its own.
        lists = {id(x.index): x for x in layouts}.values()
        repairs = {id(x.heads.repair): x.heads.repair for x in layouts if x.heads.repair is not None}.values()
        return sum(x.index.nbytes + x.tokens.gather.nbytes + x.tokens.scatter.nbytes for x in lists) + sum(
            repair.nbytes for repair in repairs
        )
