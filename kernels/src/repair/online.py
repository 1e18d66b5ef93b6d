"""The online repair of a call (``diffsparse.online``): exact rows, fit and product, without waiting for a device."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from diffsparse.kernels.call import AttentionCall
from diffsparse.kernels.repair.offline import mend_
from diffsparse.kernels.rows import attend_rows, no_rows_kernel
from diffsparse.online import OnlineRepair
from diffsparse.repair import HeadRepair

__all__ = ["exact_rows", "mend_online_", "regularized_inverse", "ridge_map"]


def mend_online_(out: torch.Tensor, call: AttentionCall, online: OnlineRepair) -> torch.Tensor:
    """Correct the visual tokens of a call's output ``[B, S, H, D]`` in place; returns ``out``.

    Each item and head gets a map of its own, so that no item depends on the others. The fit is in fp32 (fp64 for fp64).
    """
    tokens = call.tokens
    places = online.places(tokens.text_before, tokens.num_visual, out.device)
    exact = exact_rows(call.q, call.k, call.v, places, call.scale, call.key_mask)
    fit_in = torch.float64 if out.dtype == torch.float64 else torch.float32
    x = out.index_select(1, places).transpose(1, 2).to(fit_in)
    weight, bias = ridge_map(x, exact.transpose(1, 2).to(fit_in) - x)
    used = torch.ones(out.shape[2], dtype=torch.bool, device=out.device)
    mend_(out, HeadRepair(weight, bias, used), tokens.text_before, tokens.num_visual)
    return out.index_copy_(1, places, exact.to(out.dtype))


def exact_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor,
    scale: float | None,
    key_mask: torch.Tensor | None,
) -> torch.Tensor:
    """Dense attention of some queries: ``[B, R, H, D]`` of q, k, v ``[B, S, H, D]``, for ``rows`` int64 ``[R]``.

    key_mask: bool ``[B, S]``, False where a key takes no part. It adds up in fp32: by a kernel whose programs share the
    keys, since so few queries leave most of a GPU idle (its results are fp32), or by torch's attention.
    """
    if no_rows_kernel(q) is None and all(x.stride(3) == 1 for x in (q, k, v)):
        scale = q.shape[3] ** -0.5 if scale is None else scale
        return attend_rows(q, k, v, rows, scale, key_mask)[0]
    q, k, v = (x.transpose(1, 2) for x in (q.index_select(1, rows), k, v))
    mask = None if key_mask is None else key_mask[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def ridge_map(x: torch.Tensor, error: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The affine map from ``x`` to ``error``, ``[..., R, D]`` each: weight ``[..., D, D]`` and bias ``[..., D]``.

    Ridge regression about the means, with a ridge of the mean of the diagonal of ``x^T x``; the bias has none. A head
    whose outputs are all alike gets a bias alone. It is solved in fp64 (fp32 where a device has none), so that it is as
    exact where products of fp32 may be rounded to TF32.
    """
    dim = x.shape[-1]
    mean_x, mean_e = x.mean(-2, keepdim=True), error.mean(-2, keepdim=True)
    x, error = x - mean_x, error - mean_e
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    products, both = (x.mT @ x).to(wide), (x.mT @ error).to(wide)
    ridge = products.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    ridge = ridge.masked_fill(ridge <= 0, 1.0)  # torch.where would copy its number to the device, and wait
    weight = (regularized_inverse(products / ridge, torch.finfo(x.dtype).eps) @ (both / ridge)).to(x.dtype)
    return weight, (mean_e - mean_x @ weight).view(*x.shape[:-2], dim)


def regularized_inverse(products: torch.Tensor, eps: float) -> torch.Tensor:
    """``(products + 1)^-1``, ``[..., D, D]``, to ``eps``, where the diagonal of ``products`` has a mean of at most 1.

    Eigenvalues are between 1 and ``D + 1``, then, so that Newton's iteration converges from a constant, in a number of
    steps that is known. It is products alone: decompositions on a GPU may wait for it, and cannot all be captured.
    """
    dim = products.shape[-1]
    one = torch.eye(dim, dtype=products.dtype, device=products.device)
    matrix = products + one
    found = (2 / (dim + 2) * one).expand_as(matrix)
    # The error D / (D + 2), about exp(-2 / (D + 1)), is squared by every step, until it is less than eps.
    for _ in range(math.ceil(math.log2(-math.log(eps) * (dim + 1) / 2))):
        found = found @ (2 * one - matrix @ found)
    return found
