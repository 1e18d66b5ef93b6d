"""Reading a model while it runs: block scores of its attention calls, and the effect of perturbing them.

Everything goes through :func:`diffsparse.pipelines.tap_attention`, which hands over every self-attention call. q, k and
v are scored inside the forward pass and dropped; nothing of the size ``seq x seq`` is held.
"""

from __future__ import annotations

import copy
import functools
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from diffsparse.grid import TokenGrid
from diffsparse.layout import BlockLayout
from diffsparse.order import RasterOrder, TokenOrder
from diffsparse.pipelines import find_transformers, tap_attention
from diffsparse.pipelines.context import CTX
from diffsparse.search.call import call_pipeline
from diffsparse.search.drift import DriftMeter
from diffsparse.search.generate import GenerationSettings
from diffsparse.search.inputs import GenerationInput
from diffsparse.search.layers import merged_grid
from diffsparse.search.perturb import sparse_callback
from diffsparse.search.projection import output_projection
from diffsparse.search.score import BlockIndex, CallScores, projection_roots, score_call
from diffsparse.search.steps import StepCounter

__all__ = [
    "Recording",
    "Sink",
    "Tracer",
    "call_levels",
    "final_latents",
    "first_step",
    "recomputing",
    "record",
    "replaying",
    "step_effect",
    "watched_updates",
]


def final_latents(pipe: Any, prompt: GenerationInput, seed: int, settings: GenerationSettings) -> torch.Tensor:
    """One generation without decoding: the final latents as fp32 on the CPU."""
    output = call_pipeline(pipe, prompt, seed, settings, "latent")
    latents = output.frames if hasattr(output, "frames") else output.images
    return torch.as_tensor(latents).detach().to("cpu", torch.float32)


def error_left(error: torch.Tensor, pairs: int) -> torch.Tensor:
    """Of block scores ``[tails, H, NB, NB]``, what the best ``pairs`` of a head leave: ``[tails, H]``."""
    flat = error.flatten(2)
    kept = flat.topk(min(pairs, flat.shape[2]), dim=2).values.sum(2)
    return flat.sum(2) - kept


class Sink(Protocol):
    """What takes a tracer's scores, call by call."""

    def wants(self, step: int, layer: str) -> bool:
        """Whether a layer's calls of a step are to be scored. Asked at each of them."""

    def add(
        self, step: int, layer: str, order: TokenOrder, heads: Sequence[int], scores: CallScores, items: int
    ) -> None:
        """Scores of some heads of a call of so many items, which are dropped after that."""

    def add_drift(self, step: int, layer: str, drift: np.ndarray) -> None:
        """How fast each head's output changes (:class:`DriftMeter`), by all of the step's calls so far."""

    def flush(self) -> None:
        """The generation is over."""


