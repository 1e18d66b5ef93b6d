"""Entries of heads from the options that were chosen for them: measured masks take most of composing's time."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch

from diffsparse.entry import HeadEntry
from diffsparse.search.items import Measurements
from diffsparse.search.options import FamilyTable, Option, head_entry

__all__ = ["Wanted", "layer_entries", "workers"]

CPU = torch.device("cpu")
#: Threads that make masks. Each holds those of one head.
MOST_THREADS = 8


class Wanted(NamedTuple):
    """An entry to make, named by ``key``. ``weights``: of the traced steps, for what pairs of blocks are worth."""

    key: Hashable
    head: int
    option: Option
    weights: Mapping[int, float]


def workers() -> ThreadPoolExecutor:
    """Threads for :func:`layer_entries`: what takes long there is inside numpy, which lets go of the interpreter."""
    return ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1))


def layer_entries(
    search: Measurements,
    layer: str,
    tables: Sequence[FamilyTable],
    wanted: Sequence[Wanted],
    pool: ThreadPoolExecutor,
) -> dict[Hashable, HeadEntry]:
    """Entries of a layer, by their keys. ``tables``: of its heads; ``wanted`` goes through the heads in turn.

    This thread alone reads what was measured.
    """
    jobs = []
    for head, each in groupby(wanted, lambda one: one.head):
        group = list(each)
        values = [search.value(layer, head, one.weights) for one in group if one.option.kind == "bitmap"]
        if values:
            tables[head].dropped_pairs(CPU)  # once, for all threads
        jobs.append(pool.submit(_head_entries, tables[head], group, values))
    return {key: entry for job in jobs for key, entry in job.result().items()}


def _head_entries(
    table: FamilyTable, group: Sequence[Wanted], values: Sequence[np.ndarray]
) -> dict[Hashable, HeadEntry]:
    kept = table.kept_by_families(np.stack(values)) if values else np.empty((0, 0))
    found: dict[Hashable, HeadEntry] = {}
    at = 0
    for key, _, option, _ in group:
        value = None
        if option.kind == "bitmap":
            value, at = values[at], at + 1
        found[key] = head_entry(option, value, table, None if value is None else kept[at - 1])
    return found
