"""What a search holds by typed names: what is asked for, and what was measured by now. No model is needed for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from tqdm import tqdm

from diffsparse.grid import TokenGrid
from diffsparse.kernels.costs import CostTable
from diffsparse.order import TokenOrder, parse_order
from diffsparse.pipelines.policy import Machine
from diffsparse.plan import Architecture
from diffsparse.search.config import SearchConfig
from diffsparse.search.facts import Facts
from diffsparse.search.options import FamilyTable
from diffsparse.search.section import Section
from diffsparse.search.store import SearchStore
from diffsparse.search.stored_scores import StoredScores

__all__ = ["Probe", "Stage", "StoredSearch", "Tried", "Validation"]


class Stage:
    """One stage's bar, and whoever else follows how far it is."""

    def __init__(self, total: int, label: str, progress: bool, on_stage: Callable[[str, int, int], None]) -> None:
        self._bar = tqdm(total=total, desc=label, disable=not progress, leave=True)
        self._label, self._total, self._done, self._on_stage = label, total, 0, on_stage

    def __enter__(self) -> Stage:
        self._on_stage(self._label, 0, self._total)
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()

    def update(self, count: int = 1) -> None:
        """Some more parts are done; never more than there are."""
        self.reach(self._done + count)

    def reach(self, done: int) -> None:
        """So many parts are done, if they were not before."""
        done = min(done, self._total)
        if done > self._done:
            self._bar.update(done - self._done)
            self._done = done
            self._on_stage(self._label, done, self._total)


@dataclass(frozen=True)
class Probe:
    """What the first few steps of one generation tell.

    ``grids``, ``orders``: of the layers that are searched, in the model's order; a layer's orders by head.
    ``branches``: model calls of a step; ``items``: in the batch of one. ``forward_seconds``: of one of them. ``size``:
    height and width in pixels that the pipeline prepared latents for, or None. ``dense``: the other layers, with the
    reason why they stay dense. ``peak_bytes``: the most GPU memory that the dense generation took, 0 on a CPU.
    ``prompts``: how many are traced. ``samples``: queries of every block that are measured in a step. ``tails``: of the
    searched layers' heads, the tail by which each one's measured masks are made.
    """

    grids: dict[str, TokenGrid]
    orders: dict[str, tuple[TokenOrder, ...]]
    branches: int
    forward_seconds: float
    head_dim: int
    size: tuple[int, int] | None
    dense: dict[str, str]
    items: int = 1
    peak_bytes: int = 0
    prompts: int = 2
    samples: int = 4
    tails: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "grids": {n: [*g.shape, g.text_before, g.text_after] for n, g in self.grids.items()},
            "orders": {n: [str(order) for order in orders] for n, orders in self.orders.items()},
            "branches": self.branches,
            "forward_seconds": self.forward_seconds,
            "head_dim": self.head_dim,
            "size": None if self.size is None else list(self.size),
            "dense": self.dense,
            "items": self.items,
            "peak_bytes": self.peak_bytes,
            "prompts": self.prompts,
            "samples": self.samples,
            "tails": {n: list(tails) for n, tails in self.tails.items()},
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Probe:
        return cls(
            grids={n: TokenGrid(*sizes) for n, sizes in data["grids"].items()},
            orders={n: tuple(map(parse_order, orders)) for n, orders in data["orders"].items()},
            branches=data["branches"],
            forward_seconds=data["forward_seconds"],
            head_dim=data["head_dim"],
            size=None if data["size"] is None else (data["size"][0], data["size"][1]),
            dense=data["dense"],
            items=data["items"],
            peak_bytes=data["peak_bytes"],
            prompts=data["prompts"],
            samples=data["samples"],
            tails={n: tuple(tails) for n, tails in data["tails"].items()},
        )


@dataclass(frozen=True)
class Validation:
    """A plan's clip against its dense twin.

    ``psnr`` in dB; ``ssim`` is None where the picture is too small for it; ``speedup`` of the denoising loop.
    """

    psnr: float
    ssim: float | None
    speedup: float


@dataclass(frozen=True)
class Tried:
    """A plan that was validated: its digest, and what it was composed for.

    ``base``: the digest without the maps of its repair. ``time``: of its attention over dense, as predicted.
    ``candidates``: among how many it was chosen.
    """

    plan: str
    base: str
    budget: float | None
    density: float | None
    time: float
    candidates: int


