"""What a plan would do on this machine at a size, before anything is generated."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from diffsparse.entry import TAILS, HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.kernels.costs import CostTable
from diffsparse.pipelines.family import Family, UnsupportedModelError, family_by_class
from diffsparse.pipelines.policy import Machine, entries_of, judge_layer, machine_for
from diffsparse.plan import Architecture, SparsityPlan
from diffsparse.schedule import Schedule
from diffsparse.search.environment import environment
from diffsparse.search.errors import BadInput
from diffsparse.search.recorded import recorded as searched_with
from diffsparse.search.scale import scale_of_class, scale_of_pipeline, scale_of_record
from diffsparse.search.show import check_tokens, grid_of, phase_names
from diffsparse.work import HeadWork, head_work

__all__ = [
    "Explanation",
    "HeadForecaster",
    "LayerForecast",
    "Shape",
    "explain",
    "recorded_costs",
    "shape_for",
]

#: Head dimension that kernels are asked about where neither plan nor model tells one.
USUAL_HEAD_DIM = 128


@dataclass(frozen=True)
class Shape:
    """The call that is forecast. ``architecture``: the model's, where one was named, else the plan's, else None."""

    grid: TokenGrid
    architecture: Architecture | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PhaseForecast:
    """One layer in one phase. ``time``: of its attention over dense, None where the plan records no costs."""

    density: float
    time: float | None
    dense_because: str | None
    carried_heads: int
    families: dict[str, int]


@dataclass(frozen=True)
class LayerForecast:
    """One layer. ``backend``: the kernel that would run it; None where it is dense in every phase."""

    layer: str
    backend: str | None
    tokens: int
    phases: tuple[PhaseForecast, ...]


@dataclass(frozen=True)
class Explanation:
    """``break_even``: for each tail the density of kept blocks below which sparse is faster, by the recorded costs."""

    shape: Shape
    device: str
    backend: str
    schedule: Schedule
    phases: tuple[str, ...]
    layers: tuple[LayerForecast, ...]
    costs: CostTable | None
    break_even: dict[str, float]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON; layers are not folded."""
        grid = self.shape.grid
        return {
            "grid": str(grid),
            "tokens": grid.seq_len,
            "model_class": None if self.shape.architecture is None else self.shape.architecture.model_class,
            "device": self.device,
            "backend": self.backend,
            "schedule": {
                "sparse_below": self.schedule.sparse_below,
                "dense_below": self.schedule.dense_below,
                "dense_between": [list(pair) for pair in self.schedule.dense_between],
                "phases": list(self.phases),
            },
            "call_density": self.call_density,
            "time": self.time,
            "break_even_density": self.break_even,
            "carried_heads": self.carried_heads,
            "costs_device": None if self.costs is None else self.costs.device,
            "layers": [asdict(layer) for layer in self.layers],
            "notes": list(self.notes),
        }

    @property
    def call_density(self) -> list[float]:
        """Mean over layers, for each phase."""
        return [float(np.mean([layer.phases[p].density for layer in self.layers])) for p in range(len(self.phases))]

    @property
    def time(self) -> list[float] | None:
        """Attention time of a sparse step over a dense one, for each phase."""
        if self.costs is None:
            return None
        work = np.array([float(layer.tokens) ** 2 for layer in self.layers])
        times = np.array([[p.time for p in layer.phases] for layer in self.layers], dtype=np.float64)
        return [float(t) for t in (work @ times) / work.sum()]

    @property
    def carried_heads(self) -> int:
        return sum(phase.carried_heads for layer in self.layers for phase in layer.phases)


# -- the call ----------------------------------------------------------------------------------------------------------


