"""Layouts and inputs that kernel tests share, and the error that a kernel may have."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffsparse.entry import Execution, HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.kernels import reference_attention
from diffsparse.kernels.backends.cpu.compiler import SWITCH
from diffsparse.kernels.backends.cpu.instructions import ISA_SWITCH, instruction_sets
from diffsparse.layout import BlockLayout, build_layout
from diffsparse.order import AxisOrder, CurveOrder, PhaseOrder, RasterOrder, TileOrder, TokenOrder

ORDERS: tuple[TokenOrder, ...] = (
    RasterOrder(),
    AxisOrder("HWF"),
    TileOrder(1, 8, 8),
    TileOrder(2, 8, 8),
    PhaseOrder("row"),
    CurveOrder(),
)


def head(order: TokenOrder | None = None, tail: str = "none", mode: str = "exact", numerics: str = "auto") -> HeadEntry:
    return HeadEntry(order=order or RasterOrder(), execution=Execution(mode=mode, tail=tail, numerics=numerics))


#: Every mode and tail, in the model's order and in others.
MIXED = (
    head(),
    head(tail="mean"),
    head(tail="moments"),
    head(tail="centroids"),
    head(mode="skip"),
    head(TileOrder(1, 8, 8)),
    head(AxisOrder("HWF"), "moments"),
    head(CurveOrder(), "mean"),
    head(TileOrder(1, 8, 8), "centroids"),
)


def random_layout(
    grid: TokenGrid,
    entries: Sequence[HeadEntry],
    block_size: int,
    density: float,
    seed: int = 0,
    diagonal: bool = False,
    packed: bool = False,
) -> BlockLayout:
    """Blocks kept at random, so that rows have lists of different lengths, some of them empty.

    ``diagonal`` keeps each block's own keys, so that no row is empty. ``packed``: bits instead of lists.
    """
    rng = np.random.default_rng(seed)
    before, after = (-(-n // block_size) for n in (grid.text_before, grid.text_after))
    masks = []
    for entry in entries:
        n = len(entry.order.starts(grid.visual_only(), block_size)) - 1 + before + after
        mask = rng.random((n, n)) < density
        masks.append(mask | np.eye(n, dtype=bool) if diagonal else mask)
    return build_layout(grid, entries, block_size, masks=masks, packed=packed)


def one_key_layout(grid: TokenGrid, heads: int, block_size: int) -> BlockLayout:
    """Every query of the video attends the first block of the text at the end, and nothing else."""
    n = -(-grid.num_visual // block_size) + -(-grid.text_after // block_size)
    mask = np.zeros((n, n), dtype=bool)
    mask[:, -(-grid.num_visual // block_size)] = True
    return build_layout(grid, [head()] * heads, block_size, masks=[mask] * heads)


def inputs(
    grid: TokenGrid, heads: int, dim: int, *, batch: int = 1, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[torch.Tensor]:
    """q, k, v ``[batch, seq, heads, dim]``, standard normal."""
    shape = (batch, grid.seq_len, heads, dim)
    return [torch.randn(shape, device=device).to(dtype) for _ in range(3)]


def rms(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def torch_error(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: BlockLayout) -> tuple[float, float]:
    """Error (rms, largest) of torch's own attention on the same kept pairs at the inputs' precision, against fp64.

    Heads' tails and modes are left out: only the pairs count. No row may be empty.
    """
    mask = torch.stack([layout.token_mask(h) for h in range(layout.num_heads)]).to(q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    low = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask)
    return rms(low - exact), float((low - exact).abs().max())


def assert_like_torch(
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: BlockLayout,
    kv_len: torch.Tensor | None = None,
) -> None:
    """The error against the fp64 oracle is at most twice that of torch's attention at the same precision."""
    want, want_lse = reference_attention(q, k, v, layout, kv_len=kv_len)
    assert out.dtype == q.dtype and out.shape == q.shape
    assert not bool(out.isnan().any())
    limit, largest = torch_error(q, k, v, layout)
    error = out.double() - want
    assert rms(error) <= 2 * limit + 1e-7, f"rms error {rms(error):.3g}, torch's {limit:.3g}"
    assert float(error.abs().max()) <= 2 * largest + 1e-6, (
        f"error {float(error.abs().max()):.3g}, torch's {largest:.3g}"
    )
    assert lse.dtype == torch.float32
    none = want_lse.isneginf()
    assert torch.equal(lse.isneginf(), none)
    # The sum is taken in fp32 from products that are exact in it; summaries pass through 11 bits (tf32).
    tolerance = 1e-5 if q.dtype == torch.float32 else 4e-3
    assert float((lse.double() - want_lse)[~none].abs().max()) <= tolerance


@functools.cache
def kernel_isas() -> tuple[str, ...]:
    """The instruction sets that the CPU's compiled kernel runs in on this machine, best first; empty: no C compiler."""
    return tuple(instruction_sets())


def use_kernel(monkeypatch: pytest.MonkeyPatch, isa: str | None = None) -> None:
    """Let calls run in the compiled kernel: for ``isa``, else for what the environment asks for, else for the best."""
    if not kernel_isas():
        pytest.skip(
            "there is no C compiler ($CC, cc, gcc or clang) to compile the kernel with; calls run through torch"
        )
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setenv(ISA_SWITCH, isa or os.environ.get(ISA_SWITCH) or kernel_isas()[0])


def with_wide_queries(q: torch.Tensor) -> torch.Tensor:
    """Some queries so long that their exponentials overflow, and, where no key is on their side, vanish.

    None of them is in the sample from which heads are told.
    """
    from diffsparse.kernels.backends.gluon_sm90 import wide  # needs Triton

    q, seq = q.clone(), q.shape[1]
    sampled = {i * seq // wide.SAMPLE for i in range(wide.SAMPLE)}
    q[:, [t for t in range(300, seq, 61) if t not in sampled]] *= 200
    return q
