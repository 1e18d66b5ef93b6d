"""What the layers of an enabled model did so far."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch

__all__ = ["LayerCounts"]


@dataclass
class LayerCounts:
    """What one layer did so far. ``work`` and ``done`` are query-key pairs: of dense attention, and as executed.

    Times are sums over the calls that were timed, which may be fewer than those that were made.
    """

    sparse_calls: int = 0
    dense_calls: int = 0
    work: float = 0.0
    done: float = 0.0
    sparse_density: float = 0.0  # summed over sparse calls
    unseen: int = 0  # forwards in which the layer made no attention call
    reused_heads: int = 0  # head calls that took an earlier step's output
    without_projections: int = 0  # calls of which all heads did, so that q, k and v were not computed
    sparse_seconds: float = 0.0
    dense_seconds: float = 0.0
    timed_sparse: int = 0
    timed_dense: int = 0
    pick_seconds: float = 0.0  # of the timed sparse calls, what picking their blocks took
    timed_picks: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    backends: Counter[str] = field(default_factory=Counter)
    dense_kernels: Counter[str] = field(default_factory=Counter)
    # Sums as ``done`` and ``sparse_density``, of densities that a device has counted and the host has not read.
    unread: tuple[torch.Tensor, torch.Tensor] | None = None

    def add_density(self, density: float | torch.Tensor, work: float) -> None:
        """Count a sparse call's density. One that is on a device is not waited for."""
        if not isinstance(density, torch.Tensor) or density.device.type == "cpu":
            self.done += float(density) * work
            self.sparse_density += float(density)
            return
        density = density.double()
        done, total = self.unread or (0.0, 0.0)
        self.unread = (done + density * work, total + density)

    def read(self) -> None:
        """Take in what devices have counted. Waits for them."""
        if self.unread is not None:
            done, total = (float(x) for x in self.unread)
            self.done, self.sparse_density, self.unread = self.done + done, self.sparse_density + total, None
