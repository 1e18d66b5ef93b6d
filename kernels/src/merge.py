"""Joining partial attention results by their log-sum-exp."""

from __future__ import annotations

import torch

__all__ = ["merge_attention"]


def merge_attention(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each.

    out_a, out_b: ``[..., D]``; lse_a, lse_b: ``[...]``, natural logarithm, -inf where a side attended nothing.
    Returns the merged output in ``out_a``'s dtype and its log-sum-exp in fp32 (fp64 where given so).
    """
    lse = torch.logaddexp(lse_a, lse_b)
    # -inf - -inf is NaN: where neither side attended anything both weights are 0.
    shift = torch.where(lse.isneginf(), torch.zeros_like(lse), lse)
    weight_a, weight_b = torch.exp(lse_a - shift), torch.exp(lse_b - shift)
    merged = out_a.to(lse.dtype) * weight_a[..., None] + out_b.to(lse.dtype) * weight_b[..., None]
    return merged.to(out_a.dtype), lse
