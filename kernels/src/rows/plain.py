"""What the kernels of this folder compute, in plain torch: where no kernel runs, and what they are tested against."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffsparse.kernels.summaries import half_lengths, summarize, summarize_halves

__all__ = ["Summaries", "attend_rows", "block_errors", "summaries_of", "tail_weights"]

#: Logits of queries against all keys that are held at once.
_CHUNK_BYTES = 128 * 2**20
#: The most that a block's second cumulant may add to a logit, here as in the search's scores.
_MOST = 30.0


@dataclass(frozen=True)
class Summaries:
    """Of every block of keys, fp32: means of keys ``[3, H, N, D]`` and of values, of the whole block and of its two
    halves, and the variance of its keys ``[H, N, D]``."""

    keys: torch.Tensor
    values: torch.Tensor
    variance: torch.Tensor


def summaries_of(k: torch.Tensor, v: torch.Tensor, length: torch.Tensor) -> Summaries:
    """Of keys and values ``[H, N, W, D]`` of blocks, as in :func:`block_errors`."""
    heads, blocks, width, dim = k.shape
    inside = (torch.arange(width, device=k.device) < length[:, None])[..., None]
    keys, values = (x.float() * inside for x in (k, v))
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    every = length.repeat(heads)
    mean_k, mean_v, variance = summarize(keys, values, every, moments=True)
    assert variance is not None
    half_k, half_v = summarize_halves(keys, values, every)
    shape = (-1, heads, blocks, dim)
    return Summaries(
        torch.cat([mean_k[None], half_k]).view(shape),
        torch.cat([mean_v[None], half_v]).view(shape),
        variance.view(heads, blocks, dim),
    )


def tail_weights(
    q: torch.Tensor, lse: torch.Tensor, length: torch.Tensor, summaries: Summaries, scale: float
) -> torch.Tensor:
    """What a tail's summaries weigh in a softmax, fp32 ``[4, H, N, R]``: the mean, the mean with the second cumulant,
    and the two halves."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    queries = (q.to(wide) * scale).mT
    logits = summaries.keys.to(wide) @ queries - lse[:, None]
    counts = torch.cat([length[None], half_lengths(length)]).to(wide)
    mean, first, second = logits.exp() * counts[:, None, :, None]
    cumulant = (0.5 * (summaries.variance.to(wide) @ queries.square())).clamp_max(_MOST)
    return torch.stack([mean, mean * cumulant.exp(), first, second])


def attend_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor,
    scale: float,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`diffsparse.kernels.rows.attend_rows`."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, seq, heads, dim = k.shape
    out = torch.empty(batch, len(rows), heads, dim, dtype=wide, device=q.device)
    lse = torch.empty(batch, len(rows), heads, dtype=wide, device=q.device)
    step = max(1, _CHUNK_BYTES // (4 * seq))
    for b in range(batch):
        for h in range(heads):
            keys, values = k[b, :, h].to(wide), v[b, :, h].to(wide)
            for first in range(0, len(rows), step):
                logits = (q[b, rows[first : first + step], h].to(wide) * scale) @ keys.T
                if key_mask is not None:
                    logits.masked_fill_(~key_mask[b], float("-inf"))
                total = logits.logsumexp(1)
                weights = (logits - total.nan_to_num(neginf=0.0)[:, None]).exp_()
                out[b, first : first + step, h] = weights @ values
                lse[b, first : first + step, h] = total
    return out, lse


def block_errors(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    length: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    summaries: Summaries,
    weights: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`diffsparse.kernels.rows.block_errors`; ``weights``: :func:`tail_weights`."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    heads, rows, _ = q.shape
    blocks = len(length)
    error = torch.empty(len(weights), heads, blocks, rows, dtype=wide, device=q.device)
    mass = torch.empty(heads, blocks, rows, dtype=wide, device=q.device)
    for j in range(blocks):
        keys, values = (x[:, j, : int(length[j])].to(wide) for x in (k, v))
        part = ((q.to(wide) * scale) @ keys.mT - lse[..., None]).exp()
        z = mass[:, j] = part.sum(-1)
        computed = part @ values
        mean, moments, first, second = weights[:, :, j].to(wide)[..., None]
        whole, low, high = summaries.values[:, :, j].to(wide)[:, :, None]
        for tail, (stands, weight) in enumerate(
            (
                (0.0, torch.zeros_like(mean)),
                (mean * whole, mean),
                (moments * whole, moments),
                (first * low + second * high, first + second),
            )
        ):
            # To first order: what comes in its place, less what is left out, each by its distance from the output.
            change = stands - weight * out - (computed - z[..., None] * out)
            error[tail, :, j] = change.square().sum(-1)
    return error, mass
