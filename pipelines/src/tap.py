"""A tap on self-attention: sees q, k and v of every call, and may answer in the model's place. For the search."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from diffsparse.grid import TokenGrid
from diffsparse.pipelines.family import find_transformers
from diffsparse.pipelines.hooks import attach, compiled_layers, detach, is_attached
from diffsparse.pipelines.state import LayerState, ModelState

if TYPE_CHECKING:
    from diffsparse.pipelines.attend import Request
    from diffsparse.pipelines.call import Call

__all__ = ["AttentionCall", "Tap", "tap_attention"]


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One self-attention call as the kernel would get it (after rotary embedding and q/k norm).

    layer, layer_index: the module's path, and its place in ``Architecture.layers``.
    q, k, v: ``[B, S, H, D]``, possibly not contiguous.
    noise_level: of this forward, in [0, 1].
    scale: factor of the logits, or None for ``D ** -0.5``.
    kv_len: bool key mask ``[B, S]``, or None.
    dense: runs the model's own attention; ``[B, S, H, D]``.
    transformer: the component, ``transformer`` or ``transformer_2``.
    forward: which forward of the pipeline's transformers since the tap was attached, from 0. Calls of one forward share
        it, whichever layer runs first and however often.
    """

    layer: str
    layer_index: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grid: TokenGrid
    noise_level: float
    scale: float | None
    kv_len: torch.Tensor | None
    dense: Callable[[], torch.Tensor]
    transformer: str = "transformer"
    forward: int = 0


@dataclass(eq=False)
class Tap:
    """A callback instead of a plan, one for all transformers of a pipeline.

    ``unseen``: layers of which a call was not shown, by component and path, with the reason.
    """

    callback: Callable[[AttentionCall], torch.Tensor | None]
    unseen: dict[tuple[str, str], str] = field(default_factory=dict)
    _forwards: int = 0

    def _number(self, call: Call) -> int:
        if call.number is None:
            call.number = self._forwards
            self._forwards += 1
        return call.number

    def run(
        self,
        call: Call,
        layer: LayerState,
        request: Request,
        key_mask: torch.Tensor | None,
        reason: str | None,
    ) -> torch.Tensor:
        """The output of one call. ``key_mask``, ``reason``: what ``judge_call`` made of its mask and of the rest."""
        if call.problem is not None or call.grid is None:
            raise ValueError(f"{call.state.component}: {call.problem}")
        q, dense = request.q, request.dense
        grid = call.grid_of(layer.index, q.shape[1])
        assert grid is not None
        if reason is None and q.shape[1] != grid.seq_len:
            reason = f"{q.shape[1]} tokens, the grid {grid} has {grid.seq_len}"
        if reason is not None:
            self.unseen.setdefault((call.state.component, layer.name), reason)
            call.state.log(f"the tap does not see {layer.name}: {reason}")
            return dense()
        answer = self.callback(
            AttentionCall(
                layer=layer.name,
                layer_index=layer.index,
                q=q,
                k=request.k,
                v=request.v,
                grid=grid,
                noise_level=call.noise_level,
                scale=request.scale,
                kv_len=key_mask,
                dense=dense,
                transformer=call.state.component,
                forward=self._number(call),
            )
        )
        if answer is None:
            return dense()
        if answer.shape != q.shape:
            raise ValueError(f"the tap on {layer.name} returned {tuple(answer.shape)}, expected {tuple(q.shape)}")
        return answer


@contextmanager
def tap_attention(pipe_or_transformer: Any, callback: Callable[[AttentionCall], torch.Tensor | None]) -> Iterator[Tap]:
    """Show every self-attention call to ``callback``, and use what it returns; None stands for dense attention.

    Calls that are not plain self-attention (causal, an unknown mask, other keys than queries) run dense and are not
    shown. Raises RuntimeError where sparse attention is enabled, another tap is attached or the model is compiled, and
    ValueError where a forward does not tell its grid.
    """
    transformers = find_transformers(pipe_or_transformer)
    pipe = None if isinstance(pipe_or_transformer, torch.nn.Module) else pipe_or_transformer
    for name, transformer in transformers.items():
        if is_attached(transformer):
            raise RuntimeError(f"{name}: sparse attention or another tap is attached; disable it first")
    tap = Tap(callback)
    states = {name: ModelState(t, component=name, pipe=pipe, tap=tap) for name, t in transformers.items()}
    for name, transformer in transformers.items():
        if compiled_layers(transformer, states[name]):
            raise RuntimeError(f"{name} is compiled: a tap cannot look into compiled code")
    try:
        for name, transformer in transformers.items():
            attach(transformer, states[name])
        yield tap
    finally:
        for transformer in transformers.values():
            detach(transformer)
