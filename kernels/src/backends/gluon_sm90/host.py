"""The Hopper kernel's host side: what fits the device, what the kernel is handed, and how its passes are launched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from diffsparse.entry import NUMERICS
from diffsparse.kernels.backends.gluon_sm90.compat import tensor_descriptor
from diffsparse.kernels.backends.gluon_sm90.device import forward_kernel
from diffsparse.kernels.backends.gluon_sm90.prepare import head_kinds, reorder, tail_bias, work_list
from diffsparse.kernels.backends.gluon_sm90.quantize import empty_quantized, quantize
from diffsparse.kernels.backends.gluon_sm90.wide import mark_wide_heads
from diffsparse.kernels.backends.triton.prepare import summaries
from diffsparse.kernels.call import AttentionCall

__all__ = ["Config", "choose_config", "launch", "passes_of", "run"]

#: What copies of q, k and v in heads' own orders may take. As many heads as that is enough for run at a time.
COPY_BYTES = 512 << 20

#: Logits of a dense call (tokens squared, of all heads) from which on there are two passes. Of smaller calls a second
#: launch, and what comes before it, would take longer than the first saves.
TWO_PASSES = 1 << 30


@dataclass(frozen=True)
class Config:
    """How the kernel runs.

    stages: depth of the rings of keys and of values.  programs: how many share a multiprocessor.
    take_turns: of two consumers, let one multiply while the other works on its softmax (FlashAttention-3, section 3.1).
    registers: of a thread at entry, then of a consumer's and of the producer's once they have been dealt out again.
    """

    stages: int
    programs: int
    take_turns: bool
    registers: tuple[int, int, int]


def choose_config(block: int, head_dim: int, numerics: str = "auto") -> Config:
    """What fits into 227 KiB of shared memory and 64 Ki registers."""
    if block == 64:
        return Config(stages=2 if numerics == "auto" else 4, programs=2, take_turns=False, registers=(128, 208, 48))
    wide = head_dim > 64
    if numerics != "auto":
        registers = (168, 240, 24) if wide else (168, 232, 40)
        return Config(stages=4, programs=1, take_turns=False, registers=registers)
    return Config(stages=2 if wide else 4, programs=1, take_turns=wide, registers=(168, 240, 24))


def passes_of(q: torch.Tensor, numerics: str) -> tuple[int, ...]:
    """What heads that run in ``numerics`` take in a call with these queries ``[B, S, H, D]``: ``PASS`` by ``PASS``."""
    batch, seq, heads, _ = q.shape
    # fp16 has not the range for exponentials of logits as they are, nor has fp8 for probabilities.
    two = q.dtype == torch.bfloat16 and numerics == "auto" and batch * heads * seq * seq >= TWO_PASSES
    return (1, 2) if two else (0,)


def _boxes(x: torch.Tensor, rows: int, columns: int) -> Any:
    """A descriptor of ``[B, S, H, D]`` as ``[B, H, S, D]``, fetched in boxes of ``rows`` tokens of one head."""
    if x.data_ptr() % 16 or any(s * x.element_size() % 16 for s, n in zip(x.stride()[:3], x.shape[:3]) if n > 1):
        x = x.contiguous()  # TMA wants a base and strides in multiples of 16 bytes
    x = x.transpose(1, 2)
    # The stride of an axis of length 1 is arbitrary.
    strides = [s if n > 1 else 16 * x.shape[3] for s, n in zip(x.stride()[:3], x.shape[:3])] + [1]
    return tensor_descriptor(x, list(x.shape), strides, [1, 1, rows, columns])


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def run(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[B, S, H, D]`` in the inputs' dtype, log-sum-exp fp32 ``[B, S, H]`` (empty unless asked for)."""
    q = call.q
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3] if call.return_lse else (0,), dtype=torch.float32, device=q.device)
    means = None
    if call.has_tail:
        # Heads in orders of their own are summed up as they are put in order.
        means = summaries(call, head_kinds(call) if call.tokens.needs_gather else None)
    bias = tail_bias(call) if call.has_tail else call.tokens.gather
    for numerics in call.kinds:
        launch(call, numerics, choose_config(call.block_size, q.shape[3], numerics), out, lse, means, bias)
    return out, lse


