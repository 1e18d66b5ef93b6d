"""Everything that diffusers may rename without notice.

Attention leaves diffusers' models in two forms: ``dispatch_attention_fn`` with ``[B, S, H, D]``, and
``F.scaled_dot_product_attention`` with ``[B, H, S, D]``. Both names are replaced, in diffusers' modules and in those
that define an enabled model, by functions that pass everything through unless a layer of an enabled model is running.
The replacement stays for the life of the process: taking it out again would make a deep copy of an enabled model dense
without a word.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import torch
import torch.nn.functional

from diffsparse._on_import import OnImport

__all__ = [
    "ONE_USE",
    "PRIVATE_NAMES",
    "StandIn",
    "gist_counts",
    "install",
    "local_folder",
    "lost_names",
    "original_dispatch",
    "parallel_config",
    "replaced_forward",
    "splits_text",
    "tensor_rank",
    "ulysses",
    "ulysses_rank",
]

#: Undocumented names of diffusers in use, and what for.
PRIVATE_NAMES = {
    "diffusers.models.attention_dispatch.dispatch_attention_fn": "the call by which most models leave for attention",
    "diffusers.models.attention_processor.F": "torch.nn.functional, by which the others do",
    "diffusers.models.transformers.transformer_bria_fibo2.compute_gist_count": "FIBO 2's number of gist tokens",
    "diffusers.hooks.hooks.HookRegistry.check_if_exists_or_initialize": "what sets _diffusers_hook, with hooks in it",
    "diffusers.hooks.context_parallel.ContextParallelSplitHook": "what cuts a model's inputs among processes",
    "diffusers.models.attention_dispatch.TemplatedUlyssesAttention": "what exchanges tokens for heads",
    "diffusers.models.attention_dispatch.TemplatedUlyssesAnythingAttention": "the same for any numbers of both",
}


#: Attention processors that use q, k and v in one attention call and nowhere else, and write into none of them.
ONE_USE = frozenset(
    f"diffusers.models.transformers.transformer_{name}"
    for name in (
        "wan.WanAttnProcessor",
        "wan_animate.WanAttnProcessor",
        "chronoedit.WanAttnProcessor",
        "skyreels_v2.SkyReelsV2AttnProcessor",
        "hunyuan_video.HunyuanVideoAttnProcessor2_0",
        "flux.FluxAttnProcessor",
        "qwenimage.QwenDoubleStreamAttnProcessor2_0",
        "ltx.LTXVideoAttnProcessor",
    )
)


def lost_names() -> list[str]:
    """Those of :data:`PRIVATE_NAMES` that this version of diffusers has no more."""
    return [name for name in PRIVATE_NAMES if _find(name) is None]


def _find(name: str) -> Any:
    """The object at a dotted path; the longest part that can be imported is the module."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            found: Any = import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part, None)
        return found
    return None


def _need(name: str) -> Any:
    found = _find(name)
    if found is None:
        raise ImportError(
            f"diffusers {diffusers.__version__} has no {name} ({PRIVATE_NAMES[name]}): this version of diffsparse does "
            "not know it; install a newer diffsparse, or the diffusers that it names"
        )
    return found


#: The function that runs dense attention.
original_dispatch: Callable[..., torch.Tensor] = _need("diffusers.models.attention_dispatch.dispatch_attention_fn")

_MODELS = "diffusers.models."
_CALLS_SDPA = ("diffusers.models.attention_processor", "diffusers.models.transformers.")
_watch: _Watch | None = None


class _Watch(OnImport):
    """Puts the two functions in place in modules of diffusers, and in others by name.

    Those that are loaded later are seen when they are imported: a model may get a processor from one of them.
    """

    def __init__(self, dispatch: Callable[..., torch.Tensor], sdpa: Callable[..., torch.Tensor]) -> None:
        self.dispatch = dispatch
        # A copy of torch.nn.functional: the original is everybody's.
        self.functional = ModuleType("torch.nn.functional", torch.nn.functional.__doc__)
        self.functional.__dict__.update(vars(torch.nn.functional), scaled_dot_product_attention=sdpa)

    def wants(self, name: str) -> bool:
        return name.startswith(_MODELS)

    def ran(self, module: ModuleType) -> None:
        self.replace(module.__name__, module)

    def replace(self, name: str, module: Any, also: bool = False) -> None:
        """In one module, which may have neither name. ``also``: one from outside diffusers."""
        if not isinstance(module, ModuleType):
            return
        names = vars(module)
        # In attention_dispatch too, so that model modules loaded later import the replacement.
        if names.get("dispatch_attention_fn") is original_dispatch:
            names["dispatch_attention_fn"] = self.dispatch
        if (also or name.startswith(_CALLS_SDPA)) and names.get("F") is torch.nn.functional:
            names["F"] = self.functional


