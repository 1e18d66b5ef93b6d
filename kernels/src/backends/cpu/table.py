"""One head's keys, values and their summaries as blocks that rows of the CPU backend fetch from."""

from __future__ import annotations

import math

import torch

from diffsparse.kernels.backends.cpu.rows import HeadRows
from diffsparse.kernels.call import AttentionCall
from diffsparse.kernels.summaries import summarize, summarize_halves

__all__ = ["Workspace", "blocks_and_summaries", "fill_table"]

# Blocks of 16 bits that are widened at once to be summed up.
_WIDENED = 32

Summaries = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


class Workspace:
    """Buffers that are used again: fresh memory costs a page fault for every 4 kB."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        size = math.prod(shape)
        held = self._buffers.get((name, dtype))
        if held is None or held.numel() < size:
            held = self._buffers[name, dtype] = torch.empty(size, dtype=dtype)
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
        _fill_blocks(table[: n * block], x, head)
        table[n * block :] = 0.0
        tables.append(table)
    variance = None
    if head.tail_bias is not None:
        key_blocks, value_blocks = (t[: n * block].view(n, block, dim) for t in tables)
        mean_k, mean_v, variance = _summaries(key_blocks, value_blocks, head)
        for table, mean in zip(tables, (mean_k, mean_v)):
            table[(n + 1) * block : (n + 1) * block + head.num_summaries] = mean
    keys, values = (t.view(total, block * dim) for t in tables)
    return keys, values, variance


def blocks_and_summaries(
    call: AttentionCall, head: HeadRows, b: int, h: int, space: Workspace
) -> tuple[torch.Tensor | None, ...]:
    """Keys and values as blocks ``[N, block, D]`` in their own type; mean keys and values fp32 ``[M, D]`` and the
    variances ``[N, D]`` of keys, each None where there is none."""
    n, block, dim = call.num_blocks, call.block_size, call.q.shape[3]
    tables = []
    for name, x in (("keys", call.k[b, :, h]), ("values", call.v[b, :, h])):
        table = space.take(name, n * block, dim, dtype=x.dtype)
        _fill_blocks(table, x, head)
        tables.append(table.view(n, block, dim))
    if head.tail_bias is None:
        return (*tables, None, None, None)
    return (*tables, *_summaries(tables[0], tables[1], head))


def _fill_blocks(blocks: torch.Tensor, x: torch.Tensor, head: HeadRows) -> None:
    """What each position ``[N * block, D]`` has of ``x`` ``[S, D]``, zero where there is no token."""
    if head.in_place:
        blocks.copy_(x)
    elif x.dtype == blocks.dtype:
        torch.index_select(x, 0, head.key_token, out=blocks)
    else:
        blocks.copy_(x.index_select(0, head.key_token))
    if not head.all_valid:
        blocks.masked_fill_(~head.valid[:, None], 0.0)


def _summaries(keys: torch.Tensor, values: torch.Tensor, head: HeadRows) -> Summaries:
    """Mean keys and values ``[M, D]`` of blocks ``[N, block, D]``, and the variances of keys for the tail ``moments``.

    In fp32; what is not is widened a few blocks at a time.
    """
    step = len(keys) if keys.dtype == torch.float32 else _WIDENED
    means: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    variances = []
    for i in range(0, len(keys), step):
        k, v, length = keys[i : i + step].float(), values[i : i + step].float(), head.length[i : i + step]
        mean_k, mean_v, variance = _summaries_fp32(k, v, length, head.tail)
        means[0].append(mean_k)
        means[1].append(mean_v)
        if variance is not None:
            variances.append(variance)
    # All first halves come before all second ones.
    mean_k, mean_v = (torch.cat(parts, -2).flatten(0, -2) for parts in means)
    return mean_k, mean_v, torch.cat(variances) if variances else None


def _summaries_fp32(keys: torch.Tensor, values: torch.Tensor, length: torch.Tensor, tail: str) -> Summaries:
    if tail == "centroids":
        return (*summarize_halves(keys, values, length), None)
    return summarize(keys, values, length, moments=tail == "moments")
