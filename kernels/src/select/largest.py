"""The largest of many numbers over several rows, without sorting them all.

The threshold that they reach is found digit by digit: the bits of floating-point numbers are ordered as the numbers
are, once those of negative ones are turned over. Rows only have to say how many of their numbers reach a threshold.
"""

from __future__ import annotations

from typing import Protocol

import torch

__all__ = ["Rows", "ScannedRows", "SortedRows", "count_in_reach", "count_largest"]

_LOWEST = -(2**31)


class Rows(Protocol):
    """Rows of fp32 numbers ``[B, G, R, N]`` without NaN, that are asked how many of them reach a threshold."""

    def reach(self, least: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How many of each row have these keys or larger ones: integers ``[B, G, R, T]`` for int32 ``[B, G, T]``.

        And fp32 of that shape: what those of them that are above 0 sum to.
        """


def count_largest(rows: Rows, wanted: torch.Tensor) -> torch.Tensor:
    """How many of each row are among the ``wanted`` largest of all rows: int64 ``[B, G, R]``.

    wanted: int64 ``[B, G]``. Of equal numbers those of the first rows count.
    """
    least = _threshold(rows, wanted, sums=False)
    above, equal, _ = _around(rows, least)
    return above + _first(equal, wanted - above.sum(2))


def count_in_reach(rows: Rows, wanted: torch.Tensor) -> torch.Tensor:
    """How many of each row are among the fewest of all rows that sum to ``wanted``: int64 ``[B, G, R]``.

    wanted: fp64 ``[B, G]``. Negative numbers, and those that sum to nothing, take no part.
    """
    least = _threshold(rows, wanted, sums=True).clamp(min=0)
    above, equal, total = _around(rows, least)
    missing = wanted - total.sum(2, dtype=torch.float64)
    each = _numbers(least).double()
    more = torch.where(each > 0, missing / each, 0.0).ceil().clamp(min=0, max=2**31).long()
    return above + _first(equal, more)


def _first(equal: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Of ``equal`` things in each row, ``[B, G, R]``, how many are among the first ``wanted``, ``[B, G]``."""
    return (wanted[..., None] - (equal.cumsum(2) - equal)).clamp(min=0).minimum(equal)


def _keys(numbers: torch.Tensor) -> torch.Tensor:
    """int32 that are ordered as these fp32 are."""
    bits = (numbers + 0.0).view(torch.int32)  # there is a negative zero
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _numbers(keys: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`_keys`."""
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).view(torch.float32)


def _around(rows: Rows, least: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How many of each row are above a threshold, int32 ``[B, G]``, and how many equal it: int64 ``[B, G, R]``.

    And what those above sum to, fp32.
    """
    counts, sums = rows.reach(torch.stack([least + 1, least], dim=-1))  # no number has the largest key
    above = counts[..., 0].long()
    return above, counts[..., 1] - above, sums[..., 0]


def _threshold(rows: Rows, wanted: torch.Tensor, *, sums: bool) -> torch.Tensor:
    """The largest threshold that so many reach as to be ``wanted``, ``[B, G]``, or to sum to it: int32 ``[B, G]``.

    Where no threshold is reached by enough, the lowest there is.
    """
    least = torch.full((*wanted.shape, 1), _LOWEST, dtype=torch.int64, device=wanted.device)
    digit = torch.arange(1, 16, device=wanted.device)
    for shift in range(28, -1, -4):
        counts, totals = rows.reach((least + (digit << shift)).int())
        found = totals.sum(2, dtype=torch.float64) if sums else counts.sum(2)
        least = least + ((found >= wanted[..., None]).sum(-1, keepdim=True) << shift)
    return least[..., 0].int()


class SortedRows:
    """Rows that are sorted, the largest first: a threshold is one binary search."""

    def __init__(self, ordered: torch.Tensor) -> None:
        self.ascending = _keys(ordered).flip(-1).contiguous()
        self.sums = torch.nn.functional.pad(ordered.clamp(min=0.0).cumsum(-1), (1, 0))

    def reach(self, least: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As of :class:`Rows`."""
        rows, n = self.ascending.shape[2:]
        asked = least[:, :, None].expand(-1, -1, rows, -1).contiguous()
        counts = n - torch.searchsorted(self.ascending, asked)
        return counts, self.sums.gather(-1, counts)


class ScannedRows:
    """Rows in any order, of which a kernel compares every number."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values.contiguous()

    def reach(self, least: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As of :class:`Rows`."""
        from diffsparse.kernels.select.host import launch_reach

        return launch_reach(self.values, least.contiguous())
