"""One head's keys, values and their summaries as blocks that rows of the CPU backend fetch from."""

from __future__ import annotations

import math

import torch

from diffsparse.kernels.backends.cpu.rows import HeadRows
from diffsparse.kernels.call import AttentionCall
from diffsparse.kernels.summaries import summarize, summarize_halves

__all__ = ["Workspace", "fill_table"]


class Workspace:
    """Buffers that are used again: fresh memory costs a page fault for every 4 kB."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, name: str, *shape: int) -> torch.Tensor:
        size = math.prod(shape)
        held = self._buffers.get(name)
        if held is None or held.numel() < size:
            held = self._buffers[name] = torch.empty(size, dtype=torch.float32)
        return held[:size].view(shape)

    @property
    def nbytes(self) -> int:
        """Memory of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())


def fill_table(
    call: AttentionCall, head: HeadRows, b: int, h: int, space: Workspace
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Keys and values as fp32 blocks ``[N + 1 + summary blocks, block * D]``, and the variances ``[N, D]`` of keys.

    Block ``N`` is padding; the rows of the summary blocks are means, ``num_summaries`` of them.
    """
    n, block, dim = call.num_blocks, call.block_size, call.q.shape[3]
    total = n + 1 - (-head.num_summaries // block)
    tables = []
    for name, x in (("keys", call.k[b, :, h]), ("values", call.v[b, :, h])):
        table = space.take(name, total * block, dim)
        tokens = table[: n * block]
        if head.in_place:
            tokens.copy_(x)
        elif x.dtype == tokens.dtype:
            torch.index_select(x, 0, head.key_token, out=tokens)
        else:
            tokens.copy_(x.index_select(0, head.key_token))
        if not head.all_valid:
            tokens.masked_fill_(~head.valid[:, None], 0.0)
        table[n * block :] = 0.0
        tables.append(table)
    variance = None
    if head.tail_bias is not None:
        key_blocks, value_blocks = (t[: n * block].view(n, block, dim) for t in tables)
        if head.tail == "centroids":
            mean_k, mean_v = (x.flatten(0, 1) for x in summarize_halves(key_blocks, value_blocks, head.length))
        else:
            moments = head.tail == "moments"
            mean_k, mean_v, variance = summarize(key_blocks, value_blocks, head.length, moments=moments)
        for table, mean in zip(tables, (mean_k, mean_v)):
            table[(n + 1) * block : (n + 1) * block + head.num_summaries] = mean
    keys, values = (t.view(total, block * dim) for t in tables)
    return keys, values, variance