def shape_for(
    plan: SparsityPlan,
    *,
    folder: str | None = None,
    grid: TokenGrid | None = None,
    model_shape: str | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
) -> Shape:
    """The call that the arguments describe.

    Sizes are turned into tokens by the model's folder or transformer class ``model_shape``, else by the plan's own
    record. What is not given is as the plan was searched. ``folder``: the plan's. Raises :class:`BadInput`.
    """
    from pathlib import Path

    asked = {"--height": height, "--width": width, "--num-frames": num_frames}
    given = [name for name, value in asked.items() if value is not None]
    if grid is not None and given:
        raise BadInput(f"--grid and {given[0]} both give the size; leave one of them out")
    architecture, scale, usual = plan.architecture, None, None
    notes: list[str] = []
    if model_shape is not None and Path(model_shape).exists():
        from diffsparse.pipelines import architecture_of, find_transformers
        from diffsparse.search.load import check_plan_fits, check_shape, load_shapes

        pipe = load_shapes(model_shape)
        check_plan_fits(plan, pipe)
        check_shape(pipe, height, width, num_frames)
        architecture = architecture_of(next(iter(find_transformers(pipe).values())))
        scale = scale_of_pipeline(pipe)
    elif model_shape is not None:
        scale, usual = scale_of_class(model_shape)
        if architecture is not None and architecture.model_class != model_shape:
            raise BadInput(f"the plan is for {architecture.model_class}, --model-shape says {model_shape}")
    recorded = grid_of(plan, folder)
    if grid is None:
        if not given and usual is None:
            grid = recorded
        else:
            grid = _grid_by_size(searched_with(plan.record), recorded, scale, usual, height, width, num_frames)
        if grid is None:
            raise BadInput(
                "the size is not known: give --height, --width and --num-frames with --model-shape (a model's folder, "
                "or a transformer class of `diffsparse models`), or --grid T,H,W"
            )
    check_tokens(grid, "the size")
    if recorded is not None and not (grid.text_before or grid.text_after):
        grid = replace(grid, text_before=recorded.text_before, text_after=recorded.text_after)
    position = _text_position(architecture, model_shape)
    if position != "none":
        known = grid.text_before + grid.text_after
        notes.append(f"text tokens: {known} as in the search" if known else "text tokens are not known and not counted")
    return Shape(grid, architecture, tuple(notes))


def _grid_by_size(
    known: dict[str, Any],
    recorded: TokenGrid | None,
    scale: Any,
    usual: tuple[int, int, int | None] | None,
    height: int | None,
    width: int | None,
    num_frames: int | None,
) -> TokenGrid | None:
    if scale is None and recorded is not None:
        scale = scale_of_record(known, recorded)
    if scale is None:
        raise BadInput(
            "the plan does not say how many pixels a token covers: give --model-shape (a model's folder, or a "
            "transformer class of `diffsparse models`), or --grid T,H,W"
        )
    defaults = usual or tuple(known.get(name) for name in ("height", "width", "num_frames"))
    size = [d if v is None else v for v, d in zip((height, width, num_frames), defaults, strict=True)]
    for name, value in zip(("--height", "--width"), size, strict=False):
        if not isinstance(value, int):
            raise BadInput(f"{name} is missing, and the plan does not say what it was searched with; give it too")
    return scale.grid(*size)


def _text_position(architecture: Architecture | None, model_shape: str | None) -> str:
    if architecture is not None:
        return architecture.text_position
    found = _family(architecture, model_shape)
    return "none" if found is None else found.text_position


def _family(architecture: Architecture | None, name: str | None) -> Family | None:
    """The family of the plan's model, or of a class; None where this version has none for it."""
    try:
        return family_by_class(architecture.model_class if architecture else name or "")
    except UnsupportedModelError:
        return None


# -- the forecast ------------------------------------------------------------------------------------------------------


def recorded_costs(plan: SparsityPlan) -> CostTable | None:
    """The costs that the search measured and saved with the plan, or None. Raises :class:`BadInput` if damaged."""
    data = plan.record.get("costs")
    if data is None:
        return None
    try:
        return CostTable.from_dict(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"the costs in the plan's record cannot be read ({error}); search the plan again") from None


@dataclass(frozen=True)
class HeadForecast:
    """One head. ``time``: over dense, by the plan's recorded costs. ``carried``: its bitmap is of another grid."""

    work: HeadWork
    time: float | None
    carried: bool

    @property
    def density(self) -> float:
        return self.work.density


class HeadForecaster:
    """Figures of entries, each worked out once. ``machine``: what kernels can do where the plan is to run."""

    def __init__(self, plan: SparsityPlan, costs: CostTable | None, machine: Machine | None = None) -> None:
        self.plan, self.costs, self.machine = plan, costs, machine
        self.known: dict[tuple[HeadEntry, TokenGrid], HeadForecast] = {}

    def head(self, entry: HeadEntry, grid: TokenGrid) -> HeadForecast:
        if (entry, grid) not in self.known:
            self.known[entry, grid] = self._head(entry, grid)
        return self.known[entry, grid]

    def _head(self, entry: HeadEntry, grid: TokenGrid) -> HeadForecast:
        size = self.plan.block_size
        work = head_work(entry, grid, size, self.plan.online_repair)
        time = None if self.costs is None else self.costs.over_dense([work], grid.seq_len)
        carried = not work.skipped and entry.pattern.is_carried(grid, entry.order, size)
        return HeadForecast(work, time, carried)

    def phase(self, phase: int, layer: str, heads: int, grid: TokenGrid) -> PhaseForecast:
        from diffsparse.search.show import family

        assert self.machine is not None
        entries = entries_of(self.plan, phase, layer, heads)
        one = 1.0 if self.costs is not None else None
        if isinstance(entries, str):
            return PhaseForecast(1.0, one, entries, 0, {"dense": heads})
        found = [self.head(entry, grid) for entry in entries]
        families = dict(Counter(family(entry) for entry in entries).most_common())
        carried = sum(f.carried for f in found)
        verdict = judge_layer([f.work for f in found], grid.seq_len, self.machine, self.costs)
        time = None if self.costs is None else verdict.time
        return PhaseForecast(verdict.density, time, verdict.reason, carried, families)


