"""One forward of an enabled transformer: its grid, noise level and phase, and what its layers did."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from diffsparse.blocks import BlockIndex
from diffsparse.grid import TokenGrid
from diffsparse.kernels.clock import Watch, start_watch
from diffsparse.layout import BlockLayout
from diffsparse.pipelines.context import CTX
from diffsparse.pipelines.policy import (
    BY_PLAN,
    FOREIGN,
    NOT_READY,
    OTHER_KEYS,
    OUTSIDE,
    RAN_SPARSE,
    UNKNOWN,
    UNSEEN,
)
from diffsparse.pipelines.reuse import Group, ReuseStep
from diffsparse.pipelines.state import LayerState, ModelState

if TYPE_CHECKING:
    from diffsparse.pipelines.whole import Whole

__all__ = ["Call", "call_of", "running_call"]

COMPILED = "compiled"


@dataclass(eq=False)
class Call:
    """Lives in the thread-local context from the root's pre-hook to its post-hook.

    ``config``: the model's, for families whose layers see different grids.
    ``problem``: why nothing of this forward can run sparse (an unknown grid), or None.
    ``phase``: the plan's phase, or None where the schedule says dense.
    ``no_kernel``: why backend ``"auto"`` has no kernel for this model here, or None.
    ``reuse``: this forward to what is kept of others; None where nothing is used again.
    ``recalled``: of layers in compiled code, the heads whose outputs are.
    ``whole``: what was decided of the layer that is running, where its q, k and v are stand-ins.
    ``picked``: of layers whose blocks are picked from q and k, the density of each call, on its device.
    """

    state: ModelState
    grid: TokenGrid | None
    noise_level: float
    phase: int | None
    batch: int
    config: Any = None
    problem: str | None = None
    no_kernel: str | None = None
    previous: Call | None = None
    frame: FrameType | None = None
    # layer index -> (density executed, work of the dense call, why dense, backend or dense kernel)
    events: dict[int, list[tuple[float | torch.Tensor | None, float, str, str]]] = field(default_factory=dict)
    watches: list[tuple[int, str, Watch]] = field(default_factory=list)
    foreign: set[int] = field(default_factory=set)
    compiled: frozenset[int] = frozenset()
    device: torch.device | None = None
    number: int | None = None  # a tap's count of forwards
    reuse: ReuseStep | None = None
    recalled: dict[int, tuple[Group, ...]] = field(default_factory=dict)
    whole: Whole | None = None
    reused_heads: Counter[int] = field(default_factory=Counter)
    without_projections: Counter[int] = field(default_factory=Counter)
    picked: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    _exchanged: Counter[int] = field(default_factory=Counter)

    def is_running(self) -> bool:
        """Whether the forward is still on the stack.

        Hooks cannot tell. torch calls the hook after a forward on an ``Exception``, but not on a KeyboardInterrupt or
        another ``BaseException``. A later attention call then looks to every hook like the next one of that forward,
        and a model that was never enabled could be taken for a layer of ours. What dies with the forward does not tell
        either: a notebook keeps the traceback of an interrupt, and with it all that the forward held. A ``finally``
        around the forward would have to be on the instance, where offloading takes it off again and shallow copies run
        the original, or on the class, where models that were compiled before pass it by.
        """
        own = self.frame
        if own is None:  # compiled
            return True
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not own:
            frame = frame.f_back
        return frame is own

    def grid_of(self, index: int, seq: int | None = None) -> TokenGrid | None:
        """The grid of one layer's call, with ``seq`` tokens where that is known and the family takes text from it."""
        grid, family = self.grid, self.state.family
        if grid is None:
            return None
        if self.state.layers[index].visual_only:
            return grid.visual_only()
        if family.layer_grid is not None:
            return family.layer_grid(self.config, self.state.layers[index].name, grid)
        if seq is not None and family.text_from_call and seq != grid.seq_len:
            before = family.text_position == "before"
            text = seq - grid.num_visual - (grid.text_after if before else grid.text_before)
            if text >= 0:
                return replace(grid, text_before=text) if before else replace(grid, text_after=text)
        return grid

    def layout(
        self,
        index: int,
        device: torch.device,
        uniform: bool = False,
        seq: int | None = None,
        recalled: tuple[Group, ...] = (),
    ) -> BlockLayout | str:
        """One layer's layout, or why it runs dense by the plan's word. ``recalled``: heads it need not compute."""
        grid = self.grid_of(index, seq)
        if self.phase is None or grid is None:
            return OUTSIDE
        if self.no_kernel is not None:
            return self.no_kernel
        return self.state.layout(grid, self.phase, index, device, uniform, _values(recalled))

    def without_dense_heads(
        self,
        index: int,
        device: torch.device,
        uniform: bool = False,
        seq: int | None = None,
        recalled: tuple[Group, ...] = (),
    ) -> tuple[BlockLayout, torch.Tensor] | None:
        """Where dense heads may run apart: the layout that skips them, and which they are."""
        grid = self.grid_of(index, seq)
        if self.state.dense is None or self.phase is None or grid is None or self.no_kernel is not None:
            return None
        return self.state.without_dense_heads(grid, self.phase, index, device, uniform, _values(recalled))

    def groups(self, index: int) -> tuple[Group, ...]:
        """The heads of a layer whose outputs are used again in this forward's phase."""
        grid = self.grid_of(index)
        return () if self.reuse is None or grid is None else self.state.groups(grid, self.reuse.phase, index)

    def served(self, index: int, shape: Sequence[int]) -> tuple[Group, ...]:
        """The heads of a layer's next call, ``[B, S, H, D]``, that need not be computed."""
        groups = self.groups(index)
        if self.reuse is None:
            return ()
        return self.state.reuse.recalled(self.reuse, index, self._exchanged[index], groups, shape) if groups else ()

    def held_shape(self, index: int, groups: tuple[Group, ...]) -> tuple[int, ...] | None:
        """The shape ``(B, S, D)`` of what serves all ``groups`` of a layer's next call, or None."""
        if self.reuse is None or not groups:
            return None
        return self.state.reuse.shape_of(self.reuse, index, self._exchanged[index], groups)

    def exchange(self, index: int, out: torch.Tensor, recalled: tuple[Group, ...]) -> None:
        """Put outputs of earlier steps into a layer's ``[B, S, H, D]``, and keep those that later ones will need.

        ``recalled``: what :meth:`served` said of this call, or nothing where all heads were computed.
        """
        if self.reuse is None or not (groups := self.groups(index)):
            return
        self.state.reuse.exchange(out, self.reuse, index, self._exchanged[index], groups, recalled)
        self._exchanged[index] += 1
        self.reused_heads[index] += sum(len(group.heads) for group in recalled)

    def pick(
        self,
        index: int,
        layout: BlockLayout,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float | None,
    ) -> tuple[BlockIndex, torch.Tensor]:
        """The blocks of a layer's next call, ``[B, S, H, D]``, as its rules pick them, and the call's density."""
        before = self.picked.setdefault(index, [])
        factor = float(q.shape[-1] ** -0.5 if scale is None else scale)
        found, density = self.state.reuse.picks.pick(self.reuse, index, len(before), layout, q, k, v, factor)
        before.append(density)
        return found, density

    def start_watch(self, device: torch.device) -> Watch | None:
        """For the call that comes next, where it can be timed."""
        return start_watch(device, self.state.timing)

    def has_picked(self, index: int, watch: Watch | None) -> None:
        """Count the time that picking a call's blocks took; the call's own time has it too."""
        if watch is not None:
            watch.stop()
            self.watches.append((index, "pick", watch))

    def ran_sparse(
        self, index: int, shape: torch.Size, density: float | torch.Tensor, backend: str, watch: Watch | None
    ) -> None:
        """Count a sparse call. ``shape``: of its queries, ``[B, S, H, D]``."""
        self.events.setdefault(index, []).append((density, _work(shape), "", backend))
        if watch is not None:
            watch.stop()
            self.watches.append((index, "sparse", watch))

    def run_dense(
        self,
        index: int,
        shape: torch.Size,
        device: torch.device,
        reason: str,
        dense: Callable[[], torch.Tensor],
        *,
        issue: bool,
        by: str = "",
    ) -> torch.Tensor:
        """The output of a dense call, which is counted with its reason. ``by``: the kernel where it was chosen."""
        self.events.setdefault(index, []).append((None, _work(shape), reason, by))
        if issue:
            self.state.log(f"runs dense: {reason}")
        watch = self.start_watch(device)
        out = dense()
        if watch is not None:
            watch.stop()
            self.watches.append((index, "dense", watch))
        return out

    def finish(self, complete: bool, cached: bool) -> None:
        """Add this forward to the model's counters.

        ``complete``: it raised no error. ``cached``: diffusers' hooks are on the model, and may have skipped layers.
        """
        state = self.state
        if state.tap is not None:
            return
        unseen = ""
        ran = {layer.index: self.events.get(layer.index, []) + self._compiled_events(layer) for layer in state.layers}
        with state.counting() as counts:
            state.forwards += 1
            state.pending.extend(self.watches)
            for layer in state.layers:
                events = ran[layer.index]
                if not events and complete:
                    unseen = UNSEEN
                    if layer.index in self.foreign:
                        unseen = FOREIGN
                    elif layer.index in self.compiled:
                        unseen = UNKNOWN
                    counts[layer.index].unseen += 1
                counts[layer.index].reused_heads += self.reused_heads[layer.index]
                counts[layer.index].without_projections += self.without_projections[layer.index]
                for density, work, reason, backend in events:
                    count = counts[layer.index]
                    count.work += work
                    if density is None:
                        count.dense_calls += 1
                        count.done += work
                        count.reasons[reason] += 1
                        if backend:
                            count.dense_kernels[backend] += 1
                    else:
                        count.sparse_calls += 1
                        count.add_density(density, work)
                        count.backends[backend] += 1
        if unseen and not cached:
            state.log(f"some layers run dense: {unseen}")

    def _compiled_events(self, layer: LayerState) -> list[tuple[float | torch.Tensor | None, float, str, str]]:
        """What a layer ran in compiled code, by the notes that it left: counters live outside traced code."""
        events: list[tuple[float | torch.Tensor | None, float, str, str]] = []
        layout, picked = layer.layout, iter(self.picked.get(layer.index, ()))
        notes = layer.notes()
        # Models whose text is known in the call only call attention item by item: together they are the batch.
        items = self.batch / len(notes) if notes and self.state.family.text_from_call else self.batch
        for what, kernel in notes:
            if what == OTHER_KEYS and (self.problem is None or events):
                self.foreign.add(layer.index)
                continue
            grid = self.grid_of(layer.index)
            work = float(items * self.state.heads * (grid.seq_len**2 if grid else 0))
            if what == RAN_SPARSE and layout is not None:
                events.append((next(picked, layout.density), work, "", COMPILED))
                continue
            reason = self.problem or (what if layout is not None else self._reason_by_plan(layer))
            if self.problem is not None or layout is not None:
                self.state.log(f"runs dense: {reason}")
            events.append((None, work, reason, kernel if what == BY_PLAN else ""))
        return events

    def _reason_by_plan(self, layer: LayerState) -> str:
        found = self.layout(layer.index, self.device or torch.device("cpu"), uniform=True)
        return found if isinstance(found, str) else NOT_READY


def running_call() -> Call | None:
    """The innermost forward of this thread that is still running. What an interrupt left behind is dropped."""
    call = CTX.call
    while call is not None and not call.is_running():
        call = call.previous
    CTX.call = call
    return call


def call_of(layer: LayerState) -> Call | None:
    """The running forward that a layer is part of; None where the layer is called on its own, and so has no grid."""
    call = CTX.call
    if call is not None and not call.is_running():
        call = running_call()
    while call is not None and not call.state.owns(layer):
        call = call.previous
    return call


def _values(groups: tuple[Group, ...]) -> tuple[float, ...]:
    return tuple(group.reuse for group in groups)


def _work(shape: torch.Size) -> float:
    batch, seq, heads, _ = shape
    return float(batch * heads * seq * seq)
