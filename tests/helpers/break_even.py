"""A break-even table that says the same of every length."""

from __future__ import annotations

from typing import Any

import torch

from diffsparse.entry import TAILS
from diffsparse.kernels.break_even import device_name
from diffsparse.kernels.costs import CostTable


def table(*ratios: float, **changes: Any) -> CostTable:
    """Time over dense at densities 0.2 and 0.9 (one ratio: at both), for the tiny models on this CPU; gathering is
    free. ``changes``: fields that differ from that.
    """
    row = tuple(ratios) if len(ratios) == 2 else ratios * 2
    return CostTable(
        **{"device": device_name(torch.device("cpu")), "backend": "cpu", "dtype": "float32", "heads": 3}
        | {"head_dim": 16, "block_size": 64, "tokens": (200,), "densities": (0.2, 0.9), "gather": (0.0,)}
        | {"ratio": {tail: (row,) for tail in TAILS}, "dense": ("flash_sdpa",), "about": {}}
        | changes
    )
