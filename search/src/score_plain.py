"""Scores of a call's blocks in plain torch: what the kernels' scores are tested against, and the way on a CPU."""

from __future__ import annotations

import torch

from diffsparse.entry import TAILS
from diffsparse.kernels.summaries import half_lengths, summarize, summarize_halves
from diffsparse.search.leave_one_out import repaired_error
from diffsparse.search.scored import CHUNK_BYTES, LADDER, BlockIndex, CallScores, sample_queries, sample_text

__all__ = ["add_item"]


def add_item(
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
    ladder: bool,
) -> None:
    """Add the scores of one item of a batch; q, k, v: ``[S, H, D]``, ``key_mask``: ``[S]``."""
    dim = q.shape[-1]
    blocks, width = index.tokens.shape
    samples = min(samples, width)
    query_tokens = sample_queries(index, samples, generator)
    flat = index.tokens.reshape(-1)
    length = index.length
    text, text_share = sample_text(index, samples, width, key_mask, generator)
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
        outputs: list[torch.Tensor] = []
        masked: list[list[torch.Tensor]] = [[] for _ in TAILS]
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
            outputs.append(output)
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
                if not ladder:
                    continue
                # [rows, ladder, NB]: the first blocks of each row's ranking
                kept = d.argsort(1, descending=True).argsort(1)[:, None] < counts[:, None]
                weighted = [(w, summary[c]) for w, c in parts]
                left = _masked_output(kept.repeat_interleave(samples, 0).float(), z, numerator, weighted, z_rest, rest)
                found.summed[tail, i] += ((d[:, None] * ~kept).sum(-1) * share[:, None]).sum(0)
                masked[tail].append(left)
            found.mass[i, lo : lo + rows] += z.view(len(tokens), samples, blocks).mean(1)
            found.energy[i] += (o_norm.view(len(tokens), samples).sum(1) * share).sum()
        if ladder:
            every, stands = torch.cat(outputs), (length / samples).repeat_interleave(samples)
            for tail, parts_of in enumerate(masked):
                left = torch.cat(parts_of).transpose(0, 1)  # [ladder, queries, D]
                true = (every - left).square().sum(-1) @ stands
                found.true[tail, i] += true
                found.repaired[tail, i] += torch.minimum(repaired_error(left, every) @ stands, true)
        for part in text.split(rows * samples):
            logits = (q[part, head].float() * scale) @ keys.T
            if key_mask is not None:
                logits.masked_fill_(~key_mask, float("-inf"))
            found.energy[i] += text_share * (logits.softmax(-1) @ values).square().sum()


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
