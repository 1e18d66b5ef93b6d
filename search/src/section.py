"""A part of a search's record: values whose names begin alike, by the rest of their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from diffsparse.search.store import SearchStore

__all__ = ["Section"]

T = TypeVar("T")


class Section(SearchStore):
    """Values of a store whose names begin with ``prefix``. The file, and what concerns all of it, is the store's."""

    def __init__(self, store: SearchStore, prefix: str) -> None:
        self.store, self.prefix, self.path = store, prefix, store.path

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.store

    def put_json(self, name: str, value: Any) -> None:
        self.store.put_json(self.prefix + name, value)

    def get_json(self, name: str) -> Any:
        return self.store.get_json(self.prefix + name)

    def read_json(self, name: str, parse: Callable[[Any], T]) -> T:
        return self.store.read_json(self.prefix + name, parse)

    def put_arrays(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        self.store.put_arrays(self.prefix + name, arrays)

    def put_all(self, named: dict[str, dict[str, np.ndarray]]) -> None:
        self.store.put_all({self.prefix + name: arrays for name, arrays in named.items()})

    def get_arrays(self, name: str) -> dict[str, np.ndarray]:
        return self.store.get_arrays(self.prefix + name)

    def names(self, prefix: str = "") -> list[str]:
        return [name[len(self.prefix) :] for name in self.store.names(self.prefix + prefix)]

    def remove(self, prefix: str) -> None:
        self.store.remove(self.prefix + prefix)
