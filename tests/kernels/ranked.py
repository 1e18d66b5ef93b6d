"""Run in a process of its own with TRITON_INTERPRET=1: the kernels of rules and budgets, against plain torch."""

from __future__ import annotations

import math
from itertools import product
from unittest.mock import patch

import torch

from diffsparse.grid import TokenGrid
from diffsparse.kernels.select import budgets
from diffsparse.kernels.select.available import no_blocks_kernel
from diffsparse.kernels.select.pooled_max import block_bounds
from diffsparse.kernels.select.ranking import Compared, Sorted, ranking_of
from diffsparse.kernels.select.self_similar import self_similarity
from diffsparse.kernels.select.signals import block_means
from diffsparse.kernels.select.sub_block import part_means, score_sub_block
from diffsparse.kernels.select.tail_error import score_tail_error
from diffsparse.layout import build_layout
from diffsparse.selection import BUDGETS, Budget
from diffsparse.tokens import TokenLayout
from tests.kernels.apart import case, finish
from tests.kernels.cases import MIXED, inputs
from tests.tolerance import Work, assert_near

ROWS = (1, 7, 19)
GRIDS = (TokenGrid(2, 9, 11, text_before=3, text_after=70), TokenGrid(1, 13, 17), TokenGrid(3, 16, 24, text_after=1))


def scored(n: int, seed: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of an item and 2 heads, many of them equal, some no numbers; and which pairs may be kept."""
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(1, 2, n, n, generator=draw).mul(4).round().div(2)
    scores = scores.masked_fill(torch.rand(scores.shape, generator=draw) < 0.05, math.inf)
    scores = scores.masked_fill(torch.rand(scores.shape, generator=draw) < 0.05, -math.inf)
    scores = scores.masked_fill(torch.rand(scores.shape, generator=draw) < 0.02, math.nan)
    candidates = torch.rand(1, 2, n, n, generator=draw) < 0.8
    candidates[:, :, n // 2] = False  # a row that may keep nothing
    return scores.to(device), candidates.to(device)


def check_budget(budget: Budget, n: int, seed: int, device: str = "cpu") -> None:
    """Kept by kernels as by a sort. Weights are powers of two over a sum of them: sums round alike in any order."""
    scores, candidates = scored(n, seed, device)
    weights = torch.where(
        candidates, scores.nan_to_num(nan=-60.0, posinf=0.0, neginf=-60.0).floor().clamp(min=-60.0), -1e9
    )
    weights = torch.exp2(weights) / 4096

    def dyadic(_: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
        return weights * free

    blocks = torch.full((2,), n, device=device)
    with patch.object(budgets, "row_weights", dyadic):
        found = budgets.keep(scores, candidates, blocks, budget)
        assert isinstance(ranking_of(scores, candidates), Compared)
        with patch.object(budgets, "ranking_of", Sorted):
            wanted = budgets.keep(scores, candidates, blocks, budget)
    assert torch.equal(found, wanted), (found != wanted).nonzero()
    assert n == 1 or found.any()


def check_blocks(grid: TokenGrid, dim: int, dtype: torch.dtype, device: str = "cpu") -> None:
    """Means, bounds and parts of blocks, against what torch finds in double precision."""
    for entries in (MIXED, MIXED[:1]):  # one order serves all heads, too
        tokens = build_layout(grid, entries, 64).tokens.to(device)
        x, _, _ = (t.to(device, dtype) for t in inputs(grid, len(entries), dim, batch=2))
        assert no_blocks_kernel(x) is None and no_blocks_kernel(x.double()) is not None
        check_statistics(x, tokens, Work(64 + dim, 3, dtype=dtype))


def check_statistics(x: torch.Tensor, tokens: TokenLayout, work: Work) -> None:
    """Of ``x`` by a kernel; and by torch, which a CPU takes for doubles."""
    wide, there = x.cpu().double(), tokens.to("cpu")

    def agree(found: torch.Tensor, want: torch.Tensor) -> None:
        assert_near(found.cpu().double(), want.double(), work)

    agree(block_means(x, tokens), block_means(wide, there))
    for found, want in zip(block_bounds(x, tokens), block_bounds(wide, there)):
        agree(found, want)
    agree(self_similarity(x, tokens), self_similarity(wide, there))
    for parts in (1, 3, 16):
        means, count = part_means(x, tokens, parts)
        want, number = part_means(wide, there, parts)
        assert torch.equal(count.cpu(), number)
        agree(means, want)
    score, known = score_sub_block(x, x.flip(1), tokens, 0.3), score_sub_block(wide, wide.flip(1), there, 0.3)
    assert torch.equal(score.cpu().isfinite(), known.isfinite())
    agree(score.cpu()[known.isfinite()], known[known.isfinite()])


def check_tail_error(grid: TokenGrid, dim: int, dtype: torch.dtype, device: str = "cpu", factor: float = 1.0) -> None:
    """Errors of means by kernels, and by torch in fp32: as shares of a row's largest, for small ones are differences.

    ``factor``: of the queries, which makes logits as large as those of trained models. A rounding of a logit is one of
    a weight, as many times as large as the logit, and twice that of its square.
    """
    for entries in (MIXED, MIXED[:1]):
        tokens = build_layout(grid, entries, 64).tokens.to(device)
        q, k, v = (t.to(device, dtype) for t in inputs(grid, len(entries), dim, batch=2))
        q = factor * q
        wide = [x.cpu().double() for x in (q, k, v)]
        there, scale = tokens.to("cpu"), dim**-0.5
        largest = float((scale * block_means(wide[0], there) @ wide[1].float().permute(0, 2, 3, 1)).abs().max())
        work = Work(dim + grid.seq_len, 4, gain=2 * max(largest, 8.0), dtype=dtype)
        for parts in (3, 16):
            found = score_tail_error(q, k, tokens, scale, v=v, parts=parts).cpu().double()
            want = score_tail_error(*wide[:2], there, scale, v=wide[2], parts=parts).double()
            top = want.amax(3, keepdim=True)
            top = torch.where(top.isfinite(), top, 0.0)  # a block without queries
            assert_near((found - top).exp(), (want - top).exp(), work)


def all_budgets() -> list[Budget]:
    value = {"top_k": 3, "score": 0.5, "weight": 0.0009765625}
    plain = [Budget(kind, value.get(kind, 0.4)) for kind in BUDGETS]  # type: ignore[arg-type]
    return [*plain, Budget("top_p", 0.9, least=0.2, most=0.5), Budget("quantile", 1.0), Budget("top_p_heads", 1.0)]


def main() -> None:
    for budget, n in product(all_budgets(), ROWS):
        with case("keep", budget, n):
            check_budget(budget, n, seed=n)
    for grid, (dim, dtype) in product(GRIDS, ((16, torch.float32), (72, torch.float16))):
        with case("blocks", grid, dim, dtype):
            check_blocks(grid, dim, dtype)
        for factor in (1.0, 40.0):
            with case("tail error", grid, dim, dtype, factor):
                check_tail_error(grid, dim, dtype, factor=factor)
    finish()


if __name__ == "__main__":
    main()
