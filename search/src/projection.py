"""The output projection of an attention layer, in whichever form the layer keeps it."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["output_projection"]

#: Types of weights that can be read as they are.
PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)


def output_projection(transformer: torch.nn.Module, layer: str) -> torch.Tensor | None:
    """The weight ``[out, in]`` of a layer's output projection; None where the layer has none that is a matrix."""
    module = transformer.get_submodule(layer)
    projection = getattr(module, "to_out", None)
    linear = projection[0] if isinstance(projection, torch.nn.ModuleList) else projection
    weight = getattr(linear, "weight", None)
    if isinstance(weight, torch.Tensor) and not (weight.is_floating_point() and type(weight) in PLAIN_TENSORS):
        return _by_calling(linear)
    return weight if isinstance(weight, torch.Tensor) and weight.ndim == 2 else None


def _by_calling(linear: Any) -> torch.Tensor | None:
    """The weight ``[out, in]`` of a layer that keeps it in a form of its own (8 bits), read from what it does."""
    size = getattr(linear, "in_features", None)
    if size is None:
        return None
    bias = getattr(linear, "bias", None)
    like = bias if isinstance(bias, torch.Tensor) else next(iter(linear.parameters()))
    units = torch.eye(size, dtype=like.dtype, device=like.device)
    with torch.no_grad():
        return (linear(units) - linear(torch.zeros_like(units[:1]))).T  # type: ignore[no-any-return]
