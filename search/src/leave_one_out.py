"""What a repair would leave of a sparse output's error, by leave-one-out ridge regression over sampled queries."""

from __future__ import annotations

import torch

from diffsparse.kernels.repair.online import regularized_inverse

__all__ = ["repaired_error"]


def repaired_error(left: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Squared error of each query after the affine map that all other queries give: ``[..., R]``.

    left: sparse outputs, fp32 ``[..., R, D]``. out: exact ones, broadcast to them. The map is that of the repairs
    (:func:`diffsparse.kernels.repair.online.ridge_map`): ridge regression about the means, with a ridge of the mean of
    the diagonal of ``x^T x`` and none for the bias. What is left without a query is known without fitting again: its
    residual over one less its leverage (Golub, Heath and Wahba, Technometrics 1979, section 2). One query tells nothing
    about another: it keeps its error.
    """
    error = out - left
    count, dim = left.shape[-2:]
    if count < 2:
        return error.square().sum(-1)
    x = left - left.mean(-2, keepdim=True)
    wrong = error - error.mean(-2, keepdim=True)
    products = x.mT @ x
    ridge = products.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    ridge = ridge.masked_fill(ridge <= 0, 1.0)
    inverse = regularized_inverse(products / ridge, torch.finfo(left.dtype).eps)
    seen = x @ (inverse / ridge)
    residual = wrong - seen @ (x.mT @ wrong)
    leverage = (seen * x).sum(-1) + 1 / count
    # Never smaller than this, for the ridge is the mean of the diagonal; but for rounding.
    return residual.square().sum(-1) / (1 - leverage).clamp_min(1 / (count * (dim + 1))).square()
