"""A repair that is fitted anew in every call, for plans without a search.

A few queries of a call, spread over its visual tokens, are attended exactly. Ridge regression on them gives each head
the affine map from what it put out to what it got wrong, as ``diffsparse.repair`` has it fitted offline: the output
``O`` becomes ``O + O W + b``, and the queries that were attended exactly keep their exact outputs. From SparsePR (arXiv
2608.18484), there with standardised outputs and a map of rank 16; here the map is whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from diffsparse.grid import TokenGrid
from diffsparse.limits import LEAST_ROWS, MOST_ROWS
from diffsparse.messages import shown
from diffsparse.tokens import HeadSelection
from diffsparse.typed import PlanError

__all__ = ["OnlineRepair"]

# What the fit and the product cost beside the rows, in rows of dense attention: a product with a matrix is as much
# arithmetic for a token as half of head_dim keys, and kernels take heads of up to 256.
_PRODUCT = 128
# The golden ratio in 16 bits.
_GOLDEN = 40503


@dataclass(frozen=True)
class OnlineRepair:
    """rows: queries of each call that are attended exactly, of every head; 16 to 4,096. Raises :class:`PlanError`."""

    rows: int = 256

    def __post_init__(self) -> None:
        if type(self.rows) is not int or not LEAST_ROWS <= self.rows <= MOST_ROWS:
            raise PlanError(
                f"the rows of an online repair must be an integer from {LEAST_ROWS} to {MOST_ROWS:,}, "
                f"got {shown(self.rows)}"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of tensors: it has none."""
        return 0

    def to(self, device: torch.device | str) -> OnlineRepair:
        """The same for every device."""
        return self

    def heads(self, selection: HeadSelection) -> OnlineRepair:
        """The same for every head."""
        return self

    def count(self, num_visual: int) -> int:
        """Rows of a call with so many visual tokens."""
        return min(self.rows, num_visual)

    def places(self, text_before: int, num_visual: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """The tokens that are attended exactly, int64 ``[rows]``, ascending; made on ``device``, without waiting.

        One in each of as many equal parts of the visual tokens, at a place in it that moves by the golden ratio: evenly
        spaced rows would meet the same few columns of a grid whose width divides their distance.
        """
        count = self.count(num_visual)
        number = torch.arange(count + 1, device=device)
        border = torch.div(number * num_visual, count, rounding_mode="floor")
        part = (number[:-1] * _GOLDEN) & 0xFFFF  # of 2^16
        return text_before + border[:-1] + ((part * border.diff()) >> 16)

    def density(self, grid: TokenGrid) -> float:
        """What the rows add to the density of a call on a grid: their share of its tokens."""
        return self.count(grid.num_visual) / grid.seq_len

    def time(self, grid: TokenGrid) -> float:
        """Predicted time over that of dense attention: of the rows, of the fit and of the product, by their work."""
        return (self.count(grid.num_visual) + _PRODUCT) / grid.seq_len

    def to_dict(self) -> dict[str, Any]:
        """What a plan's JSON says of it."""
        return {"kind": "online", "rows": self.rows}
