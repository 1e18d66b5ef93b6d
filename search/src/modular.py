"""Modular pipelines of diffusers, called as others are: their blocks say what they take and what they make."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from diffsparse.search.errors import BadInput

__all__ = ["call_modular", "is_modular", "modular_parameters"]

#: What blocks call what they make, by the name that other pipelines give it.
MADE = {"frames": ("videos",), "images": ("images", "image")}


def is_modular(pipe: Any) -> bool:
    return hasattr(pipe, "blocks") and hasattr(pipe, "update_components")


def modular_parameters(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """What the blocks take, as the parameters of a call."""
    found = {}
    for one in pipe.blocks.inputs:
        if one.name is not None:
            default = inspect.Parameter.empty if one.required else one.default
            found[one.name] = inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=default)
    return found


def call_modular(pipe: Any, arguments: dict[str, Any]) -> SimpleNamespace:
    """The output under the names of other pipelines: ``frames`` or ``images``.

    Not all blocks can leave the decoding out, so latents are taken from what the denoising put down.
    Raises :class:`BadInput` where the blocks make neither videos nor images.
    """
    latent = arguments["output_type"] == "latent"
    with _unlogged():
        state = pipe(**arguments | ({"output_type": "pt"} if latent else {}))
    for name, keys in MADE.items():
        for key in keys:
            made = state.get(key)
            if made is not None:
                return SimpleNamespace(**{name: _latents(pipe, state) if latent else made})
    outputs = ", ".join(output.name for output in pipe.blocks.outputs)
    raise BadInput(f"{type(pipe).__name__} makes {outputs or 'nothing'}, and neither videos nor images")


@contextmanager
def _unlogged() -> Iterator[None]:
    """Within, blocks log no errors: they are raised as well, and some only end a generation early."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _latents(pipe: Any, state: Any) -> torch.Tensor:
    latents = state.get("latents")
    if not isinstance(latents, torch.Tensor):
        raise BadInput(f"{type(pipe).__name__} keeps no latents, which a search compares")
    return latents
