"""The hooks on an enabled model. Module-level functions under one fixed key, for three reasons:

* Dynamo guards on the keys of hooks, so keys that differ from layer to layer would compile every layer anew;
* a deep copy of a module shares its hooks, so a closure would lead from the copy to the original;
* they can be pickled by name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

from diffsparse.layout import BlockLayout
from diffsparse.pipelines._diffusers import StandIn, replaced_forward
from diffsparse.pipelines.call import Call, call_of, running_call
from diffsparse.pipelines.context import CTX, EPOCH
from diffsparse.pipelines.dense import RaceKey, serves_heads
from diffsparse.pipelines.family import UnknownGridError
from diffsparse.pipelines.noise import noise_level
from diffsparse.pipelines.parallel import take_part
from diffsparse.pipelines.patch import install_patch
from diffsparse.pipelines.policy import PARALLEL, compute_dtype
from diffsparse.pipelines.reuse import Group
from diffsparse.pipelines.shares import Share, share_of
from diffsparse.pipelines.state import LAYER_STATE, MODEL_STATE, LayerState, ModelState
from diffsparse.pipelines.whole import Whole, announce, cut_inputs, repeat_outputs

__all__ = ["KEY", "attach", "compiled_layers", "detach", "is_attached"]

KEY = "diffsparse"
# What Dynamo says where somebody compiles a function around an enabled model with fullgraph.
_OPEN = "diffsparse reads the noise level before each forward: compile the model itself, not what calls it"
NOT_TOLD = (
    "outputs are not used again over steps: that needs a pipeline with a scheduler, whose forwards can be told apart "
    "by their prompts"
)
PICKED_ANEW = (
    "blocks are picked in every call: to keep them over steps needs a pipeline with a scheduler, whose forwards can be "
    "told apart by their prompts"
)
_MODULE_FILE = torch.nn.Module.__call__.__code__.co_filename


def attach(transformer: torch.nn.Module, state: ModelState) -> None:
    """Put a state and its hooks on a transformer and its attention layers."""
    install_patch(transformer)
    state.installed = True
    modules = dict(transformer.named_modules())
    for layer in state.layers:
        module = modules[layer.name]
        setattr(module, LAYER_STATE, layer)
        _add_hooks(module, _before_layer, _after_layer)
        if state.family.stand_in is not None:
            _put_stand_in(module, state.family.stand_in)
    setattr(transformer, MODEL_STATE, state)
    _add_hooks(transformer, _before_model, _after_model)
    EPOCH.bump()
    _forget_graphs(transformer, [layer.name for layer in state.layers])


def detach(transformer: torch.nn.Module) -> None:
    """Take everything off again that ``attach`` put on."""
    _forget_graphs(transformer, [name for name, x in transformer.named_modules() if LAYER_STATE in x.__dict__])
    for module in transformer.modules():
        _remove_hooks(module)
        for name in (LAYER_STATE, MODEL_STATE):
            module.__dict__.pop(name, None)
        if isinstance(processor := module.__dict__.get("processor"), StandIn):
            module.processor = processor.original
    EPOCH.bump()


def _forget_graphs(transformer: torch.nn.Module, layers: list[str]) -> None:
    """Have Dynamo forget what it made of the modules around attention.

    Guards on ``EPOCH`` keep those graphs from ever being used again, but they would count: past so many of one function
    (``recompile_limit``) Dynamo runs it uncompiled, or raises where ``fullgraph`` was asked for.
    """
    if "torch._dynamo" not in sys.modules:  # nothing has been compiled
        return
    from torch._dynamo.eval_frame import remove_from_cache

    around = {""}
    for layer in layers:
        parts = layer.split(".")
        around |= {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
    modules = [module for name, module in transformer.named_modules() if name in around]
    forwards = [type(x).forward for x in modules]
    # Offloading replaces a module's own by a `functools.partial`.
    own = (x.__dict__["forward"] for x in modules if "forward" in x.__dict__)
    forwards += [getattr(forward, "func", forward) for forward in own]
    for code in {forward.__code__ for forward in forwards if hasattr(forward, "__code__")}:
        remove_from_cache(code)


def is_attached(transformer: torch.nn.Module) -> bool:
    return MODEL_STATE in transformer.__dict__


def _add_hooks(module: torch.nn.Module, before: Any, after: Any) -> None:
    module._forward_pre_hooks[KEY] = before  # type: ignore[index]
    module._forward_pre_hooks_with_kwargs[KEY] = True  # type: ignore[index]
    module._forward_hooks[KEY] = after  # type: ignore[index]
    module._forward_hooks_with_kwargs[KEY] = True  # type: ignore[index]
    module._forward_hooks_always_called[KEY] = True  # type: ignore[index]


def _put_stand_in(module: torch.nn.Module, stand_in: Callable[[Any], StandIn | None]) -> None:
    own = module.__dict__.get("processor")  # one that is a module itself is somewhere else, and none that we know
    if own is None or isinstance(own, StandIn):
        return
    ours = stand_in(own)
    if ours is not None:
        module.processor = ours  # type: ignore[assignment]


def _remove_hooks(module: torch.nn.Module) -> None:
    for name in (
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
    ):
        getattr(module, name).pop(KEY, None)


def _before_layer(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
    CTX.layer = module._diffsparse  # type: ignore[assignment]
    if not torch.compiler.is_compiling() and (call := call_of(module._diffsparse)) is not None:  # type: ignore[arg-type]
        call.whole = announce(call, module, module._diffsparse, args, kwargs)  # type: ignore[arg-type]
        if call.whole is not None:
            _hook_parts(call.whole)


def _after_layer(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    CTX.layer = None
    if not torch.compiler.is_compiling() and (call := call_of(module._diffsparse)) is not None:  # type: ignore[arg-type]
        whole, call.whole = call.whole, None
        if whole is not None and not whole.taken and output is not None:
            raise whole.fail("none was seen")


def _hook_parts(whole: Whole) -> None:
    """Hooks that let projections and norms run on one token. They stay, and do nothing at other times.

    Put on again where a module has been replaced (LoRA, fused projections). Another thread may run the same module, so
    they are not taken off after the layer.
    """
    for part in whole.parts:
        if KEY not in part._forward_pre_hooks:
            part._forward_hooks[KEY] = repeat_outputs  # type: ignore[index]
            part._forward_pre_hooks[KEY] = cut_inputs  # type: ignore[index]
            whole.state.hooked_parts = True


def _unhook_parts(transformer: torch.nn.Module, state: ModelState) -> None:
    """Before compiled code runs: hooks that some layers have and others have not would compile every layer anew."""
    for module in transformer.modules():
        if module._forward_pre_hooks.get(KEY) is cut_inputs:  # type: ignore[call-overload]
            _remove_hooks(module)
    state.hooked_parts = False


# Dynamo leaves the hooks of a compiled model to Python and takes up the frames that they call, so these two must be
# closed to it as a whole: one that is open and calls one that is closed is a graph break, which fullgraph refuses.
@torch.compiler.disable(reason=_OPEN)
def _before_model(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
    state: ModelState = getattr(module, MODEL_STATE)
    if not state.installed:  # a copy, or a model out of a pickle
        install_patch(module)
        state.installed = True
    CTX.layer = None
    share = share_of(module)
    if isinstance(share, str):
        state.log(f"runs dense: {PARALLEL}, and {share}")
    state.take_share(share if isinstance(share, Share) and state.tap is None else None)
    call = _read_call(module, state, args, kwargs)
    call.previous = running_call()
    call.compiled = compiled_layers(module, state)
    if call.compiled and state.hooked_parts:
        _unhook_parts(module, state)
    # For compiled code, wherever there is any: of a wrapper around the whole model nothing can be seen from here.
    device = call.device = _device_of(args, kwargs)
    if device is not None and call.phase is not None:
        call.no_kernel = state.machine(device, compute_dtype(module, device)).without_kernel
        if call.no_kernel is not None:
            state.log(f"runs dense: {call.no_kernel}")
    for layer in state.layers:
        take_part(module, call, layer)
        layout: BlockLayout | str | None = None
        layer.reuse = None
        layer.picks = torch.tensor(layer.index) if state.rules else None
        if call.problem is None and device is not None:
            recalled = _recalled(call, layer) if call.compiled else ()
            layout = call.layout(layer.index, device, uniform=bool(call.compiled), recalled=recalled)
            if not isinstance(layout, BlockLayout):
                call.recalled.pop(layer.index, None)  # the layer computes all of its heads
        layer.layout = layout if isinstance(layout, BlockLayout) else None
        layer.dense_kernel = layer.masked_dense_kernel = layer.dense_heads = layer.ran = None
    if call.compiled and state.dense is not None:
        _choose_dense_kernels(module, call)
    call.frame = _caller()
    CTX.call = call


def _recalled(call: Call, layer: LayerState) -> tuple[Group, ...]:
    """The heads of a layer in compiled code that need not be computed, decided before it runs."""
    state, grid = call.state, call.grid_of(layer.index)
    # Where text is known in the call only, layers run dense in compiled code.
    reuses = state.plan is not None and state.plan.reuses
    if call.reuse is None or not reuses or grid is None or state.family.text_from_call:
        return ()
    layer.reuse = torch.tensor(layer.index)
    shape = (call.batch, grid.seq_len, state.heads, state.architecture.head_dim)
    call.recalled[layer.index] = call.served(layer.index, shape)
    return call.recalled[layer.index]


def _caller() -> FrameType | None:
    """The frame that runs the model's hooks and then its forward."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != _MODULE_FILE:
        frame = frame.f_back
    return frame


