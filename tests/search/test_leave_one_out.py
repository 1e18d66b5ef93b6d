"""What a repair would leave: the closed form against fitting again without each query."""

from __future__ import annotations

import pytest
import torch

from diffsparse.entry import TAILS
from diffsparse.grid import TokenGrid
from diffsparse.kernels.repair.online import ridge_map
from diffsparse.order import TileOrder
from diffsparse.search import score_plain, score_rows
from diffsparse.search.leave_one_out import repaired_error
from diffsparse.search.score import BlockIndex, score_call
from tests.tolerance import Work, assert_near


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("queries", "dim"), [(2, 3), (5, 8), (40, 8), (33, 16)])
def test_each_query_has_the_error_of_the_map_that_the_others_give(queries: int, dim: int) -> None:
    left, out = drawn(2, queries, dim) + 3, drawn(queries, dim, seed=1)
    found = repaired_error(left.float(), out.float())
    for batch in range(2):
        x, error = left[batch], out - left[batch]
        centred = x - x.mean(0)
        penalty = torch.eye(dim + 1, dtype=torch.float64) * (centred.T @ centred).diagonal().mean()
        penalty[dim, dim] = 0
        whole = torch.cat([x, torch.ones(queries, 1, dtype=torch.float64)], 1)
        # Residuals are divided by one less their leverages, and what rounding does to them with them.
        leverage = (whole @ torch.linalg.inv(whole.T @ whole + penalty) * whole).sum(1)
        work = Work(queries * dim, sums=16, gain=float(1 / (1 - leverage.max())), dtype=torch.float32)
        for i in range(queries):
            rest = [j for j in range(queries) if j != i]
            fitted = torch.linalg.solve(whole[rest].T @ whole[rest] + penalty, whole[rest].T @ error[rest])
            wrong = (error[i] - whole[i] @ fitted).square().sum()
            assert_near(found[batch, i].double(), wrong, work)


def test_the_map_is_that_of_the_online_repair() -> None:
    """Its residuals on all queries, over one less their leverages, are what is found."""
    left, out = drawn(60, 8).float(), drawn(60, 8, seed=1).float()
    weight, bias = ridge_map(left[None], (out - left)[None])
    within = (out - left - left @ weight[0] - bias[0]).square().sum(1)
    found = repaired_error(left, out)
    assert (found >= within).all()
    assert float(found.sum()) < 2 * float(within.sum())


def test_outputs_that_are_all_alike_and_single_queries_keep_what_no_map_takes_away() -> None:
    out = drawn(30, 4).float()
    found = repaired_error(torch.zeros(30, 4), out)
    # The mean of the others is all that a bias has.
    want = torch.stack([(out[i] - torch.cat([out[:i], out[i + 1 :]]).mean(0)).square().sum() for i in range(30)])
    assert_near(found, want, Work(30, sums=4))
    assert_near(repaired_error(out[:1] + 1, out[:1]), torch.full((1,), 4.0), Work(4, sums=2))


@pytest.mark.parametrize("size", [1.0, 30.0])
def test_kernels_and_torch_estimate_alike_with_logits_as_large_as_trained_models_have(
    size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of a standard deviation of 4, and of more than 100, where single keys take all of the attention."""
    grid, heads, dim = TokenGrid(3, 8, 8, 0, 5), 2, 16
    q, k, v = (drawn(1, grid.seq_len, heads, dim, seed=i).float() for i in range(3))
    index = BlockIndex.build(grid, TileOrder(1, 8, 8), 64, torch.device("cpu"))
    found = []
    for way in (score_plain, score_rows):
        monkeypatch.setattr(score_plain, "add_item", way.add_item)
        found.append(score_call(size * q, k, v, index, samples=8, generator=torch.Generator().manual_seed(1)))
    for scores in found:
        assert scores.repaired.isfinite().all() and (scores.repaired >= 0).all()
        assert (scores.repaired <= scores.true).all() and scores.repaired.max() > 0
    # Weights are powers of logits, whose rounding grows with their size.
    assert_near(found[1].repaired, found[0].repaired, Work(grid.seq_len, sums=8, gain=size))


def test_scores_tell_what_a_repair_takes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that blocks share in one direction are missed alike by all queries, and a map puts them back."""
    grid, heads, dim = TokenGrid(4, 16, 16), 2, 16
    q, k, v = (drawn(1, grid.seq_len, heads, dim, seed=i).float() for i in range(3))
    v = 0.05 * v + drawn(heads, dim, seed=5).float()  # nearly the same everywhere: without a tail all of it is missed
    index = BlockIndex.build(grid, TileOrder(1, 8, 8), 64, torch.device("cpu"))
    scores = score_call(q, k, v, index, samples=8, generator=torch.Generator().manual_seed(1))
    none = TAILS.index("none")
    assert (scores.repaired <= scores.true).all()
    assert (scores.repaired[none, :, 0] < 0.05 * scores.true[none, :, 0]).all()
    # In chunks of query blocks it is one fit all the same.
    monkeypatch.setattr(score_plain, "CHUNK_BYTES", 1)
    again = score_call(q, k, v, index, samples=8, generator=torch.Generator().manual_seed(1))
    assert_near(again.repaired, scores.repaired, Work(grid.seq_len, sums=8))
