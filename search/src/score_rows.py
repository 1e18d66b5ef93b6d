"""Scores of a call's blocks by kernels: two passes of the sampled queries over the keys, for many heads at once."""

from __future__ import annotations

import torch

from diffsparse.entry import TAILS
from diffsparse.kernels.rows import attend_rows, block_errors, plain
from diffsparse.search.leave_one_out import repaired_error
from diffsparse.search.scored import CHUNK_BYTES, LADDER, BlockIndex, CallScores, sample_queries, sample_text

__all__ = ["add_item"]

#: Sampled queries of a head for which true errors of masks are measured: a ratio, which so many give well enough.
_LADDER_ROWS = 128
#: What the heads take that are scored together, at most; and of the memory that the model itself takes, at most.
_GROUP_BYTES, _GROUP_SHARE = 10 * CHUNK_BYTES, 0.11


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
    """As :func:`diffsparse.search.score_plain.add_item`, on a GPU."""
    (_, _, dim), (blocks, width) = q.shape, index.tokens.shape
    samples = min(samples, width)
    tokens = sample_queries(index, samples, generator)
    text, text_share = sample_text(index, samples, width, key_mask, generator)
    mask = None if key_mask is None else key_mask[None]
    chosen = _ladder_blocks(blocks, samples, q.device)
    # What grows with the heads of a group, in fp32: blocks of keys and values, the kernel's output, the ladder's sums.
    rows = blocks * samples
    each = 4 * (4 * blocks * width * dim + 11 * rows * blocks)
    if ladder:
        each += 4 * len(chosen) * samples * (blocks * dim + q.shape[0])
    count = max(1, _group_bytes(q.device) // each)
    for first in range(0, len(heads), count):
        group = torch.tensor(heads[first : first + count], device=q.device)
        queries, keys, values = (x.index_select(1, group) for x in (q, k, v))
        values, unit = _projected(values, None if roots is None else roots[group])
        out, lse = attend_rows(queries[None], keys[None], values[None], tokens.reshape(-1), scale, mask)
        some = _Group(
            q=queries[tokens.reshape(-1)].transpose(0, 1).contiguous(),
            k=keys[index.tokens.reshape(-1)].unflatten(0, index.tokens.shape).permute(2, 0, 1, 3).contiguous(),
            v=values[index.tokens.reshape(-1)].unflatten(0, index.tokens.shape).permute(2, 0, 1, 3).contiguous(),
            out=out[0].transpose(0, 1).contiguous(),
            lse=lse[0].T.contiguous(),
            index=index,
            scale=scale,
        )
        at = slice(first, first + len(group))
        some.add(found, at, samples, chosen if ladder else None, unit.square())
        if len(text):
            of_text, _ = attend_rows(queries[None], keys[None], values[None], text, scale, mask)
            found.energy[at] += text_share * of_text[0].square().sum((0, 2)) * unit.square()


def _group_bytes(device: torch.device) -> int:
    """What a group of heads may take: a search should fit where the model does."""
    if device.type != "cuda":
        return _GROUP_BYTES
    return min(_GROUP_BYTES, int(_GROUP_SHARE * torch.cuda.max_memory_allocated(device)))


def _ladder_blocks(blocks: int, samples: int, device: torch.device) -> torch.Tensor:
    """Query blocks, spread evenly, whose samples are enough for the true errors; all of a small call."""
    count = min(blocks, -(-_LADDER_ROWS // samples))
    return torch.linspace(0, blocks - 1, count, device=device).round().long()


def _projected(values: torch.Tensor, roots: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Values ``[S, H, D]`` through the roots of their heads' projections, and the unit ``[H]`` that they are in.

    In units of the largest weight, so that half precision has range for them.
    """
    if roots is None:
        return values, torch.ones(values.shape[1], device=values.device)
    unit = roots.abs().amax((1, 2)).clamp_min(1e-30)
    turned = torch.bmm(values.transpose(0, 1).float(), roots / unit[:, None, None])
    return turned.to(values.dtype).transpose(0, 1).contiguous(), unit


class _Group:
    """Some heads of an item: sampled queries, all keys and values, and what dense attention gives the queries.

    q, out: ``[H, R, D]``; k, v: ``[H, N, W, D]``, by blocks; lse: ``[H, R]``.
    """

    def __init__(
        self,
        *,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        index: BlockIndex,
        scale: float,
    ) -> None:
        self.q, self.k, self.v, self.out, self.lse, self.index, self.scale = q, k, v, out, lse, index, scale
        self.length = index.length.long()
        self.known = plain.summaries_of(k, v, self.length)

    def add(self, found: CallScores, at: slice, samples: int, chosen: torch.Tensor | None, unit: torch.Tensor) -> None:
        """Into the results' heads ``at``; ``unit`` ``[H]``: of squared values. ``chosen``: blocks of the ladder."""
        heads, blocks = self.q.shape[0], len(self.length)
        shape = (heads, blocks, blocks, samples)
        error, mass = block_errors(self.q, self.k, self.v, self.length, self.out, self.lse, self.known, self.scale)
        share = self.index.length / samples
        by_block = error.view(-1, *shape).sum(-1).transpose(2, 3)  # [tails, H, query blocks, key blocks]
        found.error[:, at] += by_block * (share[:, None] * unit[:, None, None])
        found.mass[at] += mass.view(shape).mean(-1).transpose(1, 2)
        norm = self.out.square().sum(2).view(heads, blocks, samples).sum(2)
        found.energy[at] += (norm * share).sum(1) * unit
        if chosen is None:
            return
        # The chosen blocks stand for all.
        stands = share[chosen] * (self.index.length.sum() / self.index.length[chosen].sum())
        summed, true, repaired = self._ladder(by_block[:, :, chosen], chosen, samples, stands)
        found.summed[:, at] += summed * unit[:, None]
        found.true[:, at] += true * unit[:, None]
        found.repaired[:, at] += repaired * unit[:, None]

    def _ladder(
        self, error: torch.Tensor, chosen: torch.Tensor, samples: int, share: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Summed, true and repaired errors of masks, ``[tails, H, len(LADDER)]`` each.

        ``error`` ``[tails, H, chosen, blocks]``.
        """
        heads, (blocks, width) = self.q.shape[0], self.index.tokens.shape
        rows = (chosen[:, None] * samples + torch.arange(samples, device=chosen.device)).reshape(-1)
        q, lse, out = self.q[:, rows].float(), self.lse[:, rows], self.out[:, rows]
        part = (torch.bmm(q * self.scale, self.k.flatten(1, 2).float().mT) - lse[..., None]).exp_()
        part = part.view(heads, len(rows), blocks, width) * self.index.valid
        z = part.sum(-1)
        numerator = torch.einsum("hrnw,hnwd->hrnd", part, self.v.float())
        z_rest = 1 - z.sum(2)
        z_rest = torch.where(z_rest > 1e-5, z_rest, 0.0)
        rest = torch.where(z_rest[..., None] > 0, out - numerator.sum(2), 0.0)
        weights = plain.tail_weights(self.q[:, rows], lse, self.length, self.known, self.scale).transpose(2, 3)
        mean, moments, first, second = weights
        # In the order of entry.TAILS: weights, each with its place among the means of values.
        tails: list[list[tuple[torch.Tensor, int]]] = [[], [(mean, 0)], [(moments, 0)], [(first, 1), (second, 2)]]
        counts = torch.tensor([round(f * blocks) for f in LADDER], device=q.device)
        summed = torch.empty(len(TAILS), heads, len(LADDER), device=q.device)
        true, repaired = torch.empty_like(summed), torch.empty_like(summed)
        stands = share.repeat_interleave(samples)
        for tail, parts in enumerate(tails):
            d = error[tail]
            kept = d.argsort(2, descending=True).argsort(2)[:, :, None] < counts[:, None]  # [H, chosen, ladder, blocks]
            summed[tail] = ((d[:, :, None] * ~kept).sum(-1) * share[:, None]).sum(1)
            keep = kept.repeat_interleave(samples, 1).float()
            value = keep @ numerator + rest[:, :, None]
            weight = (keep @ z[..., None])[..., 0] + z_rest[..., None]
            for w, place in parts:
                dropped = (1 - keep) * w[:, :, None]
                value += dropped @ self.known.values[place][:, None]
                weight += dropped.sum(-1)
            # A query without any key has the output zero.
            left = torch.where(weight[..., None] > 1e-12, value / weight.clamp_min(1e-12)[..., None], 0.0)
            left = left.transpose(1, 2)  # [H, ladder, queries, D]
            true[tail] = (left - out[:, None]).square().sum(-1) @ stands
            repaired[tail] = torch.minimum(repaired_error(left, out[:, None]) @ stands, true[tail])
        return summed, true, repaired
