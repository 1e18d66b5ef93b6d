"""The Triton kernel's host side: tiles for a device, what the kernel is handed, and its launches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from diffsparse.kernels.backends.triton.device import forward_kernel
from diffsparse.kernels.backends.triton.prepare import kept_bits, summaries, variance_dtype
from diffsparse.kernels.call import AttentionCall

__all__ = ["Config", "choose_config", "launch", "run", "some_partial"]


@dataclass(frozen=True)
class Config:
    """Tile sizes (queries, keys, summaries) and how the kernel is compiled; ``tma``: feed it by tensor descriptors."""

    block_m: int
    block_n: int
    block_t: int
    warps: int
    stages: int
    tma: bool


def choose_config(
    block: int,
    head_dim: int,
    dtype: torch.dtype,
    tail: bool,
    capability: tuple[int, int],
    shared: int,
    partial: bool,
    gathered: bool = False,
) -> Config:
    """Tiles for a logical block size, by what fits into ``shared`` bytes of a multiprocessor's shared memory.

    ``partial``: whether some block may be short or masked, so that there is a second loop. ``gathered``: for the heads
    in other orders than the model's.
    """
    dim = triton.next_power_of_2(head_dim)
    tma = capability >= (9, 0) and dtype != torch.float32
    if dtype == torch.float32:
        # Full-precision products run on the ordinary units: registers, not shared memory, are the limit.
        return Config(32, 32, 32, 4, 1, False)
    if shared < 160 << 10:
        if dim > 128:
            return Config(32, 32, 16, 4, 1, tma)
        small = shared < 96 << 10 and dim > 64
        return Config(64, 32 if small else 64, 16 if small else 32, 4, 1 if small else 2, tma)
    if dim > 128:
        return Config(64, 64 if shared >= 200 << 10 else 32, 16, 8, 2, tma)
    # Measured on an H200 at head_dim 128, density 0.25. Two stages of 64 keys leave room for a second program on each
    # multiprocessor, which gains more than a third stage; with a tail the registers of four warps do not suffice.
    if tail and block == 128:
        return Config(128, 128, 64, 8, 2, tma)
    if capability[0] == 9 and block == 128:
        if dim == 64 and not gathered:
            return Config(128, 64, 32, 8, 3, tma)
        if dim == 128 and (partial or gathered) and shared >= 226 << 10:
            # With a second loop, or with addresses to work out, the registers of four warps do not suffice.
            return Config(128, 128, 32, 8, 3, tma)
    return Config(block, 64, 32, 4, 2 if block == 128 and dim == 128 else 3, tma)


def _descriptor(x: torch.Tensor, rows: int) -> Any:
    """A TMA descriptor of ``[B, S, H, D]`` as ``[B, H, S, D]`` with tiles of ``rows`` tokens of one head, or None.

    TMA wants a base and strides in multiples of 16 bytes; Triton wants tiles whose sides are powers of two.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    batch, seq, heads, dim = x.shape
    strides = [x.stride(0), x.stride(2), x.stride(1), 1]
    size = x.element_size()
    # The stride of an axis of length 1 is arbitrary.
    strides = [s if n > 1 else dim * max(1, 16 // size) for s, n in zip(strides, (batch, heads, seq))] + [1]
    if dim != triton.next_power_of_2(dim) or x.data_ptr() % 16 or any(s * size % 16 for s in strides[:3]):
        return None
    return TensorDescriptor(x, [batch, heads, seq, dim], strides, [1, 1, rows, dim])


def _device_limits(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and bytes of shared memory that one program may use; ``(0, 0)`` and 64 KiB where unknown."""
    if device.type != "cuda" or torch.version.hip:
        return (0, 0), 64 << 10
    props: Any = torch.cuda.get_device_properties(device)
    return (props.major, props.minor), props.shared_memory_per_block_optin


def run(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[B, S, H, D]`` in the inputs' dtype, log-sum-exp fp32 ``[B, S, H]`` (empty unless asked for)."""
    about = (call.block_size, call.q.shape[3], call.q.dtype, call.has_tail, *_device_limits(call.q.device))
    partial = some_partial(call)
    return launch(call, choose_config(*about, partial), choose_config(*about, partial, gathered=True))


def some_partial(call: AttentionCall) -> bool:
    """Whether a block of a head in the model's order may be short or masked."""
    tokens = call.tokens
    segments = (tokens.text_before, tokens.num_visual, tokens.text_after)
    return call.key_mask is not None or any(tokens % call.block_size for tokens in segments)


def launch(call: AttentionCall, config: Config, of_gathered: Config | None = None, warmup: bool = False) -> Any:
    """Run with given tiles, heads in other orders than the model's with tiles ``of_gathered`` (None: with the same).

    With ``warmup`` only compile, and return the compiled kernels.
    """
    q, k, v = call.q, call.k, call.v
    batch, seq, heads, dim = q.shape
    n, block = call.num_blocks, call.block_size
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, seq, heads) if call.return_lse else (0,), dtype=torch.float32, device=q.device)
    mean_k = mean_v = var_k = bits = None
    if call.has_tail and not warmup:
        mean_k, mean_v, var_k = summaries(call)
        bits = kept_bits(call)
    elif call.has_tail:
        mean_k = mean_v = torch.empty(16, dtype=q.dtype)
        var_k = torch.empty(16, dtype=variance_dtype(q.dtype))
        bits = torch.empty(16, dtype=torch.int32)
    descs: list[Any] = [None, None, None]
    if config.tma:
        descs = [_descriptor(x, r) for x, r in ((q, config.block_m), (k, config.block_n), (v, config.block_n))]
    tma = all(d is not None for d in descs)
    mask = None if call.key_mask is None else call.key_mask.view(torch.uint8)
    partial = some_partial(call)
    text_blocks_before, text_blocks_after = call.tokens.text_blocks
    compiled = []
    for gathered in (False, True) if call.tokens.needs_gather else (False,):
        use_tma = tma and not gathered
        if gathered and of_gathered is not None:
            config = of_gathered
        args = [q, k, v, *(descs if use_tma else (None, None, None)), out, lse if call.return_lse else None]
        args += [
            call.tokens.gather,
            call.tokens.block_start,
            call.tokens.head_order,
            call.index.row_ptr,
            call.index.col_idx,
            call.heads.table,
            mask,
        ]
        args += [mean_k, mean_v, var_k, bits, call.scale, seq, n, -(-n // 32)]
        args += [call.tokens.text_before, call.tokens.text_before + call.tokens.num_visual]
        for x in (q, k, v):
            args += [x.stride(0), x.stride(1), x.stride(2)]
        constants = dict(
            HEADS=heads,
            TEXT_BLOCKS_BEFORE=text_blocks_before,
            TEXT_BLOCKS_AFTER=text_blocks_after,
            # Whether a gathered order has ragged tiles is known on the device only.
            SOME_PARTIAL=partial or gathered,
            D=dim,
            BLOCK_D=triton.next_power_of_2(dim),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_T=config.block_t,
            BLOCK=block,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            HAS_MASK=mask is not None,
            HAS_TAIL=call.has_tail,
            GATHER=gathered,
            TMA=use_tma,
            RETURN_LSE=call.return_lse,
            num_warps=config.warps,
            num_stages=config.stages,
        )
        grid = (n * (block // config.block_m), heads, batch)
        if warmup:
            compiled.append(forward_kernel.warmup(*args, grid=grid, **constants))
        else:
            forward_kernel[grid](*args, **constants)
    return compiled if warmup else (out, lse)
