"""The largest of many weights over several rows, without sorting them all.

Rows are sorted already, so how many of a row reach a threshold is one binary search. The threshold itself is found
digit by digit: floating-point numbers that are not negative are ordered as their bits are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["count_in_reach", "count_largest", "sums_before"]


def count_largest(ordered: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """How many of each row are among the ``wanted`` largest of all rows: int64 ``[B, G, R]``.

    ordered: fp32 ``[B, G, R, N]``, each row descending; negative numbers take no part. wanted: int64 ``[B, G]``. Of
    equal numbers those of the first rows count.
    """
    rows = _Rows(ordered)
    least = rows.threshold(lambda counts: counts.sum(2), wanted.clamp(min=1))
    above, equal = rows.around(least)
    return above + _first(equal, wanted - above.sum(2))


def count_in_reach(ordered: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """How many of each row are among the fewest of all rows that sum to ``wanted``: int64 ``[B, G, R]``.

    wanted: fp64 ``[B, G]``. ordered: as of :func:`count_largest`.
    """
    rows = _Rows(ordered)
    sums = torch.nn.functional.pad(ordered.clamp(min=0.0).cumsum(-1), (1, 0))

    def total(counts: torch.Tensor) -> torch.Tensor:
        return sums.gather(-1, counts).sum(2, dtype=torch.float64)

    wanted = wanted.clamp(min=torch.finfo(torch.float32).tiny)
    least = rows.threshold(total, wanted)
    above, equal = rows.around(least)
    missing = wanted - total(above[..., None])[..., 0]
    # Where the threshold is 0, all that weighs something is above it.
    more = torch.where(least > 0, (missing / least.double()).ceil(), 0.0).long()
    return above + _first(equal, more)


def sums_before(ordered: torch.Tensor) -> torch.Tensor:
    """The sum of what stands before each value of a row."""
    return ordered.cumsum(-1) - ordered


def _first(equal: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Of ``equal`` things in each row, ``[B, G, R]``, how many are among the first ``wanted``, ``[B, G]``."""
    return (wanted[..., None] - (equal.cumsum(2) - equal)).clamp(min=0).minimum(equal)


class _Rows:
    """Rows ``[B, G, R, N]``, descending, that are asked how many of their numbers reach a threshold."""

    def __init__(self, ordered: torch.Tensor) -> None:
        self.ascending = ordered.flip(-1).contiguous()
        self.device = ordered.device

    def reaching(self, least: torch.Tensor, above: bool = False) -> torch.Tensor:
        """How many of each row are ``least`` or more, or are more: int64 ``[B, G, R, T]`` for fp32 ``[B, G, T]``."""
        rows, n = self.ascending.shape[2:]
        asked = least[:, :, None].expand(-1, -1, rows, -1).contiguous()
        return n - torch.searchsorted(self.ascending, asked, right=above)

    def around(self, least: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How many of each row are above a threshold, fp32 ``[B, G]``, and how many equal it: ``[B, G, R]`` each."""
        above = self.reaching(least[..., None], above=True)[..., 0]
        return above, self.reaching(least[..., None])[..., 0] - above

    def threshold(self, measure: Callable[[torch.Tensor], torch.Tensor], wanted: torch.Tensor) -> torch.Tensor:
        """The largest number that so many reach as to be ``wanted``, ``[B, G]``: fp32 ``[B, G]``; 0 where none is.

        measure: from counts ``[B, G, R, T]`` to what is wanted, ``[B, G, T]``.
        """
        bits = torch.zeros(*wanted.shape, 1, dtype=torch.int32, device=self.device)
        for shift in range(28, -1, -4):
            digit = torch.arange(1, 8 if shift == 28 else 16, dtype=torch.int32, device=self.device)
            tries = (bits + (digit << shift)).view(torch.float32)
            reached = measure(self.reaching(tries)) >= wanted[..., None]
            bits = bits + (reached.sum(-1, keepdim=True, dtype=torch.int32) << shift)
        return bits.view(torch.float32)[..., 0]
