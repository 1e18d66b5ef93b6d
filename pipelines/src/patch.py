"""Where attention leaves diffusers: the two functions that stand for diffusers' own, and pass on what is not ours.

Traced by ``torch.compile``.
"""

from __future__ import annotations

from typing import Any

import torch

from diffsparse.layout import BlockLayout
from diffsparse.pipelines import _diffusers
from diffsparse.pipelines.attend import Request, attend
from diffsparse.pipelines.call import call_of
from diffsparse.pipelines.context import CTX, EPOCH
from diffsparse.pipelines.parallel import attend_shared, is_shared
from diffsparse.pipelines.policy import judge_arguments

__all__ = ["install_patch", "routed_dispatch", "routed_sdpa", "takes_key_mask"]

_dispatch = _diffusers.original_dispatch


def _sdpa(*args: Any, **kwargs: Any) -> torch.Tensor:
    # Looked up at each call: some users put a kernel of their own in its place.
    return torch.nn.functional.scaled_dot_product_attention(*args, **kwargs)


# Their modules have an F of their own, or hand attention on to diffusers' models.
_NOT_MODELS = ("torch.", "diffusers.", "transformers.", "accelerate.", "peft.", "torchao.")


def install_patch(model: torch.nn.Module | None = None) -> None:
    """Put the pass-through functions in place in all modules of diffusers that are loaded by now.

    And in those that define the parts of ``model`` and their processors, where it is not one of diffusers'.
    """
    also: set[str] = set()
    for part in model.modules() if model is not None else ():
        also |= {type(x).__module__ for x in (part, part.__dict__.get("processor")) if x is not None}
    _diffusers.install(routed_dispatch, routed_sdpa, {name for name in also if not name.startswith(_NOT_MODELS)})


def routed_dispatch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: dict[str, Any] | None = None,
    *,
    backend: Any = None,
    parallel_config: Any = None,
) -> torch.Tensor:
    """Stands for diffusers' ``dispatch_attention_fn``: q, k, v are ``[B, S, H, D]``."""
    if EPOCH.tag == "":  # never: compiled code guards on the tag
        raise RuntimeError

    def dense() -> torch.Tensor:
        return _dispatch(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale,
            enable_gqa,
            attention_kwargs,
            backend=backend,
            parallel_config=parallel_config,
        )

    layer = CTX.layer
    if layer is None:
        return dense()
    # Whatever runs below is not this layer's attention a second time: the native backend calls F.sdpa.
    CTX.layer = None
    plain = parallel_config is not None and not (dropout_p or is_causal or attention_kwargs)
    if plain and is_shared(layer, query, key, value):

        def of_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any) -> torch.Tensor:
            return _dispatch(q, k, v, mask, scale=scale, enable_gqa=enable_gqa, backend=backend)

        out = attend_shared(layer, query, key, value, attn_mask, True, scale, of_heads)
        CTX.layer = layer
        return out
    reason = judge_arguments(dropout_p, is_causal, attention_kwargs, parallel_config)
    out = attend(layer, Request(query, key, value, attn_mask, True, scale, reason, dense))
    CTX.layer = layer
    return out


def routed_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Stands for ``F.scaled_dot_product_attention`` in diffusers' models: q, k, v are ``[B, H, S, D]``."""
    if EPOCH.tag == "":
        raise RuntimeError
    layer = CTX.layer
    if layer is None or query.ndim != 4:
        return _sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    CTX.layer = None

    def dense() -> torch.Tensor:
        out = _sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        return out.transpose(1, 2)

    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    # diffusers does not share the attention of these models: by itself each process would see its own tokens alone.
    if layer.share is not None and not (dropout_p or is_causal) and is_shared(layer, q, k, v):

        def of_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any) -> torch.Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return _sdpa(q, k, v, mask, scale=scale, enable_gqa=enable_gqa).transpose(1, 2)

        out = attend_shared(layer, q, k, v, attn_mask, False, scale, of_heads).transpose(1, 2)
        CTX.layer = layer
        return out
    reason = judge_arguments(dropout_p, is_causal)
    out = attend(layer, Request(q, k, v, attn_mask, False, scale, reason, dense)).transpose(1, 2)
    CTX.layer = layer
    return out


def takes_key_mask(device: torch.device) -> bool:
    """Whether the layer that is running has block lists in this forward, or a tap that is to see its call.

    For processors that stand in for a model's own (``Family.stand_in``). Where it is False the call runs dense by the
    plan's word, or nothing is attached, and the model's own processor must run.
    """
    layer = CTX.layer
    if layer is None:
        return False
    if torch.compiler.is_compiling():
        return layer.layout is not None
    call = call_of(layer)
    if call is None:
        return False
    if call.state.tap is not None:
        return True
    return call.problem is None and isinstance(call.layout(layer.index, device), BlockLayout)
