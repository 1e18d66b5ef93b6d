"""One attention call as the backends see it: tensors, and constants that hold for a whole plan."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffsparse.entry import NUMERICS as NAMES
from diffsparse.entry import TAILS
from diffsparse.layout import BlockLayout

__all__ = ["BACKENDS", "AttentionCall", "make_call"]

#: Every backend.
BACKENDS = ("gluon_sm90", "triton", "cpu", "reference")

SKIP, TAIL, NUMERICS, GATHERED = range(4)  # columns of BlockLayout.head_mode


@dataclass(frozen=True)
class AttentionCall:
    """What one backend runs. ``B`` batch, ``S`` tokens, ``H`` heads, ``D`` head_dim; the rest as in ``BlockLayout``.

    q, k, v: ``[B, S, H, D]``, last axis contiguous.
    key_mask: bool ``[B, S]``, False where a (text) key takes no part; or None.
    scale: factor of the logits ``q . k``.
    text_before, num_visual: tokens; the visual ones are positions ``text_before : text_before + num_visual``.
    numerics: ``auto``, each head's own, or another of ``entry.NUMERICS`` for all heads (see ``kinds``).
    head_numerics: those that heads have as their own.
    bits: of a packed layout its ``col_idx``; the call's own has the lists then, and room behind them.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    gather: torch.Tensor
    scatter: torch.Tensor
    block_start: torch.Tensor
    head_order: torch.Tensor
    row_ptr: torch.Tensor
    col_idx: torch.Tensor
    head_mode: torch.Tensor
    key_mask: torch.Tensor | None
    scale: float
    block_size: int
    text_before: int
    num_visual: int
    has_tail: bool
    needs_gather: bool
    return_lse: bool
    numerics: str = "auto"
    head_numerics: tuple[str, ...] = ("auto",)
    bits: torch.Tensor | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """Every numerics that heads may run in. The tail ``moments`` is not to be had in 8 bits: see ``head_kinds``."""
        if self.numerics == "auto":
            return self.head_numerics
        return ("auto", self.numerics) if self.has_tail else (self.numerics,)

    def head_kinds(self) -> torch.Tensor:
        """What each head runs in: int32 ``[H]``, index in ``entry.NUMERICS``."""
        tail, own = self.head_mode[:, TAIL], self.head_mode[:, NUMERICS]
        if len(self.kinds) == 1:
            return torch.full_like(own, NAMES.index(self.kinds[0]))
        if self.numerics != "auto":
            own = torch.full_like(own, NAMES.index(self.numerics))
        return own.masked_fill(tail == TAILS.index("moments"), 0)

    @property
    def num_blocks(self) -> int:
        """``N``, blocks of the order that has most."""
        return self.block_start.shape[1] - 1

    def visual_blocks(self, order: int) -> torch.Tensor:
        """Which blocks of an order hold visual tokens: bool ``[N]``."""
        start = self.block_start[order]
        inside = (start[:-1] >= self.text_before) & (start[:-1] < self.text_before + self.num_visual)
        return inside & (start.diff() > 0)


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
    """Put a layout and its tensors together; ``scale`` defaults to ``head_dim ** -0.5``. Packed ones are unpacked."""
    layout = layout.unpacked()
    return AttentionCall(
        q=q,
        k=k,
        v=v,
        gather=layout.gather,
        scatter=layout.scatter,
        block_start=layout.block_start,
        head_order=layout.head_order,
        row_ptr=layout.row_ptr,
        col_idx=layout.col_idx,
        head_mode=layout.head_mode,
        key_mask=key_mask_of(kv_len, q.shape[1]),
        scale=float(q.shape[-1] ** -0.5 if scale is None else scale),
        block_size=layout.block_size,
        text_before=layout.grid.text_before,
        num_visual=layout.grid.num_visual,
        has_tail=layout.has_tail,
        needs_gather=layout.needs_gather,
        return_lse=return_lse,
        numerics=numerics,
        head_numerics=layout.numerics,
    )
