"""Which heads' logits are too wide for exponentials as they are: seen from a few of them, so that no head is attended
twice for it."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from diffsparse.kernels.call import AttentionCall

__all__ = ["mark_wide_heads"]

#: Tokens of a head, evenly spaced, whose queries and keys are multiplied.
SAMPLE = 128
#: The largest of those logits, to base 2, up to which a head is taken for narrow. Sums may reach 2^80.
WIDE = 48.0


@triton.jit
def _mark_wide_kernel(
    q, k, records, marked, factor, wide, seq, tiles, num_blocks, total_tiles,
    q_batch, q_seq, q_head, k_batch, k_seq, k_head,
    DIM: tl.constexpr, D: tl.constexpr, SAMPLE: tl.constexpr,
):  # fmt: skip
    rank = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    h = tl.load(records + rank * num_blocks * 8 + 6)
    token = (tl.arange(0, SAMPLE) * seq // SAMPLE).to(tl.int64)[:, None]
    channel = tl.arange(0, D)[None, :]
    real = channel < DIM
    some_q = tl.load(q + b * q_batch + token * q_seq + h * q_head + channel, mask=real, other=0.0)
    some_k = tl.load(k + b * k_batch + token * k_seq + h * k_head + channel, mask=real, other=0.0)
    # In fp32: Triton's interpreter multiplies bf16 by its bits.
    logits = tl.dot(some_q.to(tl.float32), tl.trans(some_k.to(tl.float32))) * factor
    if tl.max(tl.max(tl.abs(logits), 1), 0) > wide:
        first = b.to(tl.int32) * tiles + rank * num_blocks
        at = tl.atomic_add(marked, num_blocks)
        for i in range(0, num_blocks, SAMPLE):
            tile = i + tl.arange(0, SAMPLE)
            tl.store(marked + 1 + at + tile, first + tile, mask=tile < num_blocks)
            tl.store(marked + 1 + total_tiles + first + tile, tl.full([SAMPLE], 1, tl.int32), mask=tile < num_blocks)


def mark_wide_heads(
    call: AttentionCall, records: torch.Tensor, marked: torch.Tensor, tiles: int, warmup: bool = False
) -> Any:
    """Mark all tiles of heads that have wide logits, which then are attended in the second pass only.

    ``records``: those of the work list (`prepare.work_list`) of heads that run together, ``tiles`` in all for
    each item of the batch. ``marked``: see `parts.mark`.
    """
    batch, seq, _, dim = call.q.shape
    n = call.num_blocks
    args = [call.q, call.k, records, marked, call.scale * 1.4426950408889634, WIDE, seq, tiles, n, batch * tiles]
    args += [*call.q.stride()[:3], *call.k.stride()[:3]]
    constants = dict(DIM=dim, D=triton.next_power_of_2(dim), SAMPLE=SAMPLE, num_warps=8)
    if warmup:
        return _mark_wide_kernel.warmup(*args, grid=(1,), **constants)
    _mark_wide_kernel[(tiles // n, batch)](*args, **constants)
    return None
