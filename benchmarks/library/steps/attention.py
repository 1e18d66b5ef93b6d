"""What runs in the place of a transformer's self-attention, and which kernel runs dense attention."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["dense_kernel", "pass_on", "self_attention", "without_mask"]


@torch.library.custom_op("diffsparse_benchmarks::pass_on", mutates_args=())
def _pass_on(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A copy of the query. The compiler cannot see inside, so it keeps the work that keys and values need."""
    return query.clone()


@_pass_on.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(query)


@contextmanager
def self_attention(transformer: Any, tokens: int, instead: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Send calls of self-attention to ``instead(own, query, key, value, ...)``; ``own`` is what they called before."""
    module: Any = sys.modules[type(transformer).__module__]
    own = module.dispatch_attention_fn

    def dispatch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if query.shape[1] == tokens and key.shape[1] == tokens:
            return instead(own, query, key, value, *args, **kwargs)
        return own(query, key, value, *args, **kwargs)

    module.dispatch_attention_fn = dispatch
    try:
        yield
    finally:
        module.dispatch_attention_fn = own


def pass_on(own: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """A copy of the query: the cost of a step without self-attention."""
    return _pass_on(query, key, value)


def without_mask(own: Any, *qkv: torch.Tensor, attn_mask: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
    """Attention without the text's padding mask. Nothing is padded here, and dense kernels are faster without it."""
    return own(*qkv, **kwargs)


@contextmanager
def dense_kernel(name: str) -> Iterator[None]:
    """torch's attention by cuDNN, or as torch chooses (``default``)."""
    if name == "default":
        yield
        return
    cuda = torch.backends.cuda
    before = cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled()
    cuda.enable_flash_sdp(False)
    cuda.enable_mem_efficient_sdp(False)
    try:
        yield
    finally:
        cuda.enable_flash_sdp(before[0])
        cuda.enable_mem_efficient_sdp(before[1])
