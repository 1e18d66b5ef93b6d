"""Fits a plan's repair: for each phase, layer and head the affine map from a sparse output to what it got wrong.

Ridge regression on sampled queries of generations that run with the plan. Everything that a fit needs of them is a few
sums of products, so nothing of the size of a sequence is held.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from diffsparse.grid import TokenGrid
from diffsparse.kernels import sparse_attention
from diffsparse.kernels.repair import exact_rows as attend_rows
from diffsparse.layout import BlockLayout
from diffsparse.pipelines.tap import AttentionCall
from diffsparse.plan import SparsityPlan
from diffsparse.repair import Repair

__all__ = ["ErrorSums", "RepairTap", "add_sums", "exact_rows", "fit_repair"]

#: Shares of the mean of the diagonal that are tried as the ridge; the best by cross-validation is taken.
RIDGES = (0.03, 0.1, 0.3, 1.0)
#: A head keeps its map where it takes at least this share off the error of queries that it was not fitted on.
LEAST_GAIN = 0.02
#: Bytes of all maps together; beyond it each is cut down to the rank that fits.
MAX_BYTES = 48 * 2**20


@dataclass
class ErrorSums:
    """Sums over sampled queries of one layer's heads in one phase, in two halves for cross-validation.

    With ``x = [O, 1]``, the sparse output of a query, and ``e`` what it got wrong: ``xx`` float64
    ``[2, H, D + 1, D + 1]`` sums ``x x^T``, ``xe`` ``[2, H, D + 1, D]`` sums ``x e^T``, ``ee`` ``[2, H]`` sums
    ``|e|^2``.
    """

    xx: np.ndarray
    xe: np.ndarray
    ee: np.ndarray

    @classmethod
    def zeros(cls, heads: int, dim: int) -> ErrorSums:
        return cls(np.zeros((2, heads, dim + 1, dim + 1)), np.zeros((2, heads, dim + 1, dim)), np.zeros((2, heads)))

    def add(self, half: int, sparse: torch.Tensor, exact: torch.Tensor) -> None:
        """Sampled outputs, ``[B, R, H, D]`` each."""
        x = sparse.float().flatten(0, 1).transpose(0, 1)
        e = exact.float().flatten(0, 1).transpose(0, 1) - x
        x = F.pad(x, (0, 1), value=1.0)
        self.xx[half] += (x.mT @ x).double().cpu().numpy()
        self.xe[half] += (x.mT @ e).double().cpu().numpy()
        self.ee[half] += e.square().sum((1, 2)).double().cpu().numpy()

    def add_sums(self, other: ErrorSums) -> None:
        """Sums over other queries."""
        self.xx += other.xx
        self.xe += other.xe
        self.ee += other.ee

    def fit(self, device: torch.device | str = "cpu") -> tuple[np.ndarray, np.ndarray]:
        """The maps ``[H, D + 1, D]``, the last row of each its bias, and the share of the error that each leaves.

        That share is of queries that the map was not fitted on: each half with the map of the other. ``device``: where
        to solve, in float64.
        """
        xx, xe, ee = (torch.from_numpy(x).to(device) for x in (self.xx, self.xe, self.ee))
        heads = ee.shape[1]
        left, best = ee.new_full((heads,), torch.inf), ee.new_full((heads,), RIDGES[0])
        known, total = ee.amin(0) > 0, ee.sum(0).clamp_min(1e-300)
        for ridge in RIDGES:
            error = ee.new_zeros(heads)
            for half in (0, 1):
                found = _solve(xx[1 - half], xe[1 - half], ee.new_full((heads,), ridge))
                # |e - x W|^2, summed over the queries of the half
                error += ee[half] - 2 * (found * xe[half]).sum((1, 2)) + (found * (xx[half] @ found)).sum((1, 2))
            share = torch.where(known, error / total, torch.inf)
            best = torch.where(share < left, ridge, best)
            left = torch.minimum(left, share)
        return _solve(xx.sum(0), xe.sum(0), best).cpu().numpy(), left.cpu().numpy()


def _solve(xx: torch.Tensor, xe: torch.Tensor, ridge: torch.Tensor) -> torch.Tensor:
    """Ridge regression of every head; the bias has no ridge. Heads whose outputs are all zero get a bias alone.

    ``ridge``: of each head, ``[H]``.
    """
    dim = xe.shape[2]
    scale = xx.diagonal(dim1=1, dim2=2)[:, :dim].mean(1)
    # Where no query was sampled, the last entry is 0.
    bias = (xx[:, dim, dim] <= 0).to(xx.dtype)
    penalty = torch.cat([torch.where(scale > 0, ridge * scale, 1.0)[:, None].expand(-1, dim), bias[:, None]], 1)
    return torch.linalg.solve(xx + penalty.diag_embed(), xe)


def exact_rows(call: AttentionCall, rows: torch.Tensor) -> torch.Tensor:
    """Dense attention of some queries: ``[B, R, H, D]`` for ``rows`` int64 ``[R]``."""
    return attend_rows(call.q, call.k, call.v, rows, call.scale, call.kv_len)


@dataclass
class RepairTap:
    """Runs every call as the plan says, and adds up what sampled queries get wrong.

    ``half``: which half of the sums the calls that come go into. ``rows``: queries sampled a call.
    ``sums``: by phase and layer.
    """

    plan: SparsityPlan
    rows: int = 256
    seed: int = 0
    half: int = 0
    sums: dict[tuple[int, str], ErrorSums] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)
        self._phase: int | None = None
        self._layouts: dict[tuple[str, TokenGrid], BlockLayout | None] = {}

    def __call__(self, call: AttentionCall) -> torch.Tensor | None:
        phase = self.plan.schedule.phase(call.noise_level)
        if phase is None:
            return None
        if phase != self._phase:  # one phase's block lists at a time
            self._phase, self._layouts = phase, {}
        heads, dim = call.q.shape[2:]
        key = (call.layer, call.grid)
        if key not in self._layouts:
            found = self.plan.layout(phase, call.layer, heads, call.grid)
            self._layouts[key] = None if found is None else found.to(call.q.device)
        layout = self._layouts[key]
        if layout is None:
            return None
        out = sparse_attention(call.q, call.k, call.v, layout, scale=call.scale, kv_len=call.kv_len)
        grid = call.grid
        chosen = torch.randperm(grid.num_visual, generator=self._generator)[: self.rows]
        rows = (chosen + grid.text_before).to(call.q.device)
        sums = self.sums.setdefault((phase, call.layer), ErrorSums.zeros(heads, dim))
        sums.add(self.half, out[:, rows], exact_rows(call, rows))
        return out


def add_sums(total: dict[tuple[int, str], ErrorSums], found: dict[tuple[int, str], ErrorSums]) -> None:
    """Add the sums of a generation to those of the ones before it."""
    for place, sums in found.items():
        if place in total:
            total[place].add_sums(sums)
        else:
            total[place] = sums


def fit_repair(
    plan: SparsityPlan,
    sums: dict[tuple[int, str], ErrorSums],
    max_bytes: int = MAX_BYTES,
    device: torch.device | str = "cpu",
    fitted_one: Callable[[], object] = lambda: None,
) -> tuple[Repair | None, float]:
    """The repair of a plan from its error sums, and the share of the squared error that it leaves, over all heads.

    Heads that attend everything get none, and neither do those whose map helps too little on queries that it was not
    fitted on. None where no head gets one. ``device``: where they are fitted. ``fitted_one`` is called after each of
    the sums.
    """
    index = np.full(plan.index.shape, -1, np.int32)
    maps: list[np.ndarray] = []
    products: list[np.ndarray] = []
    before = after = 0.0
    for (phase, layer), found in sums.items():
        place = plan.layers.index(layer)
        fitted, left = found.fit(device)
        fitted_one()
        for head in range(len(left)):
            wrong = float(found.ee[:, head].sum())
            before += wrong
            if plan.entries[plan.index[phase, place, head]].is_whole or not left[head] <= 1 - LEAST_GAIN:
                after += wrong
                continue
            after += wrong * float(left[head])
            index[phase, place, head] = len(maps)
            maps.append(fitted[head])
            products.append(found.xx[:, head].sum(0))
    if not maps:
        return None, 1.0
    whole = np.stack(maps)
    count, dim = len(maps), whole.shape[2]
    share = after / before if before else 1.0
    if count * 2 * dim * (dim + 1) <= max_bytes:
        return Repair(index, _half(whole[:, :-1]), _half(whole[:, -1])), share
    rank = max(1, (max_bytes // count - 2 * dim) // (4 * dim))
    left_factor, right_factor, bias = _cut(whole, np.stack(products), rank)
    return Repair(index, _half(left_factor), _half(bias), _half(right_factor)), share


def _half(values: np.ndarray) -> np.ndarray:
    limit = float(np.finfo(np.float16).max)
    return np.clip(values, -limit, limit).astype(np.float16)


def _cut(whole: np.ndarray, xx: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Factors ``[N, D, R]`` and ``[N, R, D]`` and biases ``[N, D]`` of the maps of lower rank that do almost the same.

    Reduced-rank regression: what is kept is what the maps ``[N, D + 1, D]`` make most of on the sampled outputs, whose
    products ``xx`` are ``[N, D + 1, D + 1]``; what is lost on average goes into the bias.
    """
    matrix, bias = whole[:, :-1], whole[:, -1]
    mean = xx[:, :-1, -1] / xx[:, -1:, -1]
    spread = xx[:, :-1, :-1] / xx[:, -1:, -1:] - mean[:, :, None] * mean[:, None, :]
    made = matrix.transpose(0, 2, 1) @ spread @ matrix
    _, vectors = np.linalg.eigh((made + made.transpose(0, 2, 1)) / 2)
    basis = vectors[:, :, ::-1][:, :, :rank]
    left, right = matrix @ basis, basis.transpose(0, 2, 1)
    return left, right, bias + np.einsum("ni,nij->nj", mean, matrix - left @ right)
