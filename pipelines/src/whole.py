"""Layers whose heads all use outputs of an earlier step: q, k and v are computed for one token instead of all.

The decision is made before the layer runs (:func:`announce`). From then on it binds. Hooks on the layer's projections
and norms cut their input to one token and repeat what comes out, so that shapes, precision, LoRA, quantisation and
offloading stay what they are. The attention call puts the earlier outputs in place (:func:`take_whole`). Where that
call is not the one that was announced it raises: values of the stand-ins are never used.

This needs processors that use q, k and v in one attention call and nowhere else, so those that are known to are named.
Rotary embeddings still run on the stand-ins. Compiled code computes q, k and v.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from diffsparse.kernels.api import run_checked
from diffsparse.layout import BlockLayout
from diffsparse.online import OnlineRepair
from diffsparse.pipelines._diffusers import ONE_USE
from diffsparse.pipelines.call import Call, running_call
from diffsparse.pipelines.context import CTX
from diffsparse.pipelines.policy import judge_call, masked_visual_tokens, misfit
from diffsparse.pipelines.reuse import Group
from diffsparse.pipelines.state import LayerState, ModelState

__all__ = ["Whole", "announce", "cut_inputs", "repeat_outputs", "take_whole"]

# What these processors call on a layer before attention. Others of its modules run as ever.
_PROJECTIONS = ("to_q", "to_k", "to_v", "to_qkv", "add_q_proj", "add_k_proj", "add_v_proj", "to_added_qkv")
_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


@dataclass(eq=False)
class Whole:
    """What was decided of one layer in one forward.

    ``shape``: of its queries, ``[B, S, H, D]``. ``parts``: the modules that run on one token. ``cut``: those that did,
    with the sizes that their output is to have. ``taken``: the attention call has had its output.
    """

    state: ModelState
    layer: LayerState
    groups: tuple[Group, ...]
    layout: BlockLayout
    shape: tuple[int, ...]
    parts: frozenset[torch.nn.Module]
    cut: dict[torch.nn.Module, tuple[int, ...]] = field(default_factory=dict)
    taken: bool = False

    def fail(self, why: str) -> RuntimeError:
        return RuntimeError(
            f"{self.layer.name}: q, k and v were not computed, because all heads use outputs of an earlier step, but "
            f"its attention call is another one than was expected ({why}). That is a fault of diffsparse: please "
            "report it with the model and its attention processor. A plan without reuse runs"
        )


def announce(call: Call, module: torch.nn.Module, layer: LayerState, args: Any, kwargs: Any) -> Whole | None:
    """Whether a layer that is about to run needs no q, k and v; None where it computes them. Eager code alone."""
    if call.reuse is None or call.problem is not None or call.state.tap is not None:
        return None
    state, index = call.state, layer.index
    if index in call.compiled or torch.is_grad_enabled():
        return None
    grid = call.grid_of(index)
    if grid is None or not state.is_whole(grid, call.reuse.phase, index):
        return None
    # A forward of its own (caches, offloading of the layer) may call the layer's with other arguments, or not at all.
    if "forward" in module.__dict__ or _name(getattr(module, "processor", None)) not in ONE_USE:
        return None
    if getattr(module, "add_k_proj", None) is not None and getattr(module, "add_q_proj", None) is None:
        return None  # an image's keys, which q attends as well
    groups = call.groups(index)
    held = call.held_shape(index, groups)
    if held is None or held[:2] != _tokens(module, args, kwargs):
        return None
    shape = (*held[:2], state.architecture.heads, held[2])
    device = next(x.device for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
    layout = call.layout(index, device, seq=shape[1], recalled=groups)
    if not isinstance(layout, BlockLayout) or layout.seq_len != shape[1] or call.served(index, shape) != groups:
        return None
    if isinstance(layout.heads.repair, OnlineRepair) and sum(len(group.heads) for group in groups) < shape[2]:
        return None  # heads that are left out are repaired from q and k, too
    parts = [x for name in (*_PROJECTIONS, *_NORMS) if (x := module._modules.get(name)) is not None]
    return Whole(state, layer, groups, layout, shape, frozenset(x for x in parts if x._compiled_call_impl is None))


def _name(processor: Any) -> str:
    return f"{type(processor).__module__}.{type(processor).__qualname__}"


def _tokens(module: torch.nn.Module, args: Any, kwargs: Any) -> tuple[int, int] | None:
    """Items and tokens of a layer's sequence ``(B, S)``, by its arguments; None where they do not tell."""
    named = dict(zip(("hidden_states", "encoder_hidden_states"), args), **kwargs)
    hidden, text = named.get("hidden_states"), named.get("encoder_hidden_states")
    if not isinstance(hidden, torch.Tensor) or hidden.ndim != 3:
        return None
    if text is None:
        return hidden.shape[0], hidden.shape[1]
    if not isinstance(text, torch.Tensor) or text.ndim != 3 or text.shape[0] != hidden.shape[0]:
        return None
    return hidden.shape[0], hidden.shape[1] + text.shape[1]


