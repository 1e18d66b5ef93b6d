"""Which heads of a layer this process computes, where several processes share a model's attention.

With Ulysses (arXiv 2309.14509) a process holds a part of the tokens of all heads; before attention the processes
exchange tokens for heads, so that each has all tokens of some heads. A plan is then cut by head. Heads differ in what
they cost, and the plan knows it beforehand: each process gets heads of about the same cost. With tensor parallelism
the projections are split by heads, and each process has the heads that its weights make.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from diffsparse.grid import TokenGrid
from diffsparse.pipelines._diffusers import parallel_config, splits_text, tensor_rank, ulysses_rank

__all__ = ["Share", "as_they_lie", "deal_heads", "imbalance", "share_of"]

#: Heads stay where they are while the fullest process has so much more to do at most: moving them takes time, too.
_WORTH = 1.02


@dataclass(frozen=True)
class Share:
    """This process's part of attention.

    rank: of ``ranks``. exchanges: tokens for heads (Ulysses); else the projections make its own heads alone.
    uneven: heads and tokens need not divide by the number of processes (``ulysses_anything``). text_apart: text is cut
    by itself, so that after the exchange the parts of text lie between those of the video.
    """

    rank: int
    ranks: int
    exchanges: bool = True
    uneven: bool = False
    text_apart: bool = False

    def counts(self, heads: int) -> list[int]:
        """Heads of each process, as diffusers deals them out: all have as many, and the last may have fewer."""
        each = -(-heads // self.ranks)
        return [max(0, min(each, heads - r * each)) for r in range(self.ranks)]

    def tokens(self, count: int) -> list[int]:
        """Tokens of each process, of a part of the sequence that is cut by itself."""
        each, rest = divmod(count, self.ranks)
        return [each + (r < rest) for r in range(self.ranks)]

    def canonical(self, grid: TokenGrid, text_before: bool) -> list[int] | None:
        """Where the tokens of the model's own order are in the sequence after the exchange; None where they stand.

        text_before: text comes first in the model's order, else last. What lies on the video's other side (reference
        images) is cut with the video.
        """
        first = grid.text_before if text_before else grid.text_before + grid.num_visual
        second = grid.seq_len - first
        if not self.text_apart or not first or not second or not (grid.text_before or grid.text_after):
            return None
        parts = list(zip(self.tokens(first), self.tokens(second)))
        begin = [0, *accumulate(a + b for a, b in parts)]
        of_first = [begin[r] + i for r, (a, _) in enumerate(parts) for i in range(a)]
        of_second = [begin[r] + a + i for r, (a, b) in enumerate(parts) for i in range(b)]
        return of_first + of_second


def share_of(model: torch.nn.Module) -> Share | str | None:
    """How a model's attention is shared, by what ``enable_parallelism`` has set; None where it is not.

    A string says why it cannot be shared by head, and its layers run dense.
    """
    config, tensor = parallel_config(model), tensor_rank(model)
    if config is None:
        return None if tensor is None else Share(*tensor, exchanges=False)
    if tensor is not None:
        return "tensor parallelism beside it is not known here"
    context = config.context_parallel_config
    if context.ring_degree > 1:
        return "ring attention passes keys and values on, and no process has all of them"
    return Share(
        rank=ulysses_rank(config),
        ranks=int(context.ulysses_degree),
        uneven=bool(context.ulysses_anything),
        text_apart=splits_text(model),
    )


def imbalance(costs: Sequence[float], dealt: Sequence[Sequence[int]]) -> float:
    """What the process with most to do has, over the mean of all."""
    loads = [sum(costs[h] for h in heads) for heads in dealt]
    mean = sum(loads) / len(loads)
    return max(loads) / mean if mean > 0 else 1.0


def as_they_lie(counts: Sequence[int]) -> list[tuple[int, ...]]:
    """Heads of each process, ``counts[r]`` of them, one behind another."""
    ends = [0, *accumulate(counts)]
    return [tuple(range(a, b)) for a, b in zip(ends, ends[1:])]


def deal_heads(costs: Sequence[float], counts: Sequence[int]) -> list[tuple[int, ...]]:
    """Heads of each process, ``counts[r]`` of them, so that the largest sum of costs is small.

    The largest first, each to the process with the least to do that has room (Graham, SIAM J. Appl. Math. 1969,
    section 5), then pairs are swapped while that helps the fullest one. As they lie where that is hardly worse.
    """
    dealt: list[list[int]] = [[] for _ in counts]
    loads = [0.0] * len(counts)
    for head in sorted(range(len(costs)), key=lambda h: (-costs[h], h)):
        place = min((r for r in range(len(counts)) if len(dealt[r]) < counts[r]), key=lambda r: (loads[r], r))
        dealt[place].append(head)
        loads[place] += costs[head]
    while _swap(costs, dealt, loads):
        pass
    found = [tuple(sorted(heads)) for heads in dealt]
    lying = as_they_lie(counts)
    return lying if imbalance(costs, lying) <= _WORTH * imbalance(costs, found) else found


def _swap(costs: Sequence[float], dealt: list[list[int]], loads: list[float]) -> bool:
    """Swap the pair of heads that takes most from the fullest process; whether there was one."""
    full = max(range(len(loads)), key=lambda r: (loads[r], -r))
    best, chosen = loads[full] * (1 - 1e-9), None
    for other in range(len(loads)):
        for i, a in enumerate(dealt[full]):
            for j, b in enumerate(dealt[other]):
                less = costs[a] - costs[b]
                if other != full and less > 0 and (worst := max(loads[full] - less, loads[other] + less)) < best:
                    best, chosen = worst, (other, i, j, less)
    if chosen is None:
        return False
    other, i, j, less = chosen
    dealt[full][i], dealt[other][j] = dealt[other][j], dealt[full][i]
    loads[full], loads[other] = loads[full] - less, loads[other] + less
    return True
