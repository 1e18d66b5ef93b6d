"""What each block of an attention call is worth: the error that dropping it makes, for every kind of tail.

For a query q with softmax weights p, output o and a dropped block J of n keys, the output changes to first order by

    d_J = sum_c w_c (m_c - o) - sum_{k in J} p_k (v_k - o)

where the tail gives the block's summaries, with values m_c, the weights w_c (none without a tail). The score of a
block pair is the sum of ``||d_J||^2`` over the queries of the query block, estimated from a few sampled queries. Values
are first taken through the head's slice of the output projection, so scores of different heads are in the same units.

Scores of blocks add up only while little is dropped: what many blocks leave out points the same way, and the softmax is
normalised over less. So the true error of masks of a few sizes is measured beside their summed scores; their ratio
corrects a sum of scores where it is used. A plan's repair takes away a part of that error, another one for every mask
and head, which is estimated from the same queries.
"""

from __future__ import annotations

import torch

from diffsparse.entry import TAILS
from diffsparse.kernels.rows import no_rows_kernel
from diffsparse.search import score_plain, score_rows
from diffsparse.search.scored import LADDER, BlockIndex, CallScores

__all__ = ["LADDER", "BlockIndex", "CallScores", "projection_roots", "score_call"]


def projection_roots(weight: torch.Tensor | None, heads: int, head_dim: int, device: torch.device) -> torch.Tensor:
    """Square roots of each head's output projection: fp32 ``[H, D, D]`` with ``||x R_h|| = ||x W_h^T||``.

    ``weight``: ``[features, H * D]`` of the output projection, or None for the identity.
    """
    if weight is None or weight.shape[-1] != heads * head_dim:
        return torch.eye(head_dim, device=device).expand(heads, head_dim, head_dim).contiguous()
    per_head = weight.detach().to(device, torch.float32).reshape(-1, heads, head_dim)
    gram = torch.einsum("ohd,ohe->hde", per_head, per_head)
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.clamp_min(0).sqrt()[:, None]


@torch.no_grad()
def score_call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    index: BlockIndex,
    *,
    scale: float | None = None,
    roots: torch.Tensor | None = None,
    samples: int = 4,
    generator: torch.Generator | None = None,
    key_mask: torch.Tensor | None = None,
    heads: list[int] | None = None,
    ladder: bool = True,
) -> CallScores:
    """Score all visual block pairs of one call from ``samples`` queries of every query block.

    q, k, v: ``[B, S, H, D]``. Items of the batch share the samples (each has at least one), and scores are the mean
    over them. ``key_mask``: bool ``[B, S]``, or ``[S]`` for all items, False where a key is padding. ``heads``: score
    these heads only. ``ladder``: measure the true errors of masks too, and what a repair leaves of them; else these and
    their sums are 0. Nothing of the
    size ``S x S`` is ever held, and nothing that grows with ``B``.
    """
    heads = list(range(q.shape[2])) if heads is None else heads
    batch, blocks = q.shape[0], len(index.length)
    error = torch.zeros(len(TAILS), len(heads), blocks, blocks, device=q.device)
    mass = torch.zeros(len(heads), blocks, blocks, device=q.device)
    energy = torch.zeros(len(heads), device=q.device)
    summed = torch.zeros(len(TAILS), len(heads), len(LADDER), device=q.device)
    found = CallScores(error, mass, energy, summed, torch.zeros_like(summed), torch.zeros_like(summed))
    # Kernels and torch draw alike, and add up the same.
    add_item = score_plain.add_item if no_rows_kernel(q) is not None else score_rows.add_item
    masks = None if key_mask is None else torch.atleast_2d(key_mask).expand(batch, -1)
    for item in range(batch):
        add_item(
            found,
            q[item],
            k[item],
            v[item],
            index,
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            roots=roots,
            samples=-(-samples // batch),
            generator=generator,
            key_mask=None if masks is None else masks[item],
            heads=heads,
            ladder=ladder,
        )
    # Guidance makes u + s (c - u) of a prompt's output c and the negative one's u: the errors of both pass into it,
    # times s and s - 1. These weights are nearly alike for the usual scales, and how much of a layer's error passes on
    # is measured afterwards; so both items count the same, with their errors as they are.
    for part in (found.error, found.mass, found.energy, found.summed, found.true, found.repaired):
        part /= batch
    return found