# -- hooks of the projections and norms --------------------------------------------------------------------------------


def _current(module: torch.nn.Module) -> Whole | None:
    """What was announced, if the module is part of it. An interrupt may have left an old one behind."""
    if torch.compiler.is_compiling() or CTX.call is None:
        return None
    call = running_call()
    whole = None if call is None else call.whole
    return None if whole is None or whole.taken or module not in whole.parts else whole


def cut_inputs(module: torch.nn.Module, args: Any) -> Any:
    """Before a projection or norm: its input at one token. A norm's is cut where a projection's output was repeated."""
    whole = _current(module)
    if whole is None or len(args) != 1 or not isinstance(args[0], torch.Tensor):
        return None
    x = args[0]
    whole.cut.pop(module, None)
    if x.ndim == 3 and x.shape[0] == whole.shape[0] and x.stride(1) != 0:
        axes: list[int] = [1]  # a projection
    else:
        axes = [axis for axis in range(x.ndim - 1) if x.stride(axis) == 0]
    axes = [axis for axis in axes if x.shape[axis] > 1]
    if not axes:
        return None
    whole.cut[module] = tuple(x.shape[:-1])
    for axis in axes:
        x = x.narrow(axis, 0, 1)
    return (x,)


def repeat_outputs(module: torch.nn.Module, args: Any, output: Any) -> Any:
    """After it: what came out, repeated for all tokens. It takes no memory."""
    whole = _current(module)
    if whole is None or module not in whole.cut:
        return None
    return output.expand(*whole.cut.pop(module), output.shape[-1])


# -- the attention call ------------------------------------------------------------------------------------------------


def take_whole(
    call: Call,
    layer: LayerState,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Any,
    two_axes: bool,
    scale: float | None,
    reason: str | None,
) -> torch.Tensor:
    """The output ``[B, S, H, D]`` of a layer whose q, k and v are stand-ins: what earlier steps have left.

    Raises RuntimeError where the call is not the one that was announced.
    """
    whole, index = call.whole, layer.index
    assert whole is not None
    layout = whole.layout
    if whole.taken:
        raise whole.fail("a second one")
    if layer is not whole.layer:
        raise whole.fail("another layer's")
    why, key_mask = judge_call(q, k, v, mask, two_axes)
    why = reason or why
    if why is None and tuple(q.shape) != whole.shape:
        why = f"shape {tuple(q.shape)} instead of {whole.shape}"
    why = why or misfit(layout, q, k, v, key_mask)
    if why is None and key_mask is not None:
        why = masked_visual_tokens(layout, key_mask)
    if why is None and call.served(index, q.shape) != whole.groups:
        why = "the outputs are no longer held"
    if why is not None:
        raise whole.fail(why)
    machine, watch = call.state.machine(q.device, q.dtype, layout.heads.tails), call.start_watch(q.device)
    if sum(len(group.heads) for group in whole.groups) == q.shape[2]:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)  # all of it is put in below
    else:  # heads that the plan leaves out: zeros, or what a repair makes of zeros
        out = run_checked(q, k, v, layout, scale=scale, kv_len=key_mask, backend=layer.backend)
    call.exchange(index, out, whole.groups)
    call.ran_sparse(index, q.shape, layout.density, machine.kernel, watch)
    call.without_projections[index] += 1
    whole.taken = True
    return out