@dataclass
class Tracer:
    """Scores every step of a generation: all guidance branches, whether they run in one batch or one after another.

    ``orders``: the order to score each ``(layer, head)`` in; layers not in it are scored in the first of the
    ``screen_orders`` of their grid. ``branches``: forwards of each step, which share its samples. ``screen``: at these
    steps every one of the layer's ``screen_orders`` is scored as well, for choosing among them.

    ``sink`` takes the scores, with the true errors of masks where ``ladder`` is set; without one only orders are
    screened. Results: ``steps[s]`` the layers that were seen at
    a step; ``screened[layer]`` the summed error ``[orders, tails, H]`` with so many block pairs kept as
    ``screen_density`` of the grid would be in full blocks; ``grids[layer]`` the grid of the layer's calls, of several
    the one with most text; ``parts[s]`` the components that ran at the step; ``unseen`` the layers of which a call was
    not shown, with the reason.
    """

    pipe: Any
    block_size: int
    seed: int
    samples: int = 4
    branches: int = 1
    orders: dict[tuple[str, int], TokenOrder] = field(default_factory=dict)
    screen_orders: Callable[[TokenGrid], Sequence[TokenOrder]] = lambda grid: (RasterOrder(),)
    screen_steps: tuple[int, ...] = ()
    screen_density: float = 0.08
    counter: StepCounter = field(default_factory=StepCounter)
    steps: dict[int, set[str]] = field(default_factory=dict)
    parts: dict[int, set[str]] = field(default_factory=dict)
    screened: dict[str, np.ndarray] = field(default_factory=dict)
    grids: dict[str, TokenGrid] = field(default_factory=dict)
    unseen: dict[str, str] = field(default_factory=dict)
    head_dim: int = 0
    items: int = 1
    drift: DriftMeter = field(default_factory=DriftMeter)
    sink: Sink | None = None
    ladder: bool = True

    def __post_init__(self) -> None:
        self._calls: Counter[tuple[int, str, str]] = Counter()
        self._index: dict[tuple[TokenOrder, TokenGrid], BlockIndex] = {}
        self._roots: dict[tuple[str, str], torch.Tensor] = {}
        self._generator = torch.Generator()
        self._transformers = find_transformers(self.pipe)

    def _blocks(self, order: TokenOrder, call: Any) -> BlockIndex:
        key = (order, call.grid)
        if key not in self._index:
            self._index[key] = BlockIndex.build(call.grid, order, self.block_size, call.q.device)
        return self._index[key]

    def _root(self, call: Any) -> torch.Tensor:
        # The experts of a pipeline have layers of the same names, and each its own projection.
        key = (call.transformer, call.layer)
        if key not in self._roots:
            weight = output_projection(self._transformers[call.transformer], call.layer)
            self._roots[key] = projection_roots(weight, call.q.shape[2], call.q.shape[3], call.q.device)
        return self._roots[key]

    def _score(self, call: Any, order: TokenOrder, heads: list[int], ladder: bool) -> CallScores:
        return score_call(
            call.q,
            call.k,
            call.v,
            self._blocks(order, call),
            scale=call.scale,
            roots=self._root(call),
            samples=-(-self.samples // self.branches),
            generator=self._generator,
            key_mask=call.kv_len,
            heads=heads,
            ladder=ladder,
        )

    def look(self, call: Any) -> None:
        """Take note of a call's step, grid and component, and score nothing."""
        step = self.counter.update(call)
        self.grids[call.layer] = merged_grid(self.grids.get(call.layer), call)
        self.parts.setdefault(step, set()).add(call.transformer)
        self.head_dim = call.q.shape[3]
        self.items = max(self.items, call.q.shape[0])

    def __call__(self, call: Any) -> torch.Tensor:
        self.look(call)
        step, layer = self.counter.step, call.layer
        self.steps.setdefault(step, set()).add(layer)
        place = (step, call.transformer, layer)
        number = self._calls[place]
        self._calls[place] += 1
        # Of each call by itself: what of a generation is scored already may be left out when it runs again.
        self._generator.manual_seed(zlib.crc32(f"{self.seed} {place} {number}".encode()))
        tried = self.screen_orders(call.grid)
        heads = call.q.shape[2]
        wanted = self.sink is not None and self.sink.wants(step, layer)
        if self.sink is not None and wanted:
            groups: dict[TokenOrder, list[int]] = {}
            for head in range(heads):
                groups.setdefault(self.orders.get((layer, head), tried[0]), []).append(head)
            for order, members in groups.items():
                self.sink.add(
                    step, layer, order, members, self._score(call, order, members, self.ladder), call.q.shape[0]
                )
        out: torch.Tensor = call.dense()
        # Branches differ in text; the visual tokens of both are the same.
        visual = out.narrow(1, call.grid.text_before, call.grid.num_visual)
        drift = self.drift.add(step, (*place[1:], number), call.noise_level, visual, self._root(call))
        if self.sink is not None and wanted:
            self.sink.add_drift(step, layer, drift)
        if step in self.screen_steps:
            # The same number of block pairs in each order, for that is what takes the same time: an order whose blocks
            # are less full has more of them.
            pairs = round(self.screen_density * (call.grid.num_visual / self.block_size) ** 2)
            rows = [
                error_left(self._score(call, o, list(range(heads)), False).error, pairs).cpu().numpy() for o in tried
            ]
            self.screened[layer] = self.screened.get(layer, 0) + np.stack(rows)
        return out


@dataclass
class Recording:
    """A dense generation, kept so that it can be taken up again at any step.

    ``outputs``: what the transformers returned, in call order. ``guided``: the predictions that the scheduler was
    given, guidance included. Each with its step.
    """

    levels: list[float]
    outputs: list[tuple[int, Any]]
    guided: list[tuple[int, torch.Tensor]]
    latents: torch.Tensor

    def on(self, device: torch.device | str) -> Recording:
        """The same on another device."""
        outputs = [(step, _tree(output, lambda t: t.to(device))) for step, output in self.outputs]
        return Recording(self.levels, outputs, [(step, t.to(device)) for step, t in self.guided], self.latents)

    def first_call(self, step: int) -> int:
        """Index of a step's first model call."""
        return next(i for i, (s, _) in enumerate(self.outputs) if s == step)

    def first_update(self, step: int) -> int:
        """Index of a step's first update of the latent."""
        return next(i for i, (s, _) in enumerate(self.guided) if s == step)


def _tree(value: Any, fn: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return fn(value)
    if isinstance(value, dict):
        items = {k: _tree(v, fn) for k, v in value.items()}
        return items if type(value) is dict else type(value)(**items)
    if isinstance(value, (list, tuple)):
        return type(value)(_tree(v, fn) for v in value)
    return copy.copy(value)


def _clone(value: Any) -> Any:
    return _tree(value, lambda t: t.detach().clone())


@contextmanager
def watched_updates(pipe: Any, callback: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Within, ``callback`` gets every prediction that the scheduler is given, before it updates the latent."""
    scheduler, cls = pipe.scheduler, type(pipe.scheduler)

    # A class of its own, not an attribute: pipelines with sound step a deep copy of the scheduler, which would carry an
    # attribute along and step the original. Pipelines read the signature for what they may pass.
    @functools.wraps(cls.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is scheduler:
            callback(args[0] if args else next(iter(kwargs.values())))
        return cls.step(self, *args, **kwargs)

    scheduler.__class__ = type(cls.__name__, (cls,), {"step": step, "__module__": cls.__module__})
    try:
        yield
    finally:
        scheduler.__class__ = cls


def record(
    pipe: Any, prompt: GenerationInput, seed: int, settings: GenerationSettings, tracer: Tracer | None
) -> Recording:
    """Run a dense generation and keep what is needed to take it up again; with a tracer, score it too."""
    counter = tracer.counter if tracer else StepCounter()
    outputs: list[tuple[int, Any]] = []
    guided: list[tuple[int, torch.Tensor]] = []

    def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            outputs.append((counter.step, _clone(output)))
            return output

        return recorded

    def update(prediction: torch.Tensor) -> None:
        guided.append((counter.step, _clone(prediction)))

    # Where it is replayed: what forward hooks make of an output they make again.
    modules = list(find_transformers(pipe).values())
    originals = [(m, m.__dict__.get("forward"), m.forward) for m in modules]
    try:
        for module, _, forward in originals:
            module.forward = wrap(forward)
        with tap_attention(pipe, tracer if tracer else _counting(counter)) as tap, watched_updates(pipe, update):
            latents = final_latents(pipe, prompt, seed, settings)
        if tracer:
            tracer.unseen |= {layer: reason for (_, layer), reason in tap.unseen.items()}
    finally:
        _put_back(originals)
    return Recording(list(counter.levels), outputs, guided, latents)


def _counting(counter: StepCounter) -> Callable[[Any], None]:
    def callback(call: Any) -> None:
        counter.update(call)

    return callback


def replaying(pipe: Any, recording: Recording, until: int) -> AbstractContextManager[None]:
    """Within, the first ``until`` model calls return what was recorded instead of computing it again."""
    return recomputing(pipe, recording, range(until, sys.maxsize))


@contextmanager
def recomputing(pipe: Any, recording: Recording, calls: Container[int]) -> Iterator[None]:
    """Within, only those model calls are computed, by their place in the recording; the others return what it has."""
    modules = list(find_transformers(pipe).values())
    originals = [(m, m.__dict__.get("forward"), m.forward) for m in modules]
    position = 0

    def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def replayed(*args: Any, **kwargs: Any) -> Any:
            nonlocal position
            position += 1
            call = position - 1
            return forward(*args, **kwargs) if call in calls else _clone(recording.outputs[call][1])

        return replayed

    try:
        for module, _, forward in originals:
            module.forward = wrap(forward)
        yield
    finally:
        _put_back(originals)


def call_levels(pipe: Any, prompt: GenerationInput, seed: int, settings: GenerationSettings) -> list[float]:
    """The noise level of every model call of a generation, in order.

    The pipeline itself is asked, since only it knows which levels it runs: sigmas of its own, a shift that depends on
    the size, schedulers that call the model twice in a step. The transformers are computed once for each shape of
    their inputs, and that output stands for the others.
    """
    modules = list(find_transformers(pipe).values())
    originals = [(m, m.__dict__.get("forward"), m.forward) for m in modules]
    levels: list[float] = []
    known: dict[Any, Any] = {}

    def wrap(module: torch.nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            assert CTX.call is not None  # set by the hooks of the tap
            levels.append(CTX.call.noise_level)
            key = (module, _shapes((args, tuple(kwargs.items()))))
            if key not in known:
                known[key] = _clone(forward(*args, **kwargs))
            return _clone(known[key])

        return called

    try:
        for module, _, forward in originals:
            module.forward = wrap(module, forward)
        with tap_attention(pipe, lambda call: None):
            final_latents(pipe, prompt, seed, settings)
    finally:
        _put_back(originals)
    return levels


def _shapes(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.shape
    return tuple(_shapes(v) for v in value) if isinstance(value, (list, tuple)) else type(value)


def _put_back(originals: list[tuple[torch.nn.Module, Any, Any]]) -> None:
    for module, own, _ in originals:
        if own is None:
            del module.forward
        else:
            module.forward = own


class _Reached(Exception):
    """A generation came to the update that was waited for."""


def first_step(
    pipe: Any, prompt: GenerationInput, seed: int, settings: GenerationSettings, callback: Callable[[Any], None]
) -> dict[str, str]:
    """Show the attention calls of a generation's first step to ``callback``, and end it there.

    A generation of one step would not do: some schedulers cannot make one. Returns layers of which a call was not
    shown, with the reason.
    """

    def stop(prediction: torch.Tensor) -> None:
        raise _Reached

    with suppress(_Reached), tap_attention(pipe, callback) as tap, watched_updates(pipe, stop):
        final_latents(pipe, prompt, seed, settings)
    return {layer: reason for (_, layer), reason in tap.unseen.items()}


def step_effect(
    pipe: Any,
    recording: Recording,
    prompt: GenerationInput,
    seed: int,
    settings: GenerationSettings,
    step: int,
    layouts: Callable[[Any], BlockLayout | None],
) -> float:
    """Squared change of the prediction that the scheduler gets at a recorded step when its calls run with ``layouts``.

    Guidance is part of it: what an error does alike to both branches passes through once, what it does to their
    difference is multiplied by the guidance scale.
    """
    wanted, found = recording.first_update(step), []
    seen = 0

    def update(prediction: torch.Tensor) -> None:
        nonlocal seen
        if seen == wanted:
            found.append(prediction)
            raise _Reached
        seen += 1

    with (
        suppress(_Reached),
        replaying(pipe, recording, recording.first_call(step)),
        tap_attention(pipe, sparse_callback(layouts)),
        watched_updates(pipe, update),
    ):
        final_latents(pipe, prompt, seed, settings)
    return float((found[0].double() - recording.guided[wanted][1].double()).square().sum())
