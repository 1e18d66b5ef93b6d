"""The operator ``diffsparse::sparse_attention``: its schema, what tracing sees of it, and its missing backward.

Arguments are tensors and constants of a whole plan. What differs from head to head lies in int32 tensors, so that the
layers of a compiled model share one graph.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import torch

from diffsparse.kernels.call import AttentionCall, key_mask_of
from diffsparse.kernels.checks import choose_backend, kv_len_error, possible_numerics
from diffsparse.layout import unpack

__all__ = ["sparse_attention_op"]

_MODULES = {
    "reference": "diffsparse.kernels.backends.reference.forward",
    "cpu": "diffsparse.kernels.backends.cpu.forward",
    "triton": "diffsparse.kernels.backends.triton.host",
    "gluon_sm90": "diffsparse.kernels.backends.gluon_sm90.host",
}
_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor gather, Tensor scatter, Tensor block_start, Tensor head_order, "
    "Tensor row_ptr, Tensor col_idx, Tensor head_mode, Tensor? kv_len, float scale, int block_size, int text_before, "
    "int num_visual, bool has_tail, bool needs_gather, bool return_lse, str backend, str numerics, "
    "str head_numerics) -> "
    "(Tensor, Tensor)"
)


def _lists(call: AttentionCall) -> torch.Tensor:
    if call.col_idx.is_cuda:
        from diffsparse.kernels.backends.triton.unpack import unpack_lists

        return unpack_lists(call, call.col_idx)  # type: ignore[no-any-return]
    return unpack(call.col_idx, call.block_start, call.head_order, call.block_size, call.text_before, call.num_visual)


@torch.library.custom_op("diffsparse::sparse_attention", mutates_args=(), schema=_SCHEMA)
def sparse_attention_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gather: torch.Tensor,
    scatter: torch.Tensor,
    block_start: torch.Tensor,
    head_order: torch.Tensor,
    row_ptr: torch.Tensor,
    col_idx: torch.Tensor,
    head_mode: torch.Tensor,
    kv_len: torch.Tensor | None,
    scale: float,
    block_size: int,
    text_before: int,
    num_visual: int,
    has_tail: bool,
    needs_gather: bool,
    return_lse: bool,
    backend: str,
    numerics: str,
    head_numerics: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run one call; the log-sum-exp is an empty tensor unless asked for. Arguments as in ``AttentionCall``.

    ``head_numerics``: names between commas.
    """
    seq = q.shape[1]
    if (reason := kv_len_error(kv_len, seq, text_before, num_visual)) is not None:
        raise ValueError(reason)
    name = choose_backend(backend, q)
    call = AttentionCall(
        q=q,
        k=k,
        v=v,
        gather=gather,
        scatter=scatter,
        block_start=block_start,
        head_order=head_order,
        row_ptr=row_ptr,
        col_idx=col_idx,
        head_mode=head_mode,
        key_mask=key_mask_of(kv_len, seq),
        scale=scale,
        block_size=block_size,
        text_before=text_before,
        num_visual=num_visual,
        has_tail=has_tail,
        needs_gather=needs_gather,
        return_lse=return_lse,
        numerics=numerics,
        head_numerics=possible_numerics(name, q.shape[3], tuple(head_numerics.split(","))),
    )
    if col_idx.dtype == torch.uint8:
        call = replace(call, col_idx=_lists(call), bits=col_idx)
    out, lse = import_module(_MODULES[name]).run(call)
    return out, lse if return_lse else q.new_empty(0, dtype=torch.float32)


@sparse_attention_op.register_fake
def _(q: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return_lse = args[-4]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, torch.empty(q.shape[:3] if return_lse else (0,), dtype=torch.float32, device=q.device)


def _no_backward(ctx: Any, *grads: torch.Tensor) -> None:
    raise NotImplementedError(
        "sparse_attention has no backward: run it under torch.no_grad(), or dense where gradients are needed"
    )


sparse_attention_op.register_autograd(_no_backward)
