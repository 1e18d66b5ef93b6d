"""One attention call as the backends see it: tensors, and constants that hold for a whole plan."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from diffsparse.blocks import BlockIndex
from diffsparse.entry import NUMERICS as NAMES
from diffsparse.entry import TAILS
from diffsparse.heads import NUMERICS, TAIL, HeadSpec
from diffsparse.kernels.select import pick_blocks
from diffsparse.layout import BlockLayout
from diffsparse.tokens import TokenLayout

__all__ = ["AttentionCall", "key_mask_of", "make_call"]


@dataclass(frozen=True)
class AttentionCall:
    """What one backend runs. ``B`` batch, ``S`` tokens, ``H`` heads, ``D`` head_dim.

    q, k, v: ``[B, S, H, D]``, last axis contiguous.
    tokens, heads: as in ``BlockLayout``.
    index: lists; for a backend they serve all items of the batch (see ``by_lists``). Behind them may be room.
    key_mask: bool ``[B, S]``, False where a (text) key takes no part; or None.
    scale: factor of the logits ``q . k``.
    numerics: ``auto``, each head's own, or another of ``entry.NUMERICS`` for all heads (see ``kinds``).
    packed: the packed index that the lists were made from, or None.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    tokens: TokenLayout
    index: BlockIndex
    heads: HeadSpec
    key_mask: torch.Tensor | None
    scale: float
    return_lse: bool
    numerics: str = "auto"
    packed: BlockIndex | None = None

    @property
    def has_tail(self) -> bool:
        """Whether any head may have a tail."""
        return self.heads.has_tail

    @property
    def block_size(self) -> int:
        """Tokens of a full block."""
        return self.tokens.block_size

    @property
    def num_blocks(self) -> int:
        """``N``, blocks of the order that has most."""
        return self.tokens.num_blocks

    @property
    def kinds(self) -> tuple[str, ...]:
        """Every numerics that heads may run in. The tail ``moments`` does not exist in 8 bits: see ``head_kinds``."""
        if self.numerics == "auto":
            return self.heads.numerics
        return ("auto", self.numerics) if self.has_tail else (self.numerics,)

    def head_kinds(self) -> torch.Tensor:
        """What each head runs in: int32 ``[H]``, index in ``entry.NUMERICS``."""
        tail, own = self.heads.table[:, TAIL], self.heads.table[:, NUMERICS]
        if len(self.kinds) == 1:
            return torch.full_like(own, NAMES.index(self.kinds[0]))
        if self.numerics != "auto":
            own = torch.full_like(own, NAMES.index(self.numerics))
        return own.masked_fill(tail == TAILS.index("moments"), 0)

    def by_lists(self) -> list[AttentionCall]:
        """The call as calls whose lists serve all their items: itself, or one for each item of the batch."""
        return [self] if self.index.batch == 1 else [self.item(b) for b in range(self.index.batch)]

    def item(self, b: int) -> AttentionCall:
        """The call of one item of the batch alone."""
        mask = None if self.key_mask is None else self.key_mask[b : b + 1]
        q, k, v = (x[b : b + 1] for x in (self.q, self.k, self.v))
        return replace(self, q=q, k=k, v=v, key_mask=mask, index=self.index.item(b))


def key_mask_of(kv_len: torch.Tensor | None, seq: int) -> torch.Tensor | None:
    """A key mask bool ``[B, S]`` from valid lengths int ``[B]``; a mask is returned as it is."""
    if kv_len is None or kv_len.dtype == torch.bool:
        return kv_len
    return torch.arange(seq, device=kv_len.device)[None, :] < kv_len[:, None]


def make_call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = None,
    kv_len: torch.Tensor | None = None,
    return_lse: bool = False,
    numerics: str = "auto",
) -> AttentionCall:
    """Put a layout and its tensors together; ``scale`` defaults to ``head_dim ** -0.5``. Packed ones are unpacked.

    Blocks that are to be picked from q and k are.
    """
    if layout.heads.picks is not None:
        layout = replace(layout, index=pick_blocks(layout, q, k, v, scale)[0])
    layout = layout.unpacked()
    return AttentionCall(
        q=q,
        k=k,
        v=v,
        tokens=layout.tokens,
        index=layout.index,
        heads=layout.heads,
        key_mask=key_mask_of(kv_len, q.shape[1]),
        scale=float(q.shape[-1] ** -0.5 if scale is None else scale),
        return_lse=return_lse,
        numerics=numerics,
    )
