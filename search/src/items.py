"""The assignment problem of one trial: what may be chosen for every head in every phase, with errors and prices."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from diffsparse.search.options import HeadScores, Option

__all__ = ["Items"]


@dataclass
class Items:
    """An item for each layer, head and phase, in that order.

    ``whole``: the price of each as a dense head.
    """

    options: list[list[Option]]
    errors: list[np.ndarray]
    prices: list[np.ndarray]
    whole: list[float]
    scores: list[HeadScores]
    unstable: set[tuple[str, int]]

    def all_dense(self, which: set[int]) -> Items:
        """With nothing but dense heads for some of them."""
        found = replace(self, options=[*self.options], errors=[*self.errors], prices=[*self.prices])
        for i in which:
            found.options[i] = [Option(0.0, 1.0, "none", "dense")]
            found.errors[i], found.prices[i] = np.zeros(1), np.array([self.whole[i]])
        return found

    def none_dense(self, which: set[int]) -> Items:
        """With no option for some of them that costs as much as a dense head. Leaving out costs less always."""
        found = replace(self, options=[*self.options], errors=[*self.errors], prices=[*self.prices])
        for i in which:
            kept = self.prices[i] < self.whole[i]
            found.options[i] = [option for option, keep in zip(self.options[i], kept, strict=True) if keep]
            found.errors[i], found.prices[i] = self.errors[i][kept], self.prices[i][kept]
        return found
