"""The blocks that a layer's online selections pick for one call: group by group of heads, and put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from diffsparse.blocks import BlockIndex, pack_bits, unpack_bits, with_text
from diffsparse.density import tail_density
from diffsparse.kernels.select.available import no_blocks_kernel
from diffsparse.kernels.select.rules import MEANS, budget_mask, rule_mask, rule_scores
from diffsparse.layout import BlockLayout
from diffsparse.online import OnlineRepair
from diffsparse.picks import PickGroup
from diffsparse.tokens import TokenLayout

__all__ = ["Picked", "assemble", "pick_blocks", "pick_group"]

# Numbers that a rule works on at a time, of heads together. At 75,600 tokens a head has 10 million.
_AT_A_TIME = 2**26


@dataclass(frozen=True, eq=False)
class Picked:
    """What was picked for a group of ``n`` heads.

    bits: uint8 ``[B, n, N, ceil(N / 8)]``, as ``pack_bits`` makes them, text included. counts: int32 ``[B, n, N]``,
    kept blocks of each row. kept: fp32 ``[n]``, pairs of tokens in them over all pairs, mean over the batch.
    """

    bits: torch.Tensor
    counts: torch.Tensor
    kept: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Memory of the tensors."""
        return self.bits.nbytes + self.counts.nbytes + self.kept.nbytes


def pick_group(
    layout: BlockLayout,
    group: PickGroup,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    within: Picked | None = None,
) -> Picked:
    """Ask a group's rule for one call, ``[B, S, H, D]``. Reads nothing back from the device.

    within: what was picked for the group before, of which alone it may pick now.
    """
    rule, count = group.selection, len(group.numbers)
    together = int(rule.values.get("together", 1))
    each = q.shape[0] * layout.num_blocks**2
    if rule.rule not in MEANS or no_blocks_kernel(q, int(rule.values.get("parts", 1))) is not None:
        # It copies queries and keys.
        each = max(each, q.shape[0] * q.shape[1] * q.shape[3])
    step = max(1, _AT_A_TIME // (each * together)) * together
    parts = [_Part(layout, group, i, min(i + step, count)) for i in range(0, count, step)]
    if rule.budget.over_heads:
        scores = [rule_scores(rule.rule, *part.inputs(q, k, v), scale, rule.values) for part in parts]
        whole = _Part(layout, group, 0, count)
        family = whole.family(within)
        return whole.picked(budget_mask(torch.cat(scores, dim=1), whole.tokens, rule.budget, family), family)
    found = []
    for part in parts:
        inputs, family = part.inputs(q, k, v), part.family(within)
        mask = rule_mask(rule.rule, *inputs, rule.budget, scale, rule.values, family)
        mask = mask.expand(q.shape[0], *mask.shape[1:])  # a rule may give lists that serve all items
        found.append(part.picked(mask, family))
    return Picked(
        torch.cat([part.bits for part in found], dim=1),
        torch.cat([part.counts for part in found], dim=1),
        torch.cat([part.kept for part in found]),
    )


@dataclass(frozen=True, eq=False)
class _Part:
    """The heads ``first`` to ``end`` of a group: as many as a rule works on at a time."""

    layout: BlockLayout
    group: PickGroup
    first: int
    end: int

    @property
    def places(self) -> torch.Tensor:
        return self.group.places[self.first : self.end]

    @property
    def tokens(self) -> TokenLayout:
        tokens = self.layout.tokens
        return replace(tokens, head_order=tokens.head_order.index_select(0, self.places))

    def inputs(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, TokenLayout]:
        """What the rule reads of a call. Heads that lie one behind another are not copied."""
        numbers = self.group.numbers[self.first : self.end]
        low = numbers[0]
        if numbers == tuple(range(low, low + len(numbers))):
            q, k, v = (x.narrow(2, low, len(numbers)) for x in (q, k, v))
        else:
            q, k, v = (x.index_select(2, self.places) for x in (q, k, v))
        return q, k, v, self.tokens

    def family(self, within: Picked | None) -> torch.Tensor:
        """The pairs that may be kept: bool ``[B or 1, n, N, N]``."""
        mask = _masks(self.layout.index, self.places)
        if within is not None:
            mask = mask & unpack_bits(within.bits[:, self.first : self.end], self.layout.num_blocks)
        return mask

    def picked(self, mask: torch.Tensor, family: torch.Tensor) -> Picked:
        """The result for a rule's mask and its family, bool ``[B, n, N, N]``."""
        tokens = self.tokens
        mask = with_text(mask & family, tokens)
        lengths = tokens.lengths()[tokens.head_order.long()].float()  # [n, N]
        pairs = (mask.float() @ lengths[None, :, :, None]).squeeze(-1)  # [B, n, N], keys of each row
        kept = (pairs * lengths).sum(-1).mean(0) / float(tokens.seq_len) ** 2
        return Picked(pack_bits(mask), mask.sum(-1, dtype=torch.int32), kept)


def _masks(index: BlockIndex, places: torch.Tensor) -> torch.Tensor:
    """The kept blocks of some heads: bool ``[B, n, N, N]``."""
    n = index.num_blocks
    if index.is_packed:
        return unpack_bits(index.col_idx.view(index.batch, -1, n, index.col_idx.shape[-1]).index_select(1, places), n)
    return index.mask().index_select(1, places)


def assemble(layout: BlockLayout, picked: Mapping[PickGroup, Picked]) -> tuple[BlockIndex, torch.Tensor]:
    """The layout's blocks with those that were picked in their place, packed; and the density of the call, fp32 ``[]``.

    picked: of every group of ``layout.heads.picks``, for one batch. The density counts tails and an online repair.
    """
    index, n, heads = layout.index, layout.num_blocks, layout.num_heads
    bits = index.col_idx if index.is_packed else pack_bits(index.mask())
    bits = bits.reshape(index.batch, heads, n, -1)
    counts = index.row_ptr.diff(dim=1).view(index.batch, heads, n)
    batch = max([index.batch, *(found.bits.shape[0] for found in picked.values())])
    bits, counts = (x.expand(batch, *x.shape[1:]).clone() for x in (bits, counts))
    online = {h for group in picked for h in group.numbers}
    done = torch.zeros((), device=bits.device) + sum(d for h, d in enumerate(layout.densities) if h not in online)
    repair = layout.heads.repair
    rows = repair.density(layout.grid) if isinstance(repair, OnlineRepair) else 0.0
    for group, found in picked.items():
        bits.index_copy_(1, group.places, found.bits)
        counts.index_copy_(1, group.places, found.counts)
        more = rows + tail_density(group.tail, n, layout.seq_len)
        done = done + (found.kept + more).clamp(max=1.0).sum()
    row_ptr = torch.nn.functional.pad(counts.flatten(1).cumsum(1, dtype=torch.int32), (1, 0))
    return BlockIndex(row_ptr, bits.flatten(1, 2), n), done / heads


def pick_blocks(
    layout: BlockLayout, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None
) -> tuple[BlockIndex, torch.Tensor]:
    """Ask all rules of a layout for one call: :func:`assemble` of :func:`pick_group` of every group."""
    assert layout.heads.picks is not None
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    groups = layout.heads.picks.groups
    return assemble(layout, {group: pick_group(layout, group, q, k, v, scale) for group in groups})