def install(
    dispatch: Callable[..., torch.Tensor], sdpa: Callable[..., torch.Tensor], also: Collection[str] = ()
) -> None:
    """Put the two functions in place, in every module of diffusers that is loaded by now or will be.

    ``also``: names of modules outside diffusers that are to have them too.
    """
    global _watch
    if _watch is None:
        _watch = _Watch(dispatch, sdpa)
        sys.meta_path.insert(0, _watch)
        for name, module in list(sys.modules.items()):
            if _watch.wants(name):
                _watch.replace(name, module)
    for name in also:
        _watch.replace(name, sys.modules.get(name), also=True)


def replaced_forward(module: torch.nn.Module) -> bool:
    """True where a diffusers hook (a cache, an offloader) stands in for the module's own ``forward``."""
    # Pipelines that name a cache's context leave an empty registry behind, whether there is a cache or not.
    registry = getattr(module, "_diffusers_hook", None)
    return registry is not None and bool(registry.hooks)


def gist_counts(text_lengths: list[int], **bounds: int) -> list[int]:
    """Gist tokens of each prompt in BRIA FIBO 2, from its number of text tokens and the model's bounds."""
    count = _need("diffusers.models.transformers.transformer_bria_fibo2.compute_gist_count")
    found: list[int] = count(text_lengths, **bounds)
    return found


def local_folder(loaded: Any) -> Path | None:
    """The folder that a pipeline or a model was loaded from, or None (built in memory, or named by a Hub id)."""
    name = getattr(getattr(loaded, "config", None), "_name_or_path", None)
    return Path(name) if isinstance(name, (str, os.PathLike)) and str(name) and Path(name).is_dir() else None


class StandIn:
    """Our attention processor, which replaces a model's own while hooks are attached.

    ``original`` is the model's own. Subclasses are called as it is, with the same names of arguments (diffusers passes
    on only those that it finds in the signature), and hand over to it whenever they are not needed.
    """

    def __init__(self, original: Any) -> None:
        self.original = original

    # What diffusers sets on processors goes to the original, and is still there when it is back in its place.
    @property
    def _attention_backend(self) -> Any:
        return self.original._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.original._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        return self.original._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.original._parallel_config = config

    def dispatch_options(self) -> dict[str, Any]:
        """What the original passes to ``dispatch_attention_fn`` beside the tensors."""
        return {"backend": self._attention_backend, "parallel_config": self._parallel_config}


# Looked up here, as compiled code cannot.
_ULYSSES, _UNEVEN_ULYSSES = (
    _find(f"diffusers.models.attention_dispatch.TemplatedUlysses{kind}Attention") for kind in ("", "Anything")
)


def parallel_config(model: torch.nn.Module) -> Any:
    """What ``enable_parallelism`` has set for context parallelism, or None."""
    config: Any = getattr(model, "_parallel_config", None)
    return None if getattr(config, "context_parallel_config", None) is None else config


def ulysses_rank(config: Any) -> int:
    """Which of the processes that exchange tokens for heads this one is."""
    return int(config.context_parallel_config._ulysses_local_rank)


def tensor_rank(model: torch.nn.Module) -> tuple[int, int] | None:
    """Which of the processes that split a model's projections by heads this one is, and how many there are; or None."""
    config: Any = getattr(getattr(model, "_parallel_config", None), "tensor_parallel_config", None)
    return None if config is None else (int(config._mesh.get_local_rank()), int(config._mesh.size()))


class _Kept:
    """What an autograd function would keep for its backward."""


def splits_text(model: torch.nn.Module) -> bool:
    """Whether ``enable_parallelism`` cuts text by itself, beside the video."""
    split = _find("diffusers.hooks.context_parallel.ContextParallelSplitHook")
    for module in model.modules():
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        for hook in hooks.values():
            if isinstance(hook, split) and {"hidden_states", "encoder_hidden_states"} <= set(hook.metadata):
                return True
    return False


def ulysses(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Any,
    config: Any,
    attention: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Any], torch.Tensor],
) -> torch.Tensor:
    """Exchange tokens for heads, call ``attention(q, k, v, mask)``, and exchange back. No gradients.

    q, k, v: ``[B, S / ranks, H, D]``; ``attention`` gets and returns ``[B, S, H / ranks, D]``.
    """
    uneven = config.context_parallel_config.ulysses_anything
    engine = _UNEVEN_ULYSSES if uneven else _ULYSSES
    # Its forward is called as a plain function: what it would keep for a backward is not needed.
    return engine.forward(
        _Kept(),
        q,
        k,
        v,
        mask,
        0.0,
        False,
        None,
        False,
        False,
        lambda ctx, q, k, v, mask, *args, **kwargs: attention(q, k, v, mask),
        None,
        config,
    )
