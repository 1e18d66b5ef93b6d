"""What an enabled model carries: on the transformer a :class:`ModelState`, on every attention module a `LayerState`.

Both are plain attributes of the modules, so they are not in the state dict, are copied and pickled with the model, and
are freed with it. Nothing of them is kept on a class or in the process.
"""

from __future__ import annotations

import inspect
import logging
import threading
import weakref
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from diffsparse.entry import HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.kernels.break_even import work_of
from diffsparse.kernels.clock import Watch
from diffsparse.layout import BlockLayout, build_layout
from diffsparse.pipelines.counts import LayerCounts
from diffsparse.pipelines.dense import DenseChoice
from diffsparse.pipelines.family import Family, architecture_of, family_by_class, layers_of
from diffsparse.pipelines.layout_cache import LayoutCache
from diffsparse.pipelines.phases import PhaseFinder
from diffsparse.pipelines.policy import SLOWER, Machine, entries_of, judge_layer, machine_for
from diffsparse.pipelines.reuse import Group, ReuseStore, groups_of
from diffsparse.pipelines.shares import Share, as_they_lie, deal_heads, imbalance
from diffsparse.pipelines.uniform import alike, mark_sizes
from diffsparse.plan import Architecture, SparsityPlan

__all__ = [
    "LAYER_STATE",
    "MODEL_STATE",
    "LayerState",
    "ModelState",
    "state_of",
]

logger = logging.getLogger("diffsparse")

#: Names of the attributes.
MODEL_STATE = "_diffsparse_root"
LAYER_STATE = "_diffsparse"

# Block lists of long videos are large (0.35 MB a head at 75,600 tokens and density 0.25), so on a GPU a layer whose
# lists could take more than this is kept packed. All blocks are counted, so that a plan's layers go one way together.
PACKED_FROM = 16 * 2**20
# Watches that the GPU has not passed yet: far more than a forward has calls; beyond it the oldest are given up.
MAX_PENDING = 16384


def _left_out(entry: HeadEntry) -> HeadEntry:
    """The same head where it computes nothing. Its order stays: compiled layers share a graph."""
    return replace(entry, execution=replace(entry.execution, mode="skip", reuse=0.0))


