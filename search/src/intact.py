"""A pipeline that is worked with and left as it was: its modules, its schedulers, its own attributes, random states."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from diffsparse.pipelines.family import find_transformers, unwrap
from diffsparse.pipelines.hooks import is_attached
from diffsparse.search.errors import BadInput

__all__ = ["check_dense", "eager", "intact"]

#: Attributes of a pipeline that its own offloading makes anew at the end of every call.
OFFLOADING = ("_all_hooks",)


def check_dense(pipe: Any) -> None:
    """Raises :class:`BadInput` where sparse attention is enabled on the pipeline."""
    if any(is_attached(transformer) for transformer in find_transformers(pipe).values()):
        raise BadInput(
            f"sparse attention is enabled on this {type(pipe).__name__}: disable it first, "
            "pipe.disable_sparse_attention()"
        )


@contextmanager
def intact(pipe: Any) -> Iterator[None]:
    """Within, the pipeline's models are in evaluation mode and its own progress bars are off.

    Afterwards all is as before, also where something was raised: training modes, the schedulers' states, attributes of
    the pipeline (guidance, progress bars), and the states of random numbers of torch, numpy and Python. Models that
    the pipeline keeps off the device between calls are off it again.
    """
    with ExitStack() as stack:
        stack.callback(_put_random_states, _random_states())
        _restore_later(stack, pipe, without=OFFLOADING)
        # After what a call that was ended early left behind: the pipeline does this itself at the end of a whole one.
        stack.callback(_offload, pipe)
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                for module in part.modules():
                    if module.training:
                        stack.callback(setattr, module, "training", True)
                part.eval()
            elif hasattr(part, "set_timesteps"):
                _restore_later(stack, part)
        _without_bars(stack, pipe)
        yield


@contextmanager
def eager(pipe: Any) -> Iterator[None]:
    """Within, the pipeline's transformers run as they would without ``torch.compile``: a search looks into them."""
    transformers = find_transformers(pipe)
    with ExitStack() as stack:
        for name, part in pipe.components.items():
            inner = unwrap(part) if isinstance(part, torch.nn.Module) else part
            if inner is not part and hasattr(part, "_orig_mod") and inner in transformers.values():
                stack.callback(setattr, pipe, name, part)
                setattr(pipe, name, inner)
        for transformer in transformers.values():
            for module in transformer.modules():
                if (compiled := getattr(module, "_compiled_call_impl", None)) is not None:
                    stack.callback(setattr, module, "_compiled_call_impl", compiled)
                    module._compiled_call_impl = None
        yield


def _restore_later(stack: ExitStack, owner: Any, without: tuple[str, ...] = ()) -> None:
    """Give an object its class and attributes back at the end; what they hold is not copied."""
    before, cls = dict(vars(owner)), type(owner)

    def restore() -> None:
        if type(owner) is not cls:
            owner.__class__ = cls
        now = vars(owner)
        kept = {name: now[name] for name in without if name in now}
        now.clear()
        now.update(before | kept)

    stack.callback(restore)


def _offload(pipe: Any) -> None:
    if getattr(pipe, "_all_hooks", None):
        pipe.maybe_free_model_hooks()


def _without_bars(stack: ExitStack, owner: Any) -> None:
    """Switch off the progress bars of a pipeline, and of all blocks of a modular one."""
    blocks = [owner]
    for block in blocks:  # grows as it goes
        blocks += list(getattr(block, "sub_blocks", {}).values())
        if block is owner and hasattr(owner, "blocks"):
            # A modular pipeline gives copies of its blocks to everybody but itself.
            blocks.append(owner._blocks)
    for block in blocks:
        if hasattr(block, "progress_bar") and hasattr(block, "set_progress_bar_config"):
            if block is not owner:
                _restore_later(stack, block)
            block._progress_bar_config = {**getattr(block, "_progress_bar_config", {}), "disable": True}


def _random_states() -> tuple[Any, ...]:
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.get_rng_state(), on_gpu, np.random.get_state(), random.getstate()


def _put_random_states(states: tuple[Any, ...]) -> None:
    on_cpu, on_gpu, of_numpy, of_python = states
    torch.set_rng_state(on_cpu)
    for index, state in enumerate(on_gpu):
        torch.cuda.set_rng_state(state, index)
    np.random.set_state(of_numpy)
    random.setstate(of_python)
