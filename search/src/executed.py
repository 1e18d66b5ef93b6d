"""How much attention ran, read off a summary: of an evaluation, from one moment to another."""

from __future__ import annotations

import math
from dataclasses import dataclass

from diffsparse import pipelines

__all__ = ["ExecutedWork", "executed_work"]


@dataclass(frozen=True)
class ExecutedWork:
    """Sums over all self-attention calls since sparse attention was enabled, by what the calls really ran."""

    work: float  # of all calls, as dense ones
    done: float
    sparse_calls: int
    sparse_density: float  # summed over the sparse calls

    def since(self, before: ExecutedWork) -> tuple[float | None, float | None]:
        """``(call density, whole-trajectory density)`` of the calls after ``before``."""
        work, calls = self.work - before.work, self.sparse_calls - before.sparse_calls
        call = (self.sparse_density - before.sparse_density) / calls if calls else None
        return call, (self.done - before.done) / work if work else None


def executed_work(summary: pipelines.SparseSummary) -> ExecutedWork:
    ran = list(summary.transformers.values())
    layers = [layer for t in ran for layer in t.layers]
    return ExecutedWork(
        work=math.fsum(t.work for t in ran),
        done=math.fsum((t.density or 0.0) * t.work for t in ran),
        sparse_calls=sum(layer.sparse_calls for layer in layers),
        sparse_density=math.fsum((layer.density or 0.0) * layer.sparse_calls for layer in layers),
    )