def explain(
    plan: SparsityPlan,
    shape: Shape,
    *,
    device: torch.device,
    dtype: torch.dtype,
    backend: str = "auto",
    model_class: str | None = None,
) -> Explanation:
    """What every layer would do at ``shape`` on ``device``; nothing is computed there.

    ``model_class``: what is said of it in the table of models is repeated, where the plan itself is for any model.
    Raises :class:`BadInput` for a backend that cannot run here.
    """
    architecture, grid = shape.architecture, shape.grid
    layers = architecture.layers if architecture is not None else plan.layers
    heads = architecture.heads if architecture is not None else plan.index.shape[2]
    head_dim = architecture.head_dim if architecture is not None else USUAL_HEAD_DIM
    try:
        machine = machine_for(backend, device, dtype, head_dim, plan.tails)
    except ValueError as error:
        raise BadInput(f"--backend {backend}: {error}; see `diffsparse env`") from None
    family = _family(architecture, model_class)
    costs = recorded_costs(plan)
    forecaster = HeadForecaster(plan, costs, machine)
    rows = []
    for layer in layers:
        own = grid.visual_only() if family is not None and family.is_visual_only(layer) else grid
        phases = tuple(forecaster.phase(p, layer, heads, own) for p in range(plan.schedule.num_phases))
        sparse = any(phase.dense_because is None for phase in phases)
        rows.append(LayerForecast(layer, machine.kernel if sparse else None, own.seq_len, phases))
    notes = [*shape.notes]
    if plan.reuses:
        notes.append(
            f"{plan.reused_heads} of {plan.index.size} heads serve several steps: densities and times are of calls in "
            "which all heads compute"
        )
    if plan.rules:
        most = any(not rule.budget.is_fixed for rule in plan.rules)
        notes.append(
            f"blocks are picked while the model runs: {'; '.join(map(str, plan.rules))}"
            + (": densities and times are the most that these budgets allow" if most else "")
            + ". Times leave out what picking takes"
        )
    if architecture is None and plan.is_uniform:
        notes.append("one rule for all layers and heads of any model")
    if family is not None and family.layer_grid is not None:
        notes.append("layers of this model may see other grids than the one shown")
    if family is not None and family.stays_dense:
        notes.append(f"dense in this model: {family.stays_dense}")
    if costs is None:
        notes.append("no predicted times: the plan records no measured costs")
    else:
        notes += _about_costs(plan, costs, grid, device)
    return Explanation(
        shape=shape,
        device=str(environment(device)["device"]),
        backend=machine.kernel,
        schedule=plan.schedule,
        phases=tuple(phase_names(plan)),
        layers=tuple(rows),
        costs=costs,
        break_even={} if costs is None else {tail: costs.break_even(grid.seq_len, tail) for tail in TAILS},
        notes=tuple(notes),
    )


def _about_costs(plan: SparsityPlan, costs: CostTable, grid: TokenGrid, device: torch.device) -> list[str]:
    notes = []
    recorded = grid_of(plan)
    if recorded is not None and recorded.shape != grid.shape:
        notes.append(f"times are by costs that were measured on {recorded}; on another grid they are estimates")
    here = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    if costs.device != here:
        notes.append(f"times are by costs that were measured on {costs.device}, this is {here}")
    search = plan.record.get("search")
    if isinstance(search, dict) and recorded is not None and recorded.shape == grid.shape:
        density, time = search.get("trajectory_density"), search.get("predicted_attention_time")
        steps = search.get("of_steps")
        if isinstance(density, (int, float)) and isinstance(time, (int, float)) and isinstance(steps, int):
            notes.append(
                f"by the search, over all {steps} steps, dense ones included: density {density:.3f}, attention time "
                f"{time:.2f} of dense"
            )
    return notes


# -- for readers -------------------------------------------------------------------------------------------------------
