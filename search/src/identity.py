"""What a search's record is of: a model's weights, its precision, its scheduler and its pipeline."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container
from typing import Any

import torch

from diffsparse.pipelines import find_transformers

__all__ = ["model_identity"]

# Elements of each parameter. Training changes nearly all of them, and models have hundreds of parameters.
SAMPLE = 256


def model_identity(pipe: Any) -> dict[str, str]:
    """Short strings that are equal for equal models, on any device.

    ``weights``: a digest of some elements of every parameter of every model of the pipeline: what is measured depends
    on the text encoder, and what is validated on the autoencoder. ``dtype``: of the transformers. ``scheduler``,
    ``pipeline``: class and a digest of the configuration.
    """
    models = {n: m for n, m in sorted(pipe.components.items()) if isinstance(m, torch.nn.Module)}
    total = hashlib.sha256()
    for name, model in models.items():
        for path, parameter in sorted(model.named_parameters()):
            total.update(f"{name}.{path} {tuple(parameter.shape)}\n".encode())
            total.update(_sample(parameter))
        for path, module in model.named_modules():
            # Of LoRA layers: how much each adapter counts is no parameter.
            if isinstance(scaling := getattr(module, "scaling", None), dict):
                active = sorted(getattr(module, "active_adapters", scaling))
                total.update(f"{name}.{path} {[(n, scaling.get(n)) for n in active]}\n".encode())
    dtypes = {str(next(t.parameters()).dtype).removeprefix("torch.") for t in find_transformers(pipe).values()}
    return {
        "weights": total.hexdigest()[:16],
        "dtype": ", ".join(sorted(dtypes)),
        "scheduler": _configured(getattr(pipe, "scheduler", None)),
        "pipeline": _configured(pipe, without=pipe.components),
    }


@torch.no_grad()
def _sample(parameter: torch.Tensor) -> bytes:
    if parameter.device.type == "meta":  # its values are elsewhere: offloaded to the disk
        return b""
    if hasattr(parameter, "__tensor_flatten__"):  # a quantised one, made of several
        return b"".join(_sample(getattr(parameter, name)) for name in parameter.__tensor_flatten__()[0])
    plain = parameter.detach().as_subclass(torch.Tensor).reshape(-1)
    # An odd step, or it would meet the same few columns of a matrix again and again.
    step = max(1, plain.numel() // SAMPLE) | 1
    return plain[::step].to("cpu", torch.float32).numpy().tobytes()


def _configured(part: Any, without: Container[str] = ()) -> str:
    """Class and configuration; names of files and versions do not count, nor those of the keys ``without``."""
    if part is None:
        return "none"
    config = {k: v for k, v in dict(part.config).items() if not k.startswith("_") and k not in without}
    text = json.dumps(config, sort_keys=True, default=str)
    return f"{type(part).__name__} {hashlib.sha256(text.encode()).hexdigest()[:8]}"
