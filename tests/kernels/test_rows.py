"""A few queries against all keys: plain torch against its definition, and the kernels without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from diffsparse.kernels.rows import attend_rows, block_errors, no_rows_kernel, plain
from tests.kernels.apart import check_cases, fitting
from tests.tolerance import ATTENTION, assert_near


@pytest.mark.parametrize("masked", [False, True])
def test_rows_are_those_of_dense_attention(masked: bool) -> None:
    q, k, v = (torch.randn(2, 90, 3, 24) for _ in range(3))
    rows = torch.tensor([0, 89, 7, 7])
    mask = torch.arange(90).repeat(2, 1) < torch.tensor([[60], [90]]) if masked else None
    out, lse = attend_rows(q, k, v, rows, 0.3, mask)
    heads = [x.transpose(1, 2) for x in (q[:, rows], k, v)]
    among = None if mask is None else mask[:, None, None]
    want = F.scaled_dot_product_attention(*heads, attn_mask=among, scale=0.3).transpose(1, 2)
    logits = torch.einsum("brhd,bshd->brhs", q[:, rows], k) * 0.3
    if mask is not None:
        logits.masked_fill_(~mask[:, None, None], float("-inf"))
    assert_near(out, want, ATTENTION)
    assert_near(lse, logits.logsumexp(-1), ATTENTION)


def test_a_row_without_keys_is_zero() -> None:
    q, k, v = (torch.randn(1, 8, 1, 16) for _ in range(3))
    out, lse = attend_rows(q, k, v, torch.tensor([3]), 1.0, torch.zeros(1, 8, dtype=torch.bool))
    assert not out.any() and lse.item() == float("-inf")


def test_a_block_that_is_all_there_is_costs_the_output() -> None:
    """Without a tail nothing is left of it; a block of equal keys and values is its mean and costs nothing with one."""
    q = torch.randn(2, 5, 16)
    one = torch.randn(2, 1, 16)
    k, v = one.expand(2, 12, 16).contiguous(), one.flip(0).expand(2, 12, 16).contiguous()
    length = torch.tensor([12])
    out, lse = (x[0].transpose(0, 1) for x in attend_rows(_full(q, 12), *_whole(k, v), torch.arange(5), 1.0))
    blocks = k[:, None], v[:, None]
    error, mass = block_errors(q, *blocks, length, out, lse, plain.summaries_of(*blocks, length), 1.0)
    assert_near(mass, torch.ones_like(mass), ATTENTION)
    assert error.max() < 1e-9  # to first order: every value is the output
    k[:, 6:] += 1.0
    v[:, 6:] += 1.0
    out, lse = (x[0].transpose(0, 1) for x in attend_rows(_full(q, 12), *_whole(k, v), torch.arange(5), 1.0))
    error, _ = block_errors(q, *blocks, length, out, lse, plain.summaries_of(*blocks, length), 1.0)
    none, mean, _, halves = error
    assert none.max() < 1e-9 and (mean > 1e-6).all(), "the mean of two groups weighs too little"
    assert halves.max() < 1e-8, "two halves of equal keys are exact"


def _whole(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.transpose(0, 1)[None] for x in tensors]


def _full(q: torch.Tensor, seq: int) -> torch.Tensor:
    """Queries ``[H, R, D]`` as the first of a sequence, ``[1, seq, H, D]``."""
    return F.pad(q, (0, 0, 0, seq - q.shape[1])).transpose(0, 1)[None]


def test_what_the_kernels_do_not_take() -> None:
    assert "GPU" in str(no_rows_kernel(torch.empty(1, 64, dtype=torch.float16)))


def test_interpreted(repo_root: Path) -> None:
    pytest.importorskip("triton")
    check_cases(repo_root, 12, "tests.kernels.rows")


def compiles(root: Path, capability: int, *flags: str) -> int:
    """How many kernels came out; all fit into shared memory, and those that multiply use matrix units."""
    kernels = fitting(root, capability, "--rows", *flags)
    for kernel in kernels:
        assert kernel.get("spill_bytes", 0) <= 512, kernel
        assert kernel["kernel"] == "combine_kernel" or kernel["wgmma"] or kernel["mma"], f"no matrix units: {kernel}"
    return len(kernels)


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles(repo_root: Path, capability: int) -> None:
    pytest.importorskip("triton")
    assert compiles(repo_root, capability) == 6


@pytest.mark.slow(reason="compiles 108 kernels")
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_compiles_for_every_head_dim(repo_root: Path, capability: int) -> None:
    assert compiles(repo_root, capability, "--slow") == 36
