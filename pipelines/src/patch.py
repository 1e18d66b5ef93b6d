"""Where attention leaves diffusers: decides call by call whether the layer that is running computes it sparse.

Traced by ``torch.compile``, so the compiled branch has no counters, no logging, and no Python number that differs from
layer to layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from diffsparse.kernels import check, sparse_attention
from diffsparse.kernels.checks import choose_backend, no_kernel
from diffsparse.kernels.dense import dense_attention, dense_heads_
from diffsparse.layout import BlockLayout
from diffsparse.pipelines import _diffusers
from diffsparse.pipelines.call import Call
from diffsparse.pipelines.context import CTX, EPOCH
from diffsparse.pipelines.state import (
    BY_PLAN,
    MASKED_VIDEO,
    OTHER_HEADS,
    OTHER_KEYS,
    OTHER_TOKENS,
    RAN_SPARSE,
    UNKNOWN_TEXT,
    LayerState,
    without_kernel,
)

__all__ = ["install_patch", "routed_dispatch", "routed_sdpa", "takes_key_mask"]

_dispatch = _diffusers.original_dispatch


def _sdpa(*args: Any, **kwargs: Any) -> torch.Tensor:
    # Looked up at each call: some users put a kernel of their own in its place.
    return torch.nn.functional.scaled_dot_product_attention(*args, **kwargs)


# Their modules have an F of their own, or hand attention on to diffusers' models.
_NOT_MODELS = ("torch.", "diffusers.", "transformers.", "accelerate.", "peft.", "torchao.")


def install_patch(model: torch.nn.Module | None = None) -> None:
    """Put the pass-through functions in place in all modules of diffusers that are loaded by now.

    And in those that define the parts of ``model`` and their processors, where it is not one of diffusers'.
    """
    also: set[str] = set()
    for part in model.modules() if model is not None else ():
        also |= {type(x).__module__ for x in (part, part.__dict__.get("processor")) if x is not None}
    _diffusers.install(routed_dispatch, routed_sdpa, {name for name in also if not name.startswith(_NOT_MODELS)})


def routed_dispatch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: dict[str, Any] | None = None,
    *,
    backend: Any = None,
    parallel_config: Any = None,
) -> torch.Tensor:
    """Stands for diffusers' ``dispatch_attention_fn``: q, k, v are ``[B, S, H, D]``."""
    if EPOCH.tag == "":  # never: compiled code guards on the tag
        raise RuntimeError

    def dense() -> torch.Tensor:
        return _dispatch(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale,
            enable_gqa,
            attention_kwargs,
            backend=backend,
            parallel_config=parallel_config,
        )

    layer = CTX.layer
    if layer is None:
        return dense()
    # Whatever runs below is not this layer's attention a second time: the native backend calls F.sdpa.
    CTX.layer = None
    reason = _special(query, key, value, dropout_p, is_causal, enable_gqa)
    if parallel_config is not None:
        reason = "context parallel"
    elif attention_kwargs:
        reason = "extra arguments for the attention backend"
    out = _route(layer, query, key, value, attn_mask, True, scale, reason, dense)
    CTX.layer = layer
    return out


def routed_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Stands for ``F.scaled_dot_product_attention`` in diffusers' models: q, k, v are ``[B, H, S, D]``."""
    if EPOCH.tag == "":
        raise RuntimeError
    layer = CTX.layer
    if layer is None or query.ndim != 4:
        return _sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    CTX.layer = None

    def dense() -> torch.Tensor:
        out = _sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        return out.transpose(1, 2)

    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    reason = _special(q, k, v, dropout_p, is_causal, enable_gqa)
    out = _route(layer, q, k, v, attn_mask, False, scale, reason, dense).transpose(1, 2)
    CTX.layer = layer
    return out


def takes_key_mask(device: torch.device) -> bool:
    """Whether the layer that is running has block lists in this forward, or a tap that is to see its call.

    For processors that stand in for a model's own (``Family.stand_in``). Where it is False the call runs dense by the
    plan's word, or nothing is attached, and the model's own processor must run.
    """
    layer = CTX.layer
    if layer is None:
        return False
    if torch.compiler.is_compiling():
        return layer.layout is not None
    call = CTX.call
    if call is None or not call.is_running():
        return False
    if call.state.tap is not None:
        return True
    return call.problem is None and isinstance(call.layout(layer.index, device), BlockLayout)


def _special(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float, is_causal: bool, enable_gqa: bool
) -> str | None:
    """What makes a call another one than plain self-attention in inference, or None."""
    if is_causal:
        return "causal attention"
    if dropout_p:
        return "dropout"
    if k.shape != q.shape or v.shape != q.shape:
        return "grouped heads" if enable_gqa else "queries and keys differ in shape"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return "gradients are needed"
    return None


def _key_mask(mask: Any, q: torch.Tensor, two_axes: bool) -> torch.Tensor | None:
    """A key-padding mask as bool ``[B, S]``, or None where the mask is another one. Reads no values.

    ``two_axes``: a mask ``[B, S]`` is one too (diffusers' dispatch takes it so, torch's function does not).
    """
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        return None
    batch, seq = q.shape[0], q.shape[1]
    if mask.ndim == 4 and mask.shape[1] == 1 and mask.shape[2] == 1:
        mask = mask[:, 0, 0]
    elif mask.ndim != 2 or not two_axes or mask.shape[0] != batch or batch == seq:
        return None
    if mask.shape[1] != seq or mask.shape[0] not in (1, batch):
        return None
    return mask.expand(batch, seq)


