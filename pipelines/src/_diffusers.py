"""Everything that diffusers may rename without notice.

Attention leaves diffusers' models in two forms: ``dispatch_attention_fn`` with ``[B, S, H, D]``, and
``F.scaled_dot_product_attention`` with ``[B, H, S, D]``. Both names are replaced, in diffusers' own modules only, by
functions that pass everything through unless a layer of an enabled model is running. The replacement stays for the life
of the process: taking it out again would make a deep copy of an enabled model dense without a word.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional
from diffusers.models import attention_dispatch

__all__ = ["install", "local_folder", "original_dispatch", "replaced_forward"]

#: The function that runs dense attention.
original_dispatch: Callable[..., torch.Tensor] = attention_dispatch.dispatch_attention_fn

_MODELS = "diffusers.models."
_CALLS_SDPA = ("diffusers.models.attention_processor", "diffusers.models.transformers.")
_seen_modules = 0
_functional: ModuleType | None = None


def install(dispatch: Callable[..., torch.Tensor], sdpa: Callable[..., torch.Tensor]) -> None:
    """Put the two functions in place, in every module that is loaded by now. Cheap where nothing was loaded since."""
    global _seen_modules, _functional
    if len(sys.modules) == _seen_modules:
        return
    if _functional is None:
        # A copy of torch.nn.functional: the original is everybody's.
        _functional = ModuleType("torch.nn.functional", torch.nn.functional.__doc__)
        _functional.__dict__.update(vars(torch.nn.functional))
        _functional.scaled_dot_product_attention = sdpa  # type: ignore[attr-defined]
    loaded = list(sys.modules.items())
    for name, module in loaded:
        if not name.startswith(_MODELS) or not isinstance(module, ModuleType):
            continue
        names = vars(module)
        # In attention_dispatch too, so that model modules loaded later import the replacement.
        if names.get("dispatch_attention_fn") is original_dispatch:
            names["dispatch_attention_fn"] = dispatch
        if name.startswith(_CALLS_SDPA) and names.get("F") is torch.nn.functional:
            names["F"] = _functional
    _seen_modules = len(loaded)


def replaced_forward(module: torch.nn.Module) -> bool:
    """True where a diffusers hook (a cache, an offloader) stands in for the module's own ``forward``."""
    return getattr(module, "_diffusers_hook", None) is not None


def local_folder(loaded: Any) -> Path | None:
    """The folder that a pipeline or a model was loaded from, or None (built in memory, or named by a Hub id)."""
    name = getattr(getattr(loaded, "config", None), "_name_or_path", None)
    return Path(name) if isinstance(name, (str, os.PathLike)) and str(name) and Path(name).is_dir() else None
