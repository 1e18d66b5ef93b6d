"""One attention call of a layer that is running: done as the policy decides, and counted.

Traced by ``torch.compile``, so the compiled branch has no counters, no logging, and no Python number that differs from
layer to layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from diffsparse.kernels.api import run_checked
from diffsparse.kernels.dense import dense_attention, dense_heads_
from diffsparse.layout import BlockLayout
from diffsparse.pipelines.call import call_of
from diffsparse.pipelines.exchange import exchange_compiled
from diffsparse.pipelines.picking import pick_compiled
from diffsparse.pipelines.policy import (
    BY_PLAN,
    OTHER_KEYS,
    RAN_SPARSE,
    UNKNOWN_TEXT,
    judge_call,
    masked_visual_tokens,
    misfit,
    told,
)
from diffsparse.pipelines.state import LayerState
from diffsparse.pipelines.whole import take_whole

__all__ = ["Request", "attend"]


class Request(NamedTuple):
    """One attention call as a model asks for it. (A named tuple, because every version of Dynamo can trace one.)

    q, k, v: ``[B, S, H, D]``.
    mask: the model's own, in whatever form. two_axes: see ``judge_call``.
    scale: factor of the logits, or None for ``D ** -0.5``.
    reason: why it must run dense, where that is known without its tensors.
    dense: runs the model's own attention; ``[B, S, H, D]``.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: Any
    two_axes: bool
    scale: float | None
    reason: str | None
    dense: Callable[[], torch.Tensor]


def attend(layer: LayerState, request: Request) -> torch.Tensor:
    """The output ``[B, S, H, D]`` of one attention call inside a layer, sparse or from ``request.dense``."""
    if torch.compiler.is_compiling():
        return _compiled(layer, request)
    q, k, v, mask, two_axes, scale, reason, dense = request
    call, index = call_of(layer), layer.index
    if call is None:
        return dense()
    if call.whole is not None:
        return take_whole(call, layer, q, k, v, mask, two_axes, scale, reason)
    shape, device = q.shape, q.device
    seq = shape[1]
    if seq != k.shape[1]:  # an adapter's or an image's keys beside the self-attention
        if call.problem is not None and index not in call.events:  # keys of earlier images may be among them
            return call.run_dense(index, shape, device, call.problem, dense, issue=True)
        call.foreign.add(index)
        return dense()
    why, key_mask = judge_call(q, k, v, mask, two_axes)
    reason = reason or why
    state = call.state
    if state.tap is not None:
        return state.tap.run(call, layer, request, key_mask, reason)
    recalled = call.served(index, shape) if reason is None and call.problem is None else ()
    layout = call.layout(index, device, seq=seq, recalled=recalled)
    by = ""
    if state.dense is not None and reason is None and not isinstance(layout, BlockLayout):
        by, dense = state.dense.run(q, k, v, key_mask, scale, dense)
    reason = call.problem or reason  # what holds for the whole forward says more than its effect on one call
    if isinstance(layout, BlockLayout):
        machine = state.machine(device, q.dtype, layout.heads.tails)
        if reason is None:
            # These may be other tensors than the model's parameters, for which there is a kernel.
            reason = machine.without_kernel or misfit(layout, q, k, v, key_mask)
        if reason is None and key_mask is not None:
            reason = masked_visual_tokens(layout, key_mask)
        if reason is not None:
            return call.run_dense(index, shape, device, told(reason, layout, seq, shape[2]), dense, issue=True, by=by)
    elif call.problem is not None:
        return call.run_dense(index, shape, device, call.problem, dense, issue=True, by=by)
    else:
        out = call.run_dense(index, shape, device, layout, dense, issue=False, by=by)
        if reason is None:
            call.exchange(index, out, ())  # all of it was computed, whatever an earlier step has left
        return out
    apart = by_heads = None
    if state.dense is not None:
        apart = call.without_dense_heads(index, device, seq=seq, recalled=recalled)
        if apart is not None:
            by_heads = state.dense.for_heads(q, k, v, key_mask, scale, dense)
    backend, watch = machine.kernel, call.start_watch(device)
    picked, density = None, None
    if layout.heads.picks is not None:
        picking = call.start_watch(device)
        picked, density = call.pick(index, layout, q, k, v, scale)
        call.has_picked(index, picking)
    if apart is not None and by_heads is not None:
        out = run_checked(q, k, v, apart[0], scale=scale, kv_len=key_mask, backend=layer.backend, index=picked)
        dense_heads_(out, q, k, v, apart[1], kernel=by_heads, scale=scale, key_mask=key_mask)
        backend = f"{backend}, dense heads {by_heads}"
    else:
        out = run_checked(q, k, v, layout, scale=scale, kv_len=key_mask, backend=layer.backend, index=picked)
    call.exchange(index, out, recalled)
    call.ran_sparse(index, shape, layout.density if density is None else density, backend, watch)
    return out


def _compiled(layer: LayerState, request: Request) -> torch.Tensor:
    """The same in traced code. What was done is left in ``layer.ran`` for the hook after the forward."""
    q, k, v, mask, two_axes, scale, reason, dense = request
    layout = layer.layout
    why, key_mask = judge_call(q, k, v, mask, two_axes)
    reason = reason or why
    if q.shape[1] != k.shape[1]:
        reason = OTHER_KEYS
    elif reason is None and layer.text_from_call:
        reason = UNKNOWN_TEXT
    elif reason is None and layout is not None:
        reason = misfit(layout, q, k, v, key_mask)
    kernel = layer.dense_kernel if key_mask is None else layer.masked_dense_kernel
    if reason is not None:
        _leave_note(layer, reason, "")
        return dense()
    if layout is None:
        _leave_note(layer, BY_PLAN, kernel or "")
        out = dense() if kernel is None else dense_attention(q, k, v, kernel=kernel, scale=scale, key_mask=key_mask)
        return out if layer.reuse is None else exchange_compiled(out.clone(), layer.reuse)
    _leave_note(layer, RAN_SPARSE, kernel or "")
    picked = None if layer.picks is None else pick_compiled(q, k, v, layout, layer.picks, scale)
    out = run_checked(q, k, v, layout, scale=scale, kv_len=key_mask, backend=layer.backend, index=picked)
    if layer.dense_heads is not None:
        assert kernel is not None  # or the heads would not have been taken out of the layout
        dense_heads_(out, q, k, v, layer.dense_heads, kernel=kernel, scale=scale, key_mask=key_mask)
    return out if layer.reuse is None else exchange_compiled(out, layer.reuse)


def _leave_note(layer: LayerState, what: str, kernel: str) -> None:
    """Dynamo replays the store after its graph. The note before this one is passed on unread: nothing guards on it."""
    layer.ran = (layer.ran, what, kernel)
