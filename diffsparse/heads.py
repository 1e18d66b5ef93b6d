"""What each head of a call does with its blocks: whether it is skipped, its tail, its precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from diffsparse.entry import NUMERICS as NUMERICS_NAMES
from diffsparse.entry import HeadEntry
from diffsparse.online import OnlineRepair
from diffsparse.picks import Picks
from diffsparse.repair import HeadRepair
from diffsparse.tails import tail_code
from diffsparse.tokens import HeadSelection, TokenLayout, take_heads

__all__ = ["GATHERED", "NUMERICS", "SKIP", "TAIL", "HeadSpec", "describe_heads"]

SKIP, TAIL, NUMERICS, GATHERED = range(4)  # columns of HeadSpec.table


@dataclass(frozen=True, eq=False)
class HeadSpec:
    """Plain numbers by head, which kernels read on the device, so that layers with different heads share one graph.

    table: int32 ``[H, 4]``: skip (0 or 1), tail (``tails.tail_code``), numerics (index in ``entry.NUMERICS``),
        gathered (0 where the head's order is the model's own, 2 where it has short blocks inside the video, else 1).
    numerics, tails: those in use, ``none`` left aside of tails. Kept beside the table, so that it need not be read back
        from a device; a plan may set them to what holds for all its layers, so that compiled code sees one value.
    repair: what the heads' outputs are corrected by once they are computed, or None.
    picks: the heads whose blocks a rule picks from q and k, among those that the block lists hold; None where the lists
        are final.
    """

    table: torch.Tensor
    numerics: tuple[str, ...]
    tails: tuple[str, ...] = ()
    repair: HeadRepair | OnlineRepair | None = None
    picks: Picks | None = None

    @property
    def num_heads(self) -> int:
        """``H``."""
        return self.table.shape[0]

    @property
    def has_tail(self) -> bool:
        """Whether any head may have a tail."""
        return bool(self.tails)

    def to(self, device: torch.device | str) -> HeadSpec:
        """The same with its tensors on ``device``."""
        repair = None if self.repair is None else self.repair.to(device)
        picks = None if self.picks is None else self.picks.to(device)
        return replace(self, table=self.table.to(device), repair=repair, picks=picks)

    def heads(self, selection: HeadSelection) -> HeadSpec:
        """Some of the heads; what is kept beside the table stays."""
        repair = None if self.repair is None else self.repair.heads(selection)
        picks = None if self.picks is None else self.picks.heads(selection)
        return replace(self, table=take_heads(self.table, selection), repair=repair, picks=picks)

    def skipping(self, heads: torch.Tensor) -> HeadSpec:
        """The same, where these heads, bool ``[H]``, are skipped too."""
        table = self.table.clone()
        table[:, SKIP] = table[:, SKIP].masked_fill(heads.to(table.device), 1)
        return replace(self, table=table)


def describe_heads(entries: Sequence[HeadEntry], tokens: TokenLayout) -> HeadSpec:
    """The table of a layer's entries, one for each head of ``tokens``."""
    starts, text = tokens.block_start, tokens.text_before
    inside = [start[(start >= text) & (start <= text + tokens.num_visual)].unique() for start in starts]
    # The last block of the video may be short in every order; short ones before it are another matter.
    short = [bool((start.diff()[:-1] < tokens.block_size).any()) for start in inside]
    table = [
        [
            int(e.execution.mode == "skip"),
            tail_code(e.execution.tail),
            NUMERICS_NAMES.index(e.execution.numerics),
            0 if e.order.is_raster else 1 + short[o],
        ]
        for e, o in zip(entries, tokens.head_order.tolist())
    ]
    return HeadSpec(
        table=torch.tensor(table, dtype=torch.int32),
        numerics=tuple(n for n in NUMERICS_NAMES if any(e.execution.numerics == n for e in entries)),
        tails=tuple(sorted({e.execution.tail for e in entries} - {"none"})),
    )
