"""The fixture that fills fresh memory."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64])
def test_fresh_memory_is_nan(poison_empty: None, dtype: torch.dtype) -> None:
    x = torch.zeros(2, 3)
    fresh = [
        torch.empty(2, 3, dtype=dtype),
        torch.empty((2, 3), dtype=dtype),
        torch.empty_like(x, dtype=dtype),
        torch.empty_strided((2, 3), (1, 2), dtype=dtype),
        x.new_empty(2, 3, dtype=dtype),
        x.new_empty((2, 3), dtype=dtype),
    ]
    for tensor in fresh:
        assert tensor.shape == (2, 3)
        assert tensor.dtype is dtype
        assert tensor.float().isnan().all()


def test_other_memory_is_not(poison_empty: None) -> None:
    assert torch.zeros(3).eq(0).all()
    assert torch.empty(3, dtype=torch.int32).eq(2**31 - 1).all()
    assert torch.empty(3, dtype=torch.bool).all()
    assert torch.empty(3, device="meta").is_meta
    assert torch.empty(3, requires_grad=True).requires_grad
    out = torch.empty(2, 2)
    torch.mm(torch.eye(2), torch.eye(2), out=out)
    assert not out.isnan().any()


def test_it_ends_with_the_test() -> None:
    assert torch.empty.__module__ != __name__
    assert not hasattr(torch.empty, "__closure__")