class StoredSearch(StoredScores):
    """Reads and writes what was measured, through the names here.

    ``num_prompts``: how many inputs the search was given.
    """

    _also: StoredSearch | None = None

    def __init__(
        self,
        architecture: Architecture,
        num_prompts: int,
        config: SearchConfig,
        store: SearchStore,
        progress: bool,
        say: Callable[[str], None],
        on_stage: Callable[[str, int, int], None],
    ) -> None:
        super().__init__()
        self.architecture, self.num_prompts, self.config, self.store = architecture, num_prompts, config, store
        self.progress, self.say, self.on_stage = progress, say, on_stage
        self.tables: dict[tuple[TokenGrid, TokenOrder], FamilyTable] = {}

    def bar(self, total: int, label: str) -> Stage:
        return Stage(total, label, self.progress, self.on_stage)

    # -- the second size -------------------------------------------------------------------------------------------

    @property
    def also(self) -> StoredSearch | None:
        """The same search at the second size, where there is one: what is measured there, of two generations."""
        size = self.config.also_size
        if size is None or self._also is not None:
            return self._also
        height, width, frames = size
        config = replace(self.config, height=height, width=width, num_frames=frames, also_size=None)
        self._also = self._other_size(config, Section(self.store, "also/"))
        self._also.parts = self.parts  # of the same steps
        return self._also

    def _other_size(self, config: SearchConfig, store: Section) -> StoredSearch:
        return StoredSearch(self.architecture, 2, config, store, self.progress, self.say, self.on_stage)

    def probe_at(self, grids: dict[str, TokenGrid]) -> Probe:
        """What is known of the second size when its grids are."""
        return replace(self.probe, grids=grids, prompts=2, size=None)

    # -- what the pipeline told ------------------------------------------------------------------------------------

    @property
    def facts(self) -> Facts:
        """Known when everything is measured that a plan is composed from."""
        return self.store.read_json("facts", Facts.from_dict)

    def put_facts(self, facts: Facts) -> None:
        self.store.put_json("facts", facts.to_dict())

    def call_levels(self) -> list[float]:
        """The noise level of every model call of the generation that the plan is for."""
        return [float(v) for v in self.store.get_json(f"levels/{self.config.steps}")]

    # -- what was measured -----------------------------------------------------------------------------------------

    @property
    def has_probe(self) -> bool:
        return "probe" in self.store

    @cached_property
    def probe(self) -> Probe:
        """Known when the first stage has run."""
        return Probe.from_dict(self.store.get_json("probe"))

    def put_probe(self, probe: Probe) -> None:
        self.store.put_json("probe", probe.to_dict())

    @property
    def grids(self) -> dict[str, TokenGrid]:
        """The grid of every layer that is searched, in the model's order."""
        return self.probe.grids

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that are searched; all others stay dense."""
        return tuple(self.grids)

    @property
    def head_orders(self) -> dict[str, tuple[TokenOrder, ...]]:
        """Every layer's orders, by head."""
        return self.probe.orders

    @cached_property
    def orders(self) -> dict[tuple[str, int], TokenOrder]:
        """Every head's best order."""
        return {(n, h): order for n, row in self.probe.orders.items() for h, order in enumerate(row)}

    def has_costs(self, grid: TokenGrid) -> bool:
        return f"costs/{grid}" in self.store

    def costs(self, grid: TokenGrid) -> CostTable:
        """Costs on a grid, measured once per search: a resumed one must end in the same plan."""
        return CostTable.from_dict(self.store.get_json(f"costs/{grid}"))

    def put_costs(self, grid: TokenGrid, costs: CostTable) -> None:
        self.store.put_json(f"costs/{grid}", costs.to_dict())

    @property
    def has_machine(self) -> bool:
        return "machine" in self.store

    @property
    def machine(self) -> Machine:
        """What kernels can do on the machine of the search, asked once per search for the same reason."""
        return Machine.from_dict(self.store.get_json("machine"))

    def put_machine(self, machine: Machine) -> None:
        self.store.put_json("machine", machine.to_dict())

    def traced(self) -> list[int]:
        """Numbers of the prompts that are traced."""
        return list(range(min(self.probe.prompts, self.num_prompts)))

    @property
    def prompts_traced(self) -> int:
        """How many prompts are traced, when they are."""
        return len(self.traced())

    def is_traced(self, prompt: int) -> bool:
        return f"trace/{prompt}/levels" in self.store

    def put_trace(self, prompt: int, levels: Sequence[float], parts: Sequence[Sequence[str]]) -> None:
        """A prompt is traced when this is there: noise levels of its steps, and the transformers that ran in each."""
        self.store.put_json(f"trace/{prompt}/parts", [sorted(names) for names in parts])
        self.store.put_json(f"trace/{prompt}/levels", list(levels))
        self.store.remove(f"map/{prompt}/")

    @property
    def trace_levels(self) -> list[float]:
        """Noise levels of the traced steps."""
        return [float(v) for v in self.store.get_json("trace/0/levels")]

    @property
    def trace_parts(self) -> list[list[str]]:
        """The transformers that ran in each traced step."""
        return [list(names) for names in self.store.get_json("trace/0/parts")]

    @property
    def trace_length(self) -> int:
        return len(self.trace_levels)

    def effect(self, step: int, layer: str) -> float:
        """Squared change of the model's output by a layer's sparse error at a step."""
        return float(self.store.get_json(f"effect/{step}/{layer}"))

    def has_effect(self, step: int, layer: str) -> bool:
        return f"effect/{step}/{layer}" in self.store

    def put_effect(self, step: int, layer: str, effect: float) -> None:
        self.store.put_json(f"effect/{step}/{layer}", effect)

    def injected(self, step: int) -> float:
        """Squared change of the final latent by an error that was put into a step."""
        return float(self.store.get_json(f"inject/{step}"))

    def has_injected(self, step: int) -> bool:
        return f"inject/{step}" in self.store

    def put_injected(self, step: int, change: float) -> None:
        self.store.put_json(f"inject/{step}", change)

    def sensitivity(self) -> tuple[np.ndarray, np.ndarray] | None:
        """What ``stages.sensitivity`` made of them, ``effects`` and ``amplification``; None before."""
        if "sensitivity" not in self.store:
            return None
        found = self.store.get_arrays("sensitivity")
        return found["effects"], found["growth"]

    def put_sensitivity(self, effects: np.ndarray, growth: np.ndarray) -> None:
        self.store.put_arrays("sensitivity", {"effects": effects, "growth": growth})

    @property
    def reuse_factor(self) -> float | None:
        """What ``stages.sensitivity.reuse_factor`` measured, or None."""
        return float(self.store.get_json("reuse_factor")) if "reuse_factor" in self.store else None

    def put_reuse_factor(self, factor: float) -> float:
        self.store.put_json("reuse_factor", factor)
        return factor

    def validation(self, case: int, plan: str) -> Validation | None:
        """A plan (by its digest) on a validation clip; None where it has not run, or not for what is asked now."""
        name = f"validation/{case}/{self.config.steps}/{plan}"
        found = Validation(**{"ssim": None} | self.store.get_json(name)) if name in self.store else None
        # Searches of before did not measure SSIM.
        return None if found is not None and found.ssim is None and self.config.goal is not None else found

    def put_validation(self, case: int, plan: str, found: Validation) -> None:
        self.store.put_json(f"validation/{case}/{self.config.steps}/{plan}", asdict(found))

    @property
    def clips(self) -> int:
        """On how many clips plans are validated: a target takes further seeds where there are too few prompts."""
        held_out = max(1, self.num_prompts - self.prompts_traced)
        return self.config.clips if self.config.goal is not None else min(self.config.clips, held_out)

    @property
    def _same_settings(self) -> str:
        """Of what plans are composed with, beside a budget or density."""
        config = self.config
        return f"{config.steps}/{config.dense_steps}/{config.reuse_memory}/{config.repair_rows}/{config.repair}"

    def put_tried(self, tried: Tried) -> None:
        self.store.put_json(f"tried/{self._same_settings}/{tried.plan}", asdict(tried))

    def tried(self) -> list[Tried]:
        """Plans that were validated, composed with the settings of now."""
        names = self.store.names(f"tried/{self._same_settings}/")
        return [Tried(**self.store.get_json(name)) for name in names]

    def repair(self, plan: str) -> tuple[dict[str, np.ndarray], float] | None:
        """What was fitted for a plan, by its digest: the repair's arrays, and the share of the error that it leaves.

        No arrays where no head gained by one; None where nothing was fitted yet.
        """
        name = f"repair/{plan}"
        if f"{name}/left" not in self.store:
            return None
        left = float(self.store.get_json(f"{name}/left"))
        return (self.store.get_arrays(name) if name in self.store else {}), left

    def put_repair(self, plan: str, fitted: tuple[dict[str, np.ndarray], float]) -> None:
        arrays, left = fitted
        if arrays:
            self.store.put_arrays(f"repair/{plan}", arrays)
        self.store.put_json(f"repair/{plan}/left", left)
