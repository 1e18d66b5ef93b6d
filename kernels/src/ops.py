"""The operator ``diffsparse::sparse_attention``: its schema, what tracing sees of it, and its missing backward.

Arguments are tensors and constants of a whole plan. What differs from head to head lies in int32 tensors, so that the
layers of a compiled model share one graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from diffsparse.kernels.backends import find_backend
from diffsparse.kernels.call import AttentionCall, key_mask_of
from diffsparse.kernels.checks import choose_backend, possible_numerics
from diffsparse.kernels.inputs import kv_len_error
from diffsparse.kernels.operands import from_operands
from diffsparse.kernels.repair import mend_, mend_online_
from diffsparse.online import OnlineRepair

__all__ = ["sparse_attention_op"]

_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor[] layout, int[] cut, str traits, Tensor? kv_len, float scale, "
    "bool return_lse, str backend, str numerics) -> (Tensor, Tensor)"
)


@torch.library.custom_op("diffsparse::sparse_attention", mutates_args=(), schema=_SCHEMA)
def sparse_attention_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Sequence[torch.Tensor],
    cut: Sequence[int],
    traits: str,
    kv_len: torch.Tensor | None,
    scale: float,
    return_lse: bool,
    backend: str,
    numerics: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run one call; the log-sum-exp is an empty tensor unless asked for.

    The repair of a layout is a part of it, so that traced code has nothing that changes a tensor in place.

    ``layout``, ``cut``, ``traits``: as ``operands.as_operands`` makes them; the rest as in ``AttentionCall``.
    """
    tokens, index, heads = from_operands(layout, cut, traits)
    if (reason := kv_len_error(kv_len, tokens.seq_len, tokens.text_before, tokens.num_visual)) is not None:
        raise ValueError(reason)
    name = choose_backend(backend, q, heads.tails)
    call = AttentionCall(
        q=q,
        k=k,
        v=v,
        tokens=tokens,
        index=index,
        heads=replace(heads, numerics=possible_numerics(name, q.shape[3], heads.numerics), repair=None),
        key_mask=key_mask_of(kv_len, tokens.seq_len),
        scale=scale,
        return_lse=return_lse,
        numerics=numerics,
    )
    found = find_backend(name)
    assert found is not None  # choose_backend knows it
    results = []
    for one in call.by_lists():
        if one.index.is_packed:
            one = replace(one, index=found.lists(one.index, tokens), packed=one.index)
        results.append(found.run(one))
    out, lse = results[0] if len(results) == 1 else (torch.cat(parts) for parts in zip(*results))
    if isinstance(heads.repair, OnlineRepair):
        mend_online_(out, call, heads.repair)
    elif heads.repair is not None:
        mend_(out, heads.repair, tokens.text_before, tokens.num_visual)
    return out, lse if return_lse else q.new_empty(0, dtype=torch.float32)


@sparse_attention_op.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Sequence[torch.Tensor],
    cut: Sequence[int],
    traits: str,
    kv_len: torch.Tensor | None,
    scale: float,
    return_lse: bool,
    backend: str,
    numerics: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, torch.empty(q.shape[:3] if return_lse else (0,), dtype=torch.float32, device=q.device)


def _no_backward(ctx: Any, *grads: torch.Tensor) -> None:
    raise NotImplementedError(
        "sparse_attention has no backward: run it under torch.no_grad(), or dense where gradients are needed"
    )


sparse_attention_op.register_autograd(_no_backward)