def _choose_dense_kernels(module: torch.nn.Module, call: Call) -> None:
    """For dense calls and heads in compiled code, where nothing can be timed: what is fastest on random inputs."""
    state, device = call.state, call.device
    if state.dense is None or device is None or call.grid is None or state.family.text_from_call:
        return
    dtype = compute_dtype(module, device)
    apart = {layer.index: call.without_dense_heads(layer.index, device, uniform=True) for layer in state.layers}
    none = torch.zeros(state.heads, dtype=torch.bool)
    for layer in state.layers:
        grid = call.grid_of(layer.index)
        any_apart = any(found is not None for found in apart.values())
        if grid is None or (layer.layout is not None and not any_apart):
            continue
        shape = (call.batch, grid.seq_len, state.heads, state.architecture.head_dim)
        layer.dense_kernel = state.dense.for_compiled(RaceKey(shape, dtype, device, masked=False))
        kernels = [layer.dense_kernel]
        if grid.text_before or grid.text_after:
            layer.masked_dense_kernel = state.dense.for_compiled(RaceKey(shape, dtype, device, masked=True))
            kernels.append(layer.masked_dense_kernel)
        if layer.layout is None or not all(kernel is not None and serves_heads(kernel) for kernel in kernels):
            continue
        # Layers without dense heads get an empty choice of them: one graph serves all.
        layer.layout, layer.dense_heads = apart[layer.index] or (layer.layout, none)


