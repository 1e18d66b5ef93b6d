"""The largest of many numbers over several rows, without sorting them all.

Rows are sorted already, so how many of a row reach a threshold is one binary search. The threshold itself is found
digit by digit: the bits of floating-point numbers are ordered as the numbers are, once those of negative ones are
turned over.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["count_in_reach", "count_largest", "sums_before"]

_LOWEST = -(2**31)


def count_largest(ordered: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """How many of each row are among the ``wanted`` largest of all rows: int64 ``[B, G, R]``.

    ordered: fp32 ``[B, G, R, N]``, each row descending, without NaN. wanted: int64 ``[B, G]``. Of equal numbers those
    of the first rows count.
    """
    rows = _Rows(ordered)
    least = rows.threshold(lambda counts: counts.sum(2), wanted)
    above, equal = rows.around(least)
    return above + _first(equal, wanted - above.sum(2))


def count_in_reach(ordered: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """How many of each row are among the fewest of all rows that sum to ``wanted``: int64 ``[B, G, R]``.

    wanted: fp64 ``[B, G]``. ordered: as of :func:`count_largest`; negative numbers, and those that sum to nothing, take
    no part.
    """
    rows = _Rows(ordered)
    sums = torch.nn.functional.pad(ordered.clamp(min=0.0).cumsum(-1), (1, 0))

    def total(counts: torch.Tensor) -> torch.Tensor:
        return sums.gather(-1, counts).sum(2, dtype=torch.float64)

    least = rows.threshold(total, wanted).clamp(min=0)
    above, equal = rows.around(least)
    missing = wanted - total(above[..., None])[..., 0]
    each = _numbers(least).double()
    more = torch.where(each > 0, missing / each, 0.0).ceil().clamp(min=0, max=2**31).long()
    return above + _first(equal, more)


def sums_before(ordered: torch.Tensor) -> torch.Tensor:
    """The sum of what stands before each value of a row."""
    return ordered.cumsum(-1) - ordered


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


class _Rows:
    """Rows ``[B, G, R, N]``, descending, that are asked how many of their numbers reach a threshold, a key."""

    def __init__(self, ordered: torch.Tensor) -> None:
        self.ascending = _keys(ordered).flip(-1).contiguous()

    def reaching(self, least: torch.Tensor, above: bool = False) -> torch.Tensor:
        """How many of each row are ``least`` or more, or are more: int64 ``[B, G, R, T]`` for int32 ``[B, G, T]``."""
        rows, n = self.ascending.shape[2:]
        asked = least[:, :, None].expand(-1, -1, rows, -1).contiguous()
        return n - torch.searchsorted(self.ascending, asked, right=above)

    def around(self, least: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How many of each row are above a threshold, int32 ``[B, G]``, and how many equal it: ``[B, G, R]`` each."""
        above = self.reaching(least[..., None], above=True)[..., 0]
        return above, self.reaching(least[..., None])[..., 0] - above

    def threshold(self, measure: Callable[[torch.Tensor], torch.Tensor], wanted: torch.Tensor) -> torch.Tensor:
        """The largest threshold that so many reach as to be ``wanted``, ``[B, G]``: int32 ``[B, G]``.

        measure: from counts ``[B, G, R, T]`` to what is wanted, ``[B, G, T]``. Where no threshold is reached by enough,
        the lowest there is.
        """
        device = self.ascending.device
        least = torch.full((*wanted.shape, 1), _LOWEST, dtype=torch.int64, device=device)
        digit = torch.arange(1, 16, device=device)
        for shift in range(28, -1, -4):
            tries = least + (digit << shift)
            reached = measure(self.reaching(tries.int())) >= wanted[..., None]
            least = least + (reached.sum(-1, keepdim=True) << shift)
        return least[..., 0].int()