def _route(
    layer: LayerState,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Any,
    two_axes: bool,
    scale: float | None,
    reason: str | None,
    dense: Callable[[], torch.Tensor],
) -> torch.Tensor:
    """The output ``[B, S, H, D]`` of one attention call inside a layer, sparse or from ``dense``."""
    key_mask = None
    if mask is not None:
        key_mask = _key_mask(mask, q, two_axes)
        if key_mask is None and reason is None:
            reason = "a mask that is not a key-padding mask"
    if torch.compiler.is_compiling():
        return _compiled(layer, q, k, v, key_mask, scale, reason, dense)
    call = CTX.call
    if call is None or not call.is_running():  # a layer on its own, outside its model's forward: there is no grid
        return dense()
    return _eager(call, layer, q, k, v, mask, key_mask, scale, reason, dense)


def _compiled(
    layer: LayerState,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    scale: float | None,
    reason: str | None,
    dense: Callable[[], torch.Tensor],
) -> torch.Tensor:
    """What ``_eager`` does, in traced code. What was done is left in ``layer.ran`` for the hook after the forward."""
    layout = layer.layout
    if q.shape[1] != k.shape[1]:  # an adapter's or an image's keys beside the self-attention
        reason = OTHER_KEYS
    elif reason is None and layer.text_from_call:
        reason = UNKNOWN_TEXT
    elif reason is None and layout is not None:
        if q.shape[1] != layout.seq_len:
            reason = OTHER_TOKENS
        elif q.shape[2] != layout.num_heads:
            reason = OTHER_HEADS
        elif key_mask is not None and not layout.grid.text_before + layout.grid.text_after:
            reason = MASKED_VIDEO
    kernel = layer.dense_kernel if key_mask is None else layer.masked_dense_kernel
    if reason is not None:
        _leave_note(layer, reason, "")
        return dense()
    if layout is None:
        _leave_note(layer, BY_PLAN, kernel or "")
        return dense() if kernel is None else dense_attention(q, k, v, kernel=kernel, scale=scale, key_mask=key_mask)
    _leave_note(layer, RAN_SPARSE, kernel or "")
    out = sparse_attention(q, k, v, layout, scale=scale, kv_len=key_mask, backend=layer.backend)
    if layer.dense_heads is not None:
        assert kernel is not None  # or the heads would not have been taken out of the layout
        dense_heads_(out, q, k, v, layer.dense_heads, kernel=kernel, scale=scale, key_mask=key_mask)
    return out


def _leave_note(layer: LayerState, what: str, kernel: str) -> None:
    """Dynamo replays the store after its graph. The note before this one is passed on unread: nothing guards on it."""
    layer.ran = (layer.ran, what, kernel)


def _eager(
    call: Call,
    layer: LayerState,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Any,
    key_mask: torch.Tensor | None,
    scale: float | None,
    reason: str | None,
    dense: Callable[[], torch.Tensor],
) -> torch.Tensor:
    index = layer.index
    if q.shape[1] != k.shape[1]:  # an adapter's or an image's keys beside the self-attention
        if call.problem is not None and index not in call.events:  # keys of earlier images may be among them
            return call.run_dense(index, q, call.problem, dense, issue=True)
        call.foreign.add(index)
        return dense()
    if call.state.tap is not None:
        return call.state.tap.run(call, layer, q, k, v, key_mask, scale, reason, dense)
    layout = call.layout(index, q.device, seq=q.shape[1])
    by = ""
    if call.state.dense is not None and reason is None and not isinstance(layout, BlockLayout):
        by, dense = call.state.dense.run(q, k, v, key_mask, scale, dense)
    reason = call.problem or reason  # what holds for the whole forward says more than its effect on one call
    if reason is None and isinstance(layout, BlockLayout):
        reason = _misfit(layout, q, k, v, key_mask)
    if reason is not None and (call.problem is not None or isinstance(layout, BlockLayout)):
        return call.run_dense(index, q, reason, dense, issue=True, by=by)
    if isinstance(layout, str):
        return call.run_dense(index, q, layout, dense, issue=False, by=by)
    backend = choose_backend(layer.backend, q)
    if backend == "reference" and layer.backend == "auto":  # these are other tensors than the model's parameters
        return call.run_dense(index, q, without_kernel(no_kernel(q)) or "", dense, issue=True)
    by_heads = None
    apart = call.without_dense_heads(index, q.device, seq=q.shape[1])
    if apart is not None and call.state.dense is not None:
        by_heads = call.state.dense.for_heads(q, k, v, key_mask, scale, dense)
    watch = call.start_watch(q)
    if apart is not None and by_heads is not None:
        out = sparse_attention(q, k, v, apart[0], scale=scale, kv_len=key_mask, backend=layer.backend)
        dense_heads_(out, q, k, v, apart[1], kernel=by_heads, scale=scale, key_mask=key_mask)
        backend = f"{backend}, dense heads {by_heads}"
    else:
        out = sparse_attention(q, k, v, layout, scale=scale, kv_len=key_mask, backend=layer.backend)
    call.ran_sparse(index, q, layout.density, backend, watch)
    return out


def _misfit(
    layout: BlockLayout, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None
) -> str | None:
    grid = layout.grid
    if q.shape[1] != grid.seq_len:
        return f"{q.shape[1]} tokens, the grid {grid} has {grid.seq_len}"
    if q.shape[2] != layout.num_heads:
        return f"{q.shape[2]} heads here, the plan has {layout.num_heads}"
    if key_mask is not None and not grid.text_before + grid.text_after:
        return MASKED_VIDEO
    return check(q, k, v, layout, kv_len=key_mask)
