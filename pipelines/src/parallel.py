"""Attention whose heads several processes share: cut by head, in the model's own token order.

diffusers exchanges tokens for heads (Ulysses), and puts the parts of the processes one behind another. Where text is
cut by itself that is not the model's order, which block lists and masks rely on.

Traced by ``torch.compile``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from diffsparse.grid import TokenGrid
from diffsparse.pipelines import _diffusers
from diffsparse.pipelines.attend import Request, attend
from diffsparse.pipelines.call import Call
from diffsparse.pipelines.state import LayerState, ModelState

__all__ = ["attend_shared", "is_shared", "take_part"]


def take_part(model: torch.nn.Module, call: Call, layer: LayerState) -> None:
    """Before a forward: what a layer needs to know of the processes that share its heads."""
    layer.share = layer.parallel_config = layer.order = layer.order_back = layer.deal = layer.deal_back = None
    state, device = call.state, call.device
    if state.share is None or not state.share.exchanges or device is None or call.problem is not None:
        return
    grid = call.grid_of(layer.index)
    if grid is None:
        return
    layer.share, layer.parallel_config = state.share, _diffusers.parallel_config(model)
    # Kept: a long video has many tokens and layers, and takes many forwards.
    if (order := state.layouts.get((grid, device), "order", lambda: _order(state, grid, device))) is not None:
        layer.order, layer.order_back = order
    if state.deals:
        dealt = state.dealt(grid, call.phase, layer.index)
        heads = tuple(h for part in dealt for h in part)
        layer.deal, layer.deal_back = state.layouts.get((grid, device), heads, lambda: _both_ways(heads, device))


def _order(state: ModelState, grid: TokenGrid, device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
    assert state.share is not None
    places = state.share.canonical(grid, state.family.text_position == "before")
    return None if places is None else _both_ways(places, device)


def _both_ways(places: Sequence[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A permutation and its inverse, int64."""
    there = torch.tensor(places)
    return there.to(device), there.argsort().to(device)


def is_shared(layer: LayerState, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether processes share the heads of a call. They must all say the same, or one waits for the others forever."""
    if layer.share is None or q.shape != k.shape or k.shape != v.shape:
        return False
    return not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))


def attend_shared(
    layer: LayerState,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Any,
    two_axes: bool,
    scale: float | None,
    dense: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Any], torch.Tensor],
) -> torch.Tensor:
    """The output ``[B, S / ranks, H, D]`` of one attention call, for the tokens of this process.

    q, k, v: of those tokens. mask: the model's own, over all tokens or this process's. two_axes: see ``judge_call``.
    dense: the model's attention, for the heads that it is given and all tokens; ``[B, S, H / ranks, D]``.
    """
    here = q.shape[1]
    if layer.deal is not None:
        q, k, v = (x.index_select(2, layer.deal) for x in (q, k, v))

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, all_of_mask: Any) -> torch.Tensor:
        if layer.order is not None:
            q, k, v = (x.index_select(1, layer.order) for x in (q, k, v))
            if isinstance(mask, torch.Tensor) and mask.shape[-1] == here and isinstance(all_of_mask, torch.Tensor):
                all_of_mask = all_of_mask.index_select(-1, layer.order)  # put together in the processes' order
        request = Request(q, k, v, all_of_mask, two_axes, scale, None, lambda: dense(q, k, v, all_of_mask))
        out = attend(layer, request)
        return out if layer.order_back is None else out.index_select(1, layer.order_back)

    out = _diffusers.ulysses(q, k, v, mask, layer.parallel_config, attention)
    return out if layer.deal_back is None else out.index_select(2, layer.deal_back)