def _is_packed(device: torch.device, grid: TokenGrid, heads: int, block_size: int) -> bool:
    return device.type == "cuda" and 4 * heads * (grid.seq_len // block_size) ** 2 > PACKED_FROM


# Attributes of a state that a copy has anew.
# fmt: off
_OWN = frozenset((
    "layouts", "reuse", "rules", "phases", "_groups", "_whole", "machines", "lock", "tap",
    "installed", "share", "uneven", "_dealt", "deals", "_pipe", "schedule", "pending",
))
# fmt: on


@dataclass(eq=False)
class LayerState:
    """What one attention module needs to know. ``layout`` is for compiled code, which cannot look it up by name."""

    name: str
    index: int
    backend: str = "auto"
    visual_only: bool = False  # no text in this layer's sequences, though there is in other layers'
    text_from_call: bool = False  # the number of text tokens is known in the call only, which compiled code is not
    layout: BlockLayout | None = None
    dense_kernel: str | None = None  # for compiled code too; None is the model's own attention
    masked_dense_kernel: str | None = None
    dense_heads: torch.Tensor | None = None  # bool [H] on the CPU: heads that ``layout`` leaves to ``dense_kernel``
    reuse: torch.Tensor | None = None  # the index on the CPU, where outputs are used again: for compiled code
    picks: torch.Tensor | None = None  # the same, where any head of the plan has its blocks picked from q and k
    share: Share | None = None  # where processes share the layer's heads; and what diffusers knows of them
    parallel_config: Any = None
    order: torch.Tensor | None = None  # int64 [S], see `Share.canonical`, and back
    order_back: torch.Tensor | None = None
    deal: torch.Tensor | None = None  # int64 [H], heads in the order in which processes get them, and back
    deal_back: torch.Tensor | None = None
    # What compiled code did in this forward: (what it did before, what it did last, the dense kernel for such a call).
    ran: tuple[Any, str, str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        own = (
            "layout",
            "dense_heads",
            "reuse",
            "picks",
            "ran",
            "share",
            "parallel_config",
            "order",
            "order_back",
            "deal",
            "deal_back",
        )
        return {**self.__dict__, **dict.fromkeys(own)}

    def notes(self) -> list[tuple[str, str]]:
        """What compiled code did in this forward, call by call: what, and the dense kernel for such a call."""
        found, ran = [], self.ran
        while ran is not None:
            ran, what, kernel = ran
            found.append((what, kernel))
        return found[::-1]


class ModelState:
    """The plan of one transformer (None while only a tap is attached), its layouts and its counters."""

    def __init__(
        self,
        transformer: torch.nn.Module,
        *,
        component: str = "transformer",
        pipe: Any = None,
        plan: SparsityPlan | None = None,
        source: str = "",
        backend: str = "auto",
        skipped: dict[str, str] | None = None,
        tap: Any = None,
        timing: bool = False,
        dense_backend: str | None = None,
    ) -> None:
        self.component = component
        self.architecture: Architecture = architecture_of(transformer)
        self.family_class = type(transformer).__name__
        self.plan = plan
        self.source = source
        self.backend = backend
        self.skipped = skipped or {}
        self.timing = timing
        self.dense = DenseChoice() if dense_backend == "fastest" else None
        family = self.family
        self.layers = [
            LayerState(name, i, backend, family.is_visual_only(name), family.text_from_call)
            for i, name in enumerate(layers_of(transformer))
        ]
        self.arguments = tuple(p for p in inspect.signature(type(transformer).forward).parameters if p != "self")
        self.num_train_timesteps = 1000
        self.counts = [LayerCounts() for _ in self.layers]
        self.forwards = 0
        self.grids: Counter[TokenGrid] = Counter()
        self.carried: dict[TokenGrid, int] = {}
        self.reasons_logged: set[str] = set()
        self._fresh(pipe, tap)

    def _fresh(self, pipe: Any = None, tap: Any = None) -> None:
        """What belongs to this object alone, and is made anew for a copy."""
        self.layouts = LayoutCache()
        self.reuse = ReuseStore()
        self.rules = () if self.plan is None else self.plan.rules
        self.phases = PhaseFinder()
        self._groups: dict[Any, tuple[Group, ...]] = {}
        self._whole: dict[tuple[int, int], bool] = {}
        self.machines: dict[tuple[torch.device, torch.dtype, tuple[str, ...]], Machine] = {}
        self.lock = threading.Lock()
        self.tap = tap
        self.share: Share | None = None
        self.uneven = 1.0
        self._dealt: dict[Any, list[tuple[int, ...]]] = {}
        #: Whether heads of a layer may differ in cost, so that it is to be told which process computes which.
        self.deals = self.plan is not None and bool((self.plan.index != self.plan.index[..., :1]).any())
        self.hooked_parts = True  # projections may have hooks (`whole.py`); a copy's have those of its original
        self.installed = False  # the pass-through functions in the modules that define the model
        # A strong reference would make a deep copy of the transformer copy the whole pipeline.
        self._pipe = weakref.ref(pipe) if pipe is not None else None
        self.schedule: tuple[Any, list[float]] | None = None
        self.pending: deque[tuple[int, str, Watch]] = deque(maxlen=MAX_PENDING)
        scheduler = self.scheduler
        if scheduler is not None:
            self.num_train_timesteps = int(scheduler.config.get("num_train_timesteps", self.num_train_timesteps))

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in _OWN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        from diffsparse.pipelines.patch import install_patch

        self.__dict__.update(state)
        self._fresh()
        install_patch()  # it may come out of a pickle, in a process that has enabled nothing yet

    @property
    def family(self) -> Family:
        """Looked up by class, so that a state can be pickled whatever functions the family has."""
        return family_by_class(self.architecture.model_class)

    @property
    def scheduler(self) -> Any:
        """The pipeline's scheduler at this moment, or None."""
        pipe = self._pipe() if self._pipe is not None else None
        scheduler = getattr(pipe, "scheduler", None)
        return scheduler if hasattr(scheduler, "config") else None

    def owns(self, layer: LayerState) -> bool:
        """Whether the layer is one of this model's."""
        return layer.index < len(self.layers) and self.layers[layer.index] is layer

    def machine(self, device: torch.device, dtype: torch.dtype, tails: tuple[str, ...] = ()) -> Machine:
        """What kernels can do for this model's tensors, worked out once. ``tails``: see ``policy.machine_for``."""
        key = (device, dtype, tails)
        found = self.machines.get(key)
        if found is None:
            found = machine_for(self.backend, device, dtype, self.architecture.head_dim, tails)
            self.machines[key] = found
        return found

    # -- layouts ---------------------------------------------------------------------------------------------------

    @property
    def heads(self) -> int:
        """Heads of a layer's call, as this process sees it."""
        heads = self.architecture.heads
        return heads if self.share is None else self.share.counts(heads)[self.share.rank]

    def take_share(self, share: Share | None) -> None:
        """Compute this part of every layer's heads from now on."""
        if share == self.share:
            return
        self.share, self.uneven = share, 1.0
        self.layouts = LayoutCache()
        self.reuse.clear()
        self._groups, self._whole, self._dealt = {}, {}, {}

    def dealt(self, grid: TokenGrid, phase: int | None, index: int) -> list[tuple[int, ...]]:
        """The heads of a layer that each process computes, in its own order."""
        assert self.share is not None
        key = (grid, phase, index)
        if key not in self._dealt:
            entries = self._entries(phase, index)
            costs = [1.0] * self.architecture.heads
            if self.plan is not None and not isinstance(entries, str) and len(set(entries)) > 1:
                costs = list(build_layout(grid, entries, self.plan.block_size, packed=True).densities)
            counts = self.share.counts(self.architecture.heads)
            found = self._dealt[key] = deal_heads(costs, counts) if self.share.exchanges else as_they_lie(counts)
            self.uneven = max(self.uneven, imbalance(costs, found))
        return self._dealt[key]

    def _entries(self, phase: int | None, index: int) -> tuple[HeadEntry, ...] | str:
        """All heads' entries of a layer, or why it runs dense."""
        name = self.layers[index].name
        if self.plan is None or name in self.skipped:
            return self.skipped.get(name, "")
        return entries_of(self.plan, phase, name, self.architecture.heads)

    def _own(self, entries: tuple[HeadEntry, ...], grid: TokenGrid, phase: int, index: int) -> tuple[HeadEntry, ...]:
        if self.share is None:
            return entries
        return tuple(entries[h] for h in self.dealt(grid, phase, index)[self.share.rank])

    def groups(self, grid: TokenGrid, phase: int, index: int) -> tuple[Group, ...]:
        """The heads of a layer whose outputs are used again in a phase."""
        key = (None if self.share is None else grid, phase, index)
        if key not in self._groups:
            entries = self._entries(phase, index)
            self._groups[key] = () if isinstance(entries, str) else groups_of(self._own(entries, grid, phase, index))
        return self._groups[key]

    def is_whole(self, grid: TokenGrid, phase: int, index: int) -> bool:
        """Whether all heads of a layer use outputs of earlier steps in a phase, but for those that are left out.

        Never where processes share the heads: each has other ones, and all have to take part in the exchange.
        """
        if self.share is not None:
            return False
        if (phase, index) not in self._whole:
            grouped = {head for group in self.groups(grid, phase, index) for head in group.heads.tolist()}
            found = bool(grouped)
            if found and self.plan is not None:
                entries = self.plan.layer_entries(phase, self.layers[index].name, self.architecture.heads) or ()
                found = all(h in grouped or e.execution.mode == "skip" for h, e in enumerate(entries))
            self._whole[phase, index] = found
        return self._whole[phase, index]

    def layout(
        self,
        grid: TokenGrid,
        phase: int,
        index: int,
        device: torch.device,
        uniform: bool = False,
        recalled: tuple[float, ...] = (),
    ) -> BlockLayout | str:
        """One layer's block lists on a device, or why the layer runs dense here.

        ``uniform``: made so that compiled layers share a graph. ``recalled``: heads with these values of ``reuse`` are
        left out, because outputs of an earlier step take their place.
        """
        return self.layouts.get(
            (grid, phase, device, uniform),
            (index, recalled),
            lambda: self._build(grid, phase, index, device, uniform, recalled),
        )

    def without_dense_heads(
        self,
        grid: TokenGrid,
        phase: int,
        index: int,
        device: torch.device,
        uniform: bool = False,
        recalled: tuple[float, ...] = (),
    ) -> tuple[BlockLayout, torch.Tensor] | None:
        """One layer's layout with its dense heads skipped, and which those are: bool ``[H]`` on the CPU.

        None where the plan gives the layer no dense heads beside sparse ones.
        """
        assert self.plan is not None
        layout = self.layout(grid, phase, index, device, uniform, recalled)
        entries = entries_of(self.plan, phase, self.layers[index].name, self.architecture.heads)
        if isinstance(layout, str) or isinstance(entries, str):
            return None
        entries = self._own(entries, grid, phase, index)
        if not any(e.is_dense for e in entries):
            return None

        def build() -> tuple[BlockLayout, torch.Tensor]:
            heads = torch.tensor([entry.is_dense for entry in entries])
            return replace(layout, heads=layout.heads.skipping(heads)), heads

        kind = entries if self.plan.fitted_repair is None else index
        found: tuple[BlockLayout, torch.Tensor] = self.layouts.get(
            (grid, phase, device, uniform), ("without dense heads", kind, recalled), build
        )
        return found

    def _build(
        self,
        grid: TokenGrid,
        phase: int,
        index: int,
        device: torch.device,
        uniform: bool,
        recalled: tuple[float, ...],
    ) -> BlockLayout | str:
        assert self.plan is not None
        entries = self._entries(phase, index)
        if isinstance(entries, str):
            return entries
        own = self._own(entries, grid, phase, index)
        entries = tuple(_left_out(e) if e.execution.reuse in recalled else e for e in own)
        found: BlockLayout | str = self.layouts.get(
            (grid, phase, device, uniform), entries, lambda: self._expand(grid, entries, device, uniform)
        )
        maps = self.plan.fitted_repair
        if maps is None or isinstance(found, str):
            return found
        # Every layer that runs sparse has one, of zeros where it needs to: compiled layers share a graph.
        repair = maps.of_layer(phase, self.plan.layers.index(self.layers[index].name))
        if self.share is not None:
            repair = repair.heads(self.dealt(grid, phase, index)[self.share.rank])
        return found.repaired(repair.to(device))

    def _expand(
        self, grid: TokenGrid, entries: tuple[HeadEntry, ...], device: torch.device, uniform: bool
    ) -> BlockLayout | str:
        assert self.plan is not None
        packed = _is_packed(device, grid, len(entries), self.plan.block_size)
        layout = build_layout(grid, entries, self.plan.block_size, packed=packed)
        if self.plan.online_repair is not None:
            layout = layout.repaired(self.plan.online_repair)
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        machine = self.machine(device, dtype, layout.heads.tails)
        found = judge_layer(work_of(layout), layout.seq_len, machine)
        if found.reason == SLOWER and machine.table is not None:
            self.log(
                f"layers whose blocks take longer than dense attention at {layout.seq_len} tokens stay dense, by the "
                f"break-even table of {machine.table.device}; backend={machine.table.backend!r} runs them sparse all "
                "the same"
            )
        if found.reason is not None:
            return found.reason
        if uniform:
            return mark_sizes(alike(layout, self.plan).to(device))
        return layout.to(device)

    # -- counting --------------------------------------------------------------------------------------------------

    def saw_grid(self, grid: TokenGrid) -> None:
        """Count a forward on this grid, and find out how many bitmaps were measured on another."""
        with self.lock:
            self.grids[grid] += 1
            if grid in self.carried or self.plan is None:
                return
            plan = self.plan
            affected = [e.pattern.is_carried(grid, e.order, plan.block_size) for e in plan.entries]
            self.carried[grid] = int(sum(affected[i] for i in plan.index.reshape(-1).tolist()))
        if count := self.carried[grid]:
            self.log(f"{count} bitmap heads were measured on another grid than {grid}: their masks are carried over")

    def log(self, message: str) -> None:
        """One line per model and message."""
        with self.lock:
            if message in self.reasons_logged:
                return
            self.reasons_logged.add(message)
        logger.warning("%s (%s): %s", self.component, self.family_class, message)

    @contextmanager
    def counting(self) -> Iterator[list[LayerCounts]]:
        """The counters, held against other threads; times that are known by now are added to them."""
        with self.lock:
            self._collect_times()
            yield self.counts

    def _collect_times(self) -> None:
        """Read the watches whose calls have ended. Calls end in the order they were made, so it stops at the first."""
        while self.pending:
            index, what, watch = self.pending[0]
            seconds = watch.seconds()
            if seconds is None:
                return
            self.pending.popleft()
            count = self.counts[index]
            if what == "sparse":
                count.sparse_seconds += seconds
                count.timed_sparse += 1
            elif what == "pick":
                count.pick_seconds += seconds
                count.timed_picks += 1
            else:
                count.dense_seconds += seconds
                count.timed_dense += 1


def state_of(transformer: torch.nn.Module) -> ModelState | None:
    """The state of an enabled (or tapped) transformer, or None."""
    state = getattr(transformer, MODEL_STATE, None)
    return state if isinstance(state, ModelState) else None