@torch.compiler.disable(reason=_OPEN)
def _after_model(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    call, state = CTX.call, getattr(module, MODEL_STATE, None)
    while call is not None and call.state is not state and not call.is_running():
        call = call.previous  # of another model inside this one, whose interrupt this one has caught
    if call is None or call.state is not state:
        return
    CTX.call = call.previous
    CTX.layer = None
    cached = len(call.events) < len(call.state.layers) and any(replaced_forward(m) for m in module.modules())
    if not call.compiled and not call.events and not call.foreign and not cached:
        call.compiled = frozenset(range(len(call.state.layers)))  # by a wrapper around the whole model
    call.finish(complete=output is not None, cached=cached)
    if call.reuse is not None:
        state.reuse.end(call.reuse, complete=output is not None)
    for layer in call.state.layers:
        layer.layout = None


def _read_call(module: torch.nn.Module, state: ModelState, args: Any, kwargs: Any) -> Call:
    """Grid, noise level and phase from the forward's own arguments."""
    arguments = dict(zip(state.arguments, args), **kwargs)
    level = noise_level(state, arguments)
    grid, problem = None, None
    try:
        grid = state.family.grid(module.config, arguments)
        state.saw_grid(grid)
    except UnknownGridError as error:
        problem = f"the token grid is unknown: {error}"
    except (KeyError, AttributeError, TypeError, ValueError, ImportError) as error:
        problem = f"the token grid is unknown: {type(error).__name__}: {error}"
    if level is None:
        problem = problem or "the forward was given no timestep"
    plan, reuse = state.plan, None
    phase_of = None if plan is None else state.phases.of(plan.schedule, state.scheduler)
    phase = phase_of(level) if phase_of is not None and level is not None else None
    keeps = any(rule.is_kept for rule in state.rules)
    told_apart = plan is not None and (plan.reuses or keeps)
    if told_apart and phase_of is not None and level is not None and problem is None:
        reuse = state.reuse.begin(state.scheduler, level, phase_of, arguments)
        if reuse is None and phase is not None:
            if plan is not None and plan.reuses:
                state.log(NOT_TOLD)
            if keeps:
                state.log(PICKED_ANEW)
    return Call(
        state=state,
        grid=grid,
        noise_level=-1.0 if level is None else level,
        phase=phase,
        batch=_batch_of(arguments.get(state.arguments[0])),
        config=module.config,
        problem=problem,
        reuse=reuse,
    )


def _batch_of(first: Any) -> int:
    """Items of the batch: a model's first argument is a tensor of them, or (Z-Image) a list."""
    if isinstance(first, torch.Tensor) and first.ndim:
        return first.shape[0]
    return len(first) if isinstance(first, (list, tuple)) else 1


def _device_of(args: Any, kwargs: Any) -> torch.device | None:
    return next((x.device for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), None)


def compiled_layers(module: torch.nn.Module, state: ModelState) -> frozenset[int]:
    """Indices of the layers that run inside a compiled module."""
    compiled: dict[str, bool] = {"": _is_compiled(module)}
    for layer in state.layers:
        path, part = "", module
        for name in layer.name.split("."):
            parent, path = path, f"{path}.{name}" if path else name
            part = getattr(part, name)
            if path not in compiled:
                compiled[path] = compiled[parent] or _is_compiled(part)
    return frozenset(layer.index for layer in state.layers if compiled[layer.name])


def _is_compiled(module: torch.nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None