def launch(
    call: AttentionCall,
    numerics: str,
    config: Config,
    out: torch.Tensor,
    lse: torch.Tensor,
    means: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    bias: torch.Tensor,
    warmup: bool = False,
) -> Any:
    """Run the heads that are in ``numerics``, with a given configuration, into ``out`` and ``lse``.

    ``means``: block summaries, where heads have tails, and ``bias`` their weights. With ``warmup`` only compile, and
    return what was compiled.
    """
    q, k, v = call.q, call.k, call.v
    batch, seq, heads, dim = q.shape
    n, block = call.num_blocks, call.block_size
    columns = triton.next_power_of_2(dim)
    consumers = block // 64
    eight = numerics != "auto"
    # Where a call has no heads in other orders, no tails, no mask, no scales, something stands in that is never read.
    scales = [call.tokens.gather] * 4
    if eight:
        small = empty_quantized(call, numerics) if warmup else quantize(call, numerics, means and means[:2])
        boxes = [_boxes(small.q, 64, dim), _boxes(small.k, block, dim), _boxes(small.v, dim, block)]
        scales = [small.q_scale, small.k_scale, small.v_scale, small.v_mean]
    else:
        boxes = [_boxes(x, r, columns) for x, r in zip((q, k, v), (64, block, block))]
    moved = summed = [None] * 3
    group = heads
    copies: list[torch.Tensor] = []
    if call.tokens.needs_gather and not eight:
        most = max(1, COPY_BYTES // (3 * batch * seq * dim * q.element_size()))
        # As many groups as it takes, and all alike.
        group = -(-heads // -(-heads // most))
        copies = [q.new_empty(batch, group, seq, dim) for _ in range(3)]
        moved = [_boxes(x.transpose(1, 2), r, columns) for x, r in zip(copies, (64, block, block))]
    if means is not None and not eight:
        # Both means of all blocks of a head are one run of rows.
        mean_k, mean_v, var_k = means
        runs = [x.reshape(1, batch * heads, -1, dim).transpose(1, 2) for x in (mean_k, var_k, mean_v)]
        summed = [_boxes(x, block, columns) for x in runs]
    args = [*boxes, *moved, *summed, out, lse if call.return_lse else out, call.tokens.gather]
    args += [call.tokens.gather if call.key_mask is None else call.key_mask.view(torch.uint8), bias, *scales]
    work = work_list(call, group, numerics)
    entry, consumer, producer = config.registers
    constants = dict(
        HEADS=heads,
        TEXT_BEFORE=call.tokens.text_blocks[0],
        D=columns,
        HEAD_DIM=dim,
        BLOCK=block,
        CONSUMERS=consumers,
        STAGES=config.stages,
        HAS_MASK=call.key_mask is not None,
        HAS_TAIL=call.has_tail,
        GATHER=call.tokens.needs_gather,
        RETURN_LSE=call.return_lse,
        TAKE_TURNS=config.take_turns and consumers == 2,
        SHARED=block == 128 and not call.has_tail,
        NUMERICS=NUMERICS.index(numerics),
        CONSUMER_REGS=consumer,
        PRODUCER_REGS=producer,
        num_warps=4,
        maxnreg=entry,
    )
    passes = passes_of(q, numerics)
    two = len(passes) > 1
    for first_head in range(0, heads, group):
        tiles = min(group, heads - first_head) * n
        ours = work[first_head * n : first_head * n + tiles]
        marked = torch.zeros(1 + 2 * batch * tiles, dtype=torch.int32, device=q.device) if two else ours
        rest = [ours, marked, call.index.col_idx, call.tokens.block_start, call.scale, seq, batch * tiles, tiles, n]
        rest += [call.tokens.text_before, call.tokens.text_before + call.tokens.num_visual]
        if warmup:
            return [forward_kernel.warmup(*args, *rest, grid=(1,), **constants, PASS=each) for each in passes]
        if copies:
            reorder(call, copies, first_head, tiles // n, means)
        if two:
            mark_wide_heads(call, ours, marked, tiles)
        programs = min(batch * tiles, _multiprocessors(q.device) * config.programs)
        for each in passes:
            forward_kernel[(programs,)](*args, *rest, **constants, PASS=each)
    if eight and call.return_lse:
        # The mean key that was taken off shifts all logits of a row.
        shift = torch.einsum("bshd,bhd->bsh", q.float(), small.k_mean) * call.scale
        lse += shift.where(head_kinds(call) == NUMERICS.index(numerics), 0.0)
    return None
