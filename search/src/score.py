"""What each block of an attention call is worth: the error that dropping it makes, for every kind of tail.

For a query q with softmax weights p, output o and a dropped block J of n keys, the output changes to first order by

    d_J = sum_c w_c (m_c - o) - sum_{k in J} p_k (v_k - o)

where the tail gives the block's summaries, with values m_c, the weights w_c (none without a tail). The score of a
block pair is the sum of ``||d_J||^2`` over the queries of the query block, estimated from a few sampled queries. Values
are first taken through the head's slice of the output projection, so scores of different heads are in the same units.

Scores of blocks add up only while little is dropped: what many blocks leave out points the same way, and the softmax is
normalised over less. So the true error of masks of a few sizes is measured beside their summed scores; their ratio
corrects a sum of scores where it is used.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from diffsparse.entry import TAILS
from diffsparse.grid import TokenGrid
from diffsparse.kernels.summaries import half_lengths, summarize, summarize_halves
from diffsparse.order import TokenOrder

__all__ = ["LADDER", "BlockIndex", "CallScores", "projection_roots", "score_call"]

# Kept shares of every query block's key blocks at which the true error is measured.
LADDER = (0.0, 0.02, 0.06, 0.15, 0.35, 0.7)

# Logits of one chunk of sampled queries against all keys are held at once, in fp32.
CHUNK_BYTES = 128 * 2**20


@dataclass(frozen=True)
class BlockIndex:
    """An order's visual blocks as padded gather indices. ``NB`` blocks of at most ``n`` tokens.

    ``tokens``: int64 ``[NB, n]``, indices into the whole sequence (padding repeats the block's first token).
    ``valid``: bool ``[NB, n]``. ``length``: fp32 ``[NB]``. ``text``: int64 ``[T]``, the text tokens.
    """

    tokens: torch.Tensor
    valid: torch.Tensor
    length: torch.Tensor
    text: torch.Tensor

    @classmethod
    def build(cls, grid: TokenGrid, order: TokenOrder, block_size: int, device: torch.device) -> BlockIndex:
        """Index the visual blocks of ``order`` on ``grid``."""
        blocks = order.partition(grid, block_size)
        width = int(blocks.lengths.max())
        position = blocks.start[:-1, None] + np.arange(width)
        valid = np.arange(width) < blocks.lengths[:, None]
        tokens = grid.text_before + blocks.permutation[np.where(valid, position, blocks.start[:-1, None])]
        after = grid.text_before + grid.num_visual
        text = np.concatenate([np.arange(grid.text_before), np.arange(after, grid.seq_len)])
        return cls(
            torch.from_numpy(tokens).to(device),
            torch.from_numpy(valid).to(device),
            torch.from_numpy(blocks.lengths.astype(np.float32)).to(device),
            torch.from_numpy(text).to(device),
        )


@dataclass(frozen=True)
class CallScores:
    """Scores of one attention call. ``H`` heads, ``NB`` visual blocks.

    ``error``: fp32 ``[tails, H, NB, NB]`` (tails in the order of ``entry.TAILS``): squared output error over a query
    block's tokens when a key block is dropped.
    ``mass``: fp32 ``[H, NB, NB]``: attention mass per query, mean over the query block.
    ``energy``: fp32 ``[H]``: squared norm of the head's output over all queries, in the same units. Those of text are
    among them: whatever is dropped they see every key, but a head that is left out has no output for them either.
    ``summed``, ``true``: fp32 ``[tails, H, len(LADDER)]``: with the best key blocks of every query block kept, the sum
    of the dropped blocks' scores and the error that dropping them all really makes.
    """

    error: torch.Tensor
    mass: torch.Tensor
    energy: torch.Tensor
    summed: torch.Tensor
    true: torch.Tensor


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
) -> CallScores:
    """Score all visual block pairs of one call from ``samples`` queries of every query block.

    q, k, v: ``[B, S, H, D]``. Items of the batch share the samples (each has at least one), and scores are the mean
    over them. ``key_mask``: bool ``[B, S]``, or ``[S]`` for all items, False where a key is padding. ``heads``: score
    these heads only. Nothing of the size ``S x S`` is ever held, and nothing that grows with ``B``.
    """
    heads = list(range(q.shape[2])) if heads is None else heads
    batch, blocks = q.shape[0], len(index.length)
    error = torch.zeros(len(TAILS), len(heads), blocks, blocks, device=q.device)
    mass = torch.zeros(len(heads), blocks, blocks, device=q.device)
    energy = torch.zeros(len(heads), device=q.device)
    summed = torch.zeros(len(TAILS), len(heads), len(LADDER), device=q.device)
    found = CallScores(error, mass, energy, summed, torch.zeros_like(summed))
    masks = None if key_mask is None else torch.atleast_2d(key_mask).expand(batch, -1)
    for item in range(batch):
        _add_item(
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
        )
    # Guidance makes u + s (c - u) of a prompt's output c and the negative one's u: the errors of both pass into it,
    # times s and s - 1. These weights are nearly alike for the usual scales, and how much of a layer's error passes on
    # is measured afterwards; so both items count the same, with their errors as they are.
    for part in (found.error, found.mass, found.energy, found.summed, found.true):
        part /= batch
    return found


def _add_item(
    found: CallScores,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    index: BlockIndex,
    *,
    scale: float,
    roots: torch.Tensor | None,
    samples: int,
    generator: torch.Generator | None,
    key_mask: torch.Tensor | None,
    heads: list[int],
) -> None:
    """Add the scores of one item of a batch; q, k, v: ``[S, H, D]``, ``key_mask``: ``[S]``."""
    dim = q.shape[-1]
    blocks, width = index.tokens.shape
    samples = min(samples, width)
    # The same positions for all heads of a call; a short block samples with repetition.
    pick = (torch.rand(blocks, samples, generator=generator) * index.length.cpu()[:, None]).long().to(q.device)
    query_tokens = index.tokens.gather(1, pick)
    flat = index.tokens.reshape(-1)
    length = index.length
    text, text_share = _sample_text(index, samples, width, key_mask, generator)
    counts = torch.tensor([round(f * blocks) for f in LADDER], device=q.device)
    rows = max(1, CHUNK_BYTES // (4 * samples * max(q.shape[0], blocks * dim)))
    for i, head in enumerate(heads):
        keys, values = k[:, head].float(), v[:, head].float()
        if roots is not None:
            values = values @ roots[head]
        block_keys = keys[flat].view(blocks, width, dim)
        block_values = values[flat].view(blocks, width, dim) * index.valid[..., None]
        inside = index.valid[..., None].float()
        block_keys = block_keys * inside
        mean_key, mean_value, variance = summarize(block_keys, block_values, length, moments=True)
        assert variance is not None
        half_keys, half_values = summarize_halves(block_keys, block_values, length)
        summary = (mean_value, *half_values)
        for lo in range(0, blocks, rows):
            tokens = query_tokens[lo : lo + rows]
            queries = q[tokens.reshape(-1), head].float() * scale
            logits = queries @ keys.T
            if key_mask is not None:
                logits.masked_fill_(~key_mask, float("-inf"))
            lse = logits.logsumexp(-1, keepdim=True)
            weights = (logits - lse).exp_()
            output = weights @ values
            part = weights[:, flat].view(-1, blocks, width) * index.valid
            z = part.sum(-1)
            numerator = torch.bmm(part.transpose(0, 1), block_values).transpose(0, 1)  # [queries, NB, D]
            o_norm = output.square().sum(1, keepdim=True)
            n_norm = numerator.square().sum(-1)
            n_o = torch.bmm(numerator, output[:, :, None])[..., 0]
            n_m = [torch.einsum("qbd,bd->qb", numerator, m) for m in summary]
            o_m = [output @ m.T for m in summary]
            first = (queries @ mean_key.T - lse).exp() * length
            second = first * (0.5 * (queries.square() @ variance.T)).clamp_max(30.0).exp()
            halves = [(queries @ x.T - lse).exp() * n for x, n in zip(half_keys, half_lengths(length), strict=True)]
            # In the order of entry.TAILS: weights, each with the place of its value in the summary.
            tails: list[list[tuple[torch.Tensor, int]]] = [[], [(first, 0)], [(second, 0)], [*zip(halves, (1, 2))]]
            share = length[lo : lo + rows] / samples
            # What text tokens add, which are never dropped; without text nothing but rounding errors is left over.
            z_rest = 1 - z.sum(1)
            z_rest = torch.where(z_rest > 1e-5, z_rest, 0.0)
            rest = torch.where(z_rest[:, None] > 0, output - numerator.sum(1), 0.0)
            for tail, parts in enumerate(tails):
                more = sum((w for w, _ in parts), -z)
                d = n_norm - 2 * more * (sum((w * o_m[c] for w, c in parts), -n_o)) + more.square() * o_norm
                for w, c in parts:
                    d = d - 2 * w * n_m[c]
                    for other, e in parts:
                        d = d + w * other * (summary[c] * summary[e]).sum(1)
                d = d.clamp_min(0).view(len(tokens), samples, blocks).sum(1)
                found.error[tail, i, lo : lo + rows] += d * share[:, None]
                # [rows, ladder, NB]: the first blocks of each row's ranking
                kept = d.argsort(1, descending=True).argsort(1)[:, None] < counts[:, None]
                weighted = [(w, summary[c]) for w, c in parts]
                left = _masked_output(kept.repeat_interleave(samples, 0).float(), z, numerator, weighted, z_rest, rest)
                off = (left - output[:, None]).square().sum(-1).view(len(tokens), samples, -1).sum(1)
                found.true[tail, i] += (off * share[:, None]).sum(0)
                found.summed[tail, i] += ((d[:, None] * ~kept).sum(-1) * share[:, None]).sum(0)
            found.mass[i, lo : lo + rows] += z.view(len(tokens), samples, blocks).mean(1)
            found.energy[i] += (o_norm.view(len(tokens), samples).sum(1) * share).sum()
        for part in text.split(rows * samples):
            logits = (q[part, head].float() * scale) @ keys.T
            if key_mask is not None:
                logits.masked_fill_(~key_mask, float("-inf"))
            found.energy[i] += text_share * (logits.softmax(-1) @ values).square().sum()


def _sample_text(
    index: BlockIndex, samples: int, width: int, key_mask: torch.Tensor | None, generator: torch.Generator | None
) -> tuple[torch.Tensor, float]:
    """Text queries, ``samples`` for every ``width`` of them, padding left out; and how many each stands for."""
    text = index.text if key_mask is None else index.text[key_mask[index.text]]
    count = min(len(text), samples * -(-len(text) // width))
    pick = torch.randperm(len(text), generator=generator)[:count].to(text.device)
    return text[pick], len(text) / max(1, count)


def _masked_output(
    kept: torch.Tensor,
    z: torch.Tensor,
    numerator: torch.Tensor,
    tail: list[tuple[torch.Tensor, torch.Tensor]],
    z_rest: torch.Tensor,
    rest: torch.Tensor,
) -> torch.Tensor:
    """Output of queries under several masks: ``[queries, masks, D]`` for ``kept [queries, masks, NB]``.

    ``tail``: weights ``[queries, NB]`` and values ``[NB, D]`` of the blocks' summaries.
    """
    value = torch.bmm(kept, numerator) + rest[:, None]
    weight = torch.bmm(kept, z[..., None])[..., 0] + z_rest[:, None]
    for summary_weight, summary_value in tail:
        dropped = (1 - kept) * summary_weight[:, None]
        value = value + dropped @ summary_value
        weight = weight + dropped.sum(-1)
    # A query without any key has the output zero.
    return torch.where(weight[..., None] > 1e-12, value / weight.clamp_min(1e-12)[..., None], 0.0)
