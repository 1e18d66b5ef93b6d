"""The search: trace, score, cost, assign, validate. A model and prompts go in, a sparsity plan comes out."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import diffsparse
from diffsparse.entry import TAILS, Execution, HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.kernels import sparse_attention
from diffsparse.layout import BlockLayout, build_layout
from diffsparse.order import TokenOrder, parse_order
from diffsparse.pattern import Bitmap
from diffsparse.pipelines import architecture_of, find_transformers, tap_attention
from diffsparse.plan import SparsityPlan
from diffsparse.schedule import Schedule
from diffsparse.search.assign import InfeasibleBudget, assign, lagrangian
from diffsparse.search.candidates import orders_for
from diffsparse.search.cost import CostModel, measure_costs
from diffsparse.search.environment import environment
from diffsparse.search.errors import BadInput
from diffsparse.search.generate import GenerationSettings
from diffsparse.search.observe import Recording, Tracer, final_latents, layer_effect, partial_error, record, replaying
from diffsparse.search.options import (
    FamilyTable,
    HeadScores,
    Option,
    head_entry,
    head_options,
    is_stable,
    prune,
    ranking,
    work_density,
)
from diffsparse.search.store import SearchStore

__all__ = ["SearchConfig", "run_search"]

log = logging.getLogger("diffsparse")

MAX_PHASES = 3
# A further phase must lower the predicted error by this share, or the plan stays simpler.
PHASE_GAIN = 0.05
# Masks made from other prompts may leave this many times the error of a prompt's own.
STABILITY_BOUND = 2.0
# Whole-trajectory densities are kept this far below the wanted one: borders of blocks and short ones round up.
DENSITY_MARGIN = 0.002
REFERENCE_DENSITY = 0.06
INJECTED_SHARE = 0.25
MOMENTS = TAILS.index("moments")


@dataclass(frozen=True)
class SearchConfig:
    """What to search for. Exactly one of ``budget`` and ``density`` is set.

    ``budget``: share of the dense run's self-attention time over the whole trajectory. ``density``: whole-trajectory
    density. ``steps``: denoising steps of the generations that the plan is tuned for (it runs with any number).
    ``trace_steps``: steps of the generations that are measured. ``trace_prompts``: how many of the prompts are traced.
    ``samples``: queries sampled of every query block. ``dense_steps`` fixes the number of dense first steps, which the
    search chooses otherwise. Sizes are in pixels; None is the pipeline's default.
    """

    budget: float | None = 0.4
    density: float | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    steps: int = 20
    guidance_scale: float = 5.0
    seed: int = 0
    block_size: int = 64
    trace_steps: int = 8
    trace_prompts: int = 2
    samples: int = 4
    dense_steps: int | None = None

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.density is None):
            raise BadInput("give a budget or a density, one of the two")
        share = self.budget if self.budget is not None else self.density
        if share is None or not 0 < share <= 1:
            raise BadInput(f"a budget or density is a share in (0, 1], got {share}")
        for name in ("steps", "trace_steps", "trace_prompts", "samples"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dense_steps is not None and not 0 <= self.dense_steps < self.steps:
            raise BadInput(f"dense_steps lies between 0 and {self.steps - 1}, got {self.dense_steps}")

    def settings(self, steps: int) -> GenerationSettings:
        return GenerationSettings(steps, self.guidance_scale, self.height, self.width, self.num_frames)


@dataclass
class _Search:
    """The state that stages share; everything costly is in the store."""

    pipe: Any
    prompts: tuple[str, ...]
    config: SearchConfig
    store: SearchStore
    progress: bool
    say: Callable[[str], None]
    recording: Recording | None = None
    tables: dict[TokenOrder, FamilyTable] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.transformer = next(iter(find_transformers(self.pipe).values()))
        self.architecture = architecture_of(self.transformer)
        self.layers = self.architecture.layers

    # -- stages ----------------------------------------------------------------------------------------------------

    def bar(self, total: int, label: str) -> tqdm[Any]:
        return tqdm(total=total, desc=label, disable=not self.progress, leave=True)

    def probe(self) -> dict[str, Any]:
        """Three steps of one generation: the grid, the time of a model call, and the best order of every head."""
        if "probe" not in self.store:
            orders: list[TokenOrder] = []
            tracer = Tracer(self.pipe, self.config.block_size, parse_order("raster"), self.config.seed, 1)
            with tap_attention(self.pipe, _grid_reader(tracer)):
                final_latents(self.pipe, self.prompts[0], self.config.seed, self.config.settings(1))
            if tracer.grid is None:
                raise BadInput("no self-attention call was seen; is this model's attention replaced by something else?")
            orders = orders_for(tracer.grid, self.config.block_size)
            tracer = Tracer(
                self.pipe,
                self.config.block_size,
                orders[0],
                self.config.seed,
                max(1, self.config.samples // 2),
                screen_orders=tuple(orders),
                screen_steps=(1, 2),
            )
            start = time.perf_counter()
            with self.bar(1, "probe") as bar:
                record(self.pipe, self.prompts[0], self.config.seed, self.config.settings(3), (), tracer)
                bar.update()
            seconds = time.perf_counter() - start
            assert tracer.grid is not None
            chosen: dict[str, list[str]] = {}
            for layer in self.layers:
                error = tracer.screened[layer]  # [orders, heads]
                best = error.argmin(0)
                # The first order costs least to gather; another one must be clearly better.
                keep = error[0] <= 1.1 * error.min(0)
                chosen[layer] = [str(orders[0 if k else int(b)]) for k, b in zip(keep, best, strict=True)]
            self.store.put_json(
                "probe",
                {
                    "grid": [*tracer.grid.shape, tracer.grid.text_before, tracer.grid.text_after],
                    "branches": max(tracer.counter.calls) + 1,
                    "forward_seconds": seconds / sum(c + 1 for c in tracer.counter.calls),
                    "orders": chosen,
                    "head_dim": tracer.head_dim,
                },
            )
        return dict(self.store.get_json("probe"))

    def costs(self, grid: TokenGrid, head_dim: int) -> CostModel:
        """Costs measured on this device, once per search: a resumed one must end in the same plan."""
        if "costs" not in self.store:
            parameter = next(self.transformer.parameters())
            device = torch.device(getattr(self.pipe, "_execution_device", parameter.device))
            order = orders_for(grid, self.config.block_size)[0]
            model = measure_costs(
                grid, self.architecture.heads, head_dim, order, self.config.block_size, device, parameter.dtype
            )
            self.store.put_json("costs", model.to_dict())
        return CostModel.from_dict(self.store.get_json("costs"))

    def traced(self) -> list[int]:
        return list(range(min(self.config.trace_prompts, len(self.prompts))))

    def trace(self, orders: dict[tuple[str, int], TokenOrder], default: TokenOrder) -> None:
        """Score every step of a generation of each traced prompt."""
        todo = [p for p in self.traced() if f"trace/{p}/levels" not in self.store]
        if not todo:
            return
        with self.bar(len(todo), "trace") as bar:
            for p in todo:
                tracer = Tracer(
                    self.pipe,
                    self.config.block_size,
                    default,
                    self.config.seed + p,
                    self.config.samples,
                    orders=orders,
                )
                recording = record(
                    self.pipe,
                    self.prompts[p],
                    self.config.seed + p,
                    self.config.settings(self.config.trace_steps),
                    self.effect_steps() if p == 0 else (),
                    tracer,
                )
                if p == 0:
                    self.recording = recording
                for step, layers in tracer.steps.items():
                    for layer, arrays in layers.items():
                        self.store.put_arrays(f"trace/{p}/{step}/{layer}", arrays)
                self.store.put_json(f"trace/{p}/levels", recording.levels)
                bar.update()

    def effect_steps(self) -> tuple[int, ...]:
        """Trace steps at which layers are perturbed."""
        n = self.config.trace_steps
        return tuple(sorted({min(n - 1, n // 8), n // 2}))

    def inject_steps(self) -> tuple[int, ...]:
        """Trace steps at which an error is put into the trajectory; the first ones matter most and change fastest."""
        n = self.config.trace_steps
        return tuple(sorted({0, n // 8, n // 4, n // 2, n - 1}))

    def dense_recording(self) -> Recording:
        """The recorded generation of the first prompt; run again where an earlier process made it."""
        if self.recording is None:
            settings = self.config.settings(self.config.trace_steps)
            self.recording = record(self.pipe, self.prompts[0], self.config.seed, settings, self.effect_steps(), None)
        return self.recording

    # -- scores ----------------------------------------------------------------------------------------------------

    def scores(self, prompt: int, step: int, layer: str, head: int) -> tuple[np.ndarray, float]:
        """``(error [tails, NB, NB], energy)`` of one traced call's head."""
        arrays = self._arrays(prompt, step, layer)
        return arrays[f"error{head}"], float(arrays[f"energy{head}"])

    def _arrays(self, prompt: int, step: int, layer: str) -> dict[str, np.ndarray]:
        key = (prompt, step, layer)
        if not hasattr(self, "_held") or self._held[0] != layer:
            self._held: tuple[str, dict[tuple[int, int, str], dict[str, np.ndarray]]] = (layer, {})
        held = self._held[1]
        if key not in held:
            held[key] = self.store.get_arrays(f"trace/{prompt}/{step}/{layer}")
        return held[key]

    def reference(self, orders: dict[tuple[str, int], TokenOrder], grid: TokenGrid) -> dict[str, BlockLayout]:
        """One sparse layout per layer, equal at all steps: bitmaps of the reference density with the moments tail."""
        layouts = {}
        for layer in self.layers:
            entries = []
            for head in range(self.architecture.heads):
                order = orders[layer, head]
                table = self.table(grid, order)
                total = 0.0
                for p in self.traced():
                    for step in range(self.trace_length):
                        error, energy = self.scores(p, step, layer, head)
                        total = total + error[MOMENTS] / max(energy, 1e-30)
                rank = ranking(np.asarray(total), table.weight)
                mask = np.zeros(rank.size, bool)
                mask[rank[: int(REFERENCE_DENSITY * rank.size)]] = True
                bitmap = Bitmap.from_mask(mask.reshape(table.weight.shape), grid, order, self.config.block_size)
                entries.append(HeadEntry(order, bitmap, execution=Execution(tail="moments")))
            layouts[layer] = build_layout(grid, entries, self.config.block_size)
        return layouts

    def table(self, grid: TokenGrid, order: TokenOrder) -> FamilyTable:
        if order not in self.tables:
            self.tables[order] = FamilyTable(grid, order, self.config.block_size)
        return self.tables[order]

    def reference_error(self, layout: BlockLayout, layer: str, step: int, prompts: Sequence[int]) -> float:
        """Predicted squared error of a layer's attention under its reference layout at one traced step."""
        total = 0.0
        for head in range(self.architecture.heads):
            mask = layout.mask(head).numpy()
            for p in prompts:
                error = self.scores(p, step, layer, head)[0][MOMENTS]
                lo = -(-layout.grid.text_before // layout.block_size)
                kept = mask[lo : lo + len(error), lo : lo + len(error)]
                total += float(error[~kept].sum()) / len(prompts)
        return total

    @property
    def trace_length(self) -> int:
        return len(self.store.get_json("trace/0/levels"))

    # -- sensitivities ---------------------------------------------------------------------------------------------

    def effects(self, layouts: dict[str, BlockLayout]) -> np.ndarray:
        """Change of the model's output per predicted error of each layer: ``[steps, layers]``."""
        steps = [s for s in self.effect_steps() if s < self.trace_length]
        todo = [(s, n) for s in steps for n in self.layers if f"effect/{s}/{n}" not in self.store]
        device_layouts = _on_device(layouts)
        if todo:
            with self.bar(len(todo), "sensitivity") as bar:
                for step, layer in todo:
                    effect = layer_effect(self.pipe, self.dense_recording(), step, layer, device_layouts)
                    self.store.put_json(f"effect/{step}/{layer}", effect)
                    bar.update()
        measured = np.empty((len(steps), len(self.layers)))
        for j, layer in enumerate(self.layers):
            for i, step in enumerate(steps):
                predicted = self.reference_error(layouts[layer], layer, step, [0])
                measured[i, j] = float(self.store.get_json(f"effect/{step}/{layer}")) / max(predicted, 1e-30)
        every = np.arange(self.trace_length)
        logs = np.log(np.maximum(measured, 1e-30))
        return np.exp(np.stack([np.interp(every, steps, logs[:, j]) for j in range(len(self.layers))], 1))

    def amplification(self, layouts: dict[str, BlockLayout], output_error: np.ndarray) -> np.ndarray:
        """Squared error of the final latent per squared error of the model's output at each traced step.

        A part of the sparse error is put into one step of the recorded generation, which then goes on dense. Only a
        part, because a whole one at an early step leads to a different clip, whose distance says nothing about the
        size of the error any more. ``output_error``: predicted for the whole error, ``[steps]``.
        """
        steps = [s for s in self.inject_steps() if s < self.trace_length]
        todo = [s for s in steps if f"inject/{s}" not in self.store]
        if todo:
            find = _on_device(layouts)
            settings = self.config.settings(self.config.trace_steps)
            with self.bar(len(todo), "schedule") as bar:
                for step in todo:
                    recording = self.dense_recording()
                    # Replayed calls make no attention call, so the first one that is counted belongs to this step.
                    inject = partial_error(find, INJECTED_SHARE, 1)
                    with replaying(self.pipe, recording, recording.first_call(step)), tap_attention(self.pipe, inject):
                        latents = final_latents(self.pipe, self.prompts[0], self.config.seed, settings)
                    error = float((latents - recording.latents).double().square().sum())
                    self.store.put_json(f"inject/{step}", error)
                    bar.update()
        found = [
            float(self.store.get_json(f"inject/{s}")) / max(INJECTED_SHARE**2 * float(output_error[s]), 1e-30)
            for s in steps
        ]
        return np.exp(np.interp(np.arange(self.trace_length), steps, np.log(np.maximum(found, 1e-30))))


def _grid_reader(tracer: Tracer) -> Callable[[Any], None]:
    def callback(call: Any) -> None:
        tracer.grid, tracer.head_dim = call.grid, call.q.shape[3]

    return callback


def _on_device(layouts: dict[str, BlockLayout]) -> Callable[[Any], BlockLayout | None]:
    moved: dict[str, BlockLayout] = {}

    def find(call: Any) -> BlockLayout | None:
        if call.layer not in moved:
            moved[call.layer] = layouts[call.layer].to(call.q.device)
        return moved[call.layer]

    return find


def target_levels(pipe: Any, steps: int, traced: Sequence[float]) -> np.ndarray:
    """Noise levels of a generation with ``steps`` steps, descending.

    From a copy of the pipeline's scheduler; where that needs more than the number of steps (a shift that depends on the
    resolution), from the traced levels as a function of the share of steps done.
    """
    scheduler = copy.deepcopy(pipe.scheduler)
    try:
        scheduler.set_timesteps(steps)
        levels = np.asarray(scheduler.timesteps, dtype=np.float64) / scheduler.config.num_train_timesteps
        if len(levels) == steps and abs(levels[0] - traced[0]) < 0.05:
            return levels
    except (TypeError, ValueError, AttributeError) as error:
        log.debug("noise levels are interpolated from the trace: %s", error)
    n = len(traced)
    return np.interp(np.arange(steps) / steps, np.arange(n + 1) / n, [*traced, 0.0])


def run_search(
    pipe: Any,
    prompts: Sequence[str],
    config: SearchConfig,
    out: Path,
    *,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
) -> SparsityPlan:
    """Search a plan and write it to ``out``, with ``search.sqlite`` (to go on after a kill) and the pictures' data.

    ``say`` receives the lines meant for the user (the estimate, what was chosen). Raises :class:`BadInput` for settings
    that cannot work, :class:`StoreMismatch` where ``out`` holds another search.
    """
    if not prompts:
        raise BadInput("a search needs at least one prompt")
    say = say or log.info
    out = Path(out)
    with SearchStore(out / "search.sqlite") as store:
        search = _Search(pipe, tuple(prompts), config, store, progress, say)
        resumed = store.claim(
            {
                "version": diffsparse.__version__,
                "architecture": search.architecture.fingerprint,
                "prompts": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
                **{k: v for k, v in asdict(config).items() if k not in ("budget", "density", "steps", "dense_steps")},
            }
        )
        if resumed:
            say(f"going on with the search in {out}")
        return _run(search, out)


def _estimate(probe: dict[str, Any], config: SearchConfig, layers: int, prompts: int) -> float:
    """Seconds that the stages after the probe will take."""
    forward, branches, steps = probe["forward_seconds"], probe["branches"], config.trace_steps
    rest = sum(steps - s for s in {0, steps // 8, steps // 4, steps // 2, steps - 1})
    return float(forward * (1.1 * prompts * branches * steps + 2 * layers + branches * rest) + 15)


def _run(search: _Search, out: Path) -> SparsityPlan:
    config, store, say = search.config, search.store, search.say
    begin = time.perf_counter()
    probe = search.probe()
    grid = TokenGrid(*probe["grid"])
    seconds = _estimate(probe, config, len(search.layers), len(search.traced()))
    say(f"{grid} = {grid.seq_len} tokens, {len(search.layers)} layers of {search.architecture.heads} heads")
    say(f"estimate: {seconds / 60:.1f} minutes, validation apart")
    costs = search.costs(grid, probe["head_dim"])
    orders = {(n, h): parse_order(o) for n, row in probe["orders"].items() for h, o in enumerate(row)}
    search.trace(orders, orders_for(grid, config.block_size)[0])
    reference = search.reference(orders, grid)
    effects = search.effects(reference)
    traced = [float(v) for v in store.get_json("trace/0/levels")]
    predicted = np.array(
        [
            sum(
                effects[s, j] * search.reference_error(reference[n], n, s, search.traced())
                for j, n in enumerate(search.layers)
            )
            for s in range(len(traced))
        ]
    )
    amplification = search.amplification(reference, predicted)
    plan = _assign(search, grid, orders, costs, effects, amplification, traced)
    plan.record["search"]["seconds"] = round(time.perf_counter() - begin, 1)
    plan.save_pretrained(out)
    _save_pictures(search, plan, out, grid, traced)
    return plan


def _line(at: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Linear interpolation, with the end segments' lines continued beyond the ends."""
    if len(x) == 1:
        return np.full(len(at), y[0])
    i = np.clip(np.searchsorted(x, at) - 1, 0, len(x) - 2)
    return np.asarray(y[i] + (y[i + 1] - y[i]) * (at - x[i]) / (x[i + 1] - x[i]))


@dataclass(frozen=True)
class _Layout:
    """A trial schedule: how many target steps are dense, and the phase of each of the others."""

    dense: int
    phase_of: tuple[int, ...]

    @property
    def phases(self) -> int:
        return max(self.phase_of) + 1


def _assign(
    search: _Search,
    grid: TokenGrid,
    orders: dict[tuple[str, int], TokenOrder],
    costs: CostModel,
    effects: np.ndarray,
    amplification: np.ndarray,
    traced: list[float],
) -> SparsityPlan:
    """Choose the number of dense steps, the phases and every head's entry under the budget."""
    config = search.config
    n, heads, layers = config.steps, search.architecture.heads, search.layers
    levels = target_levels(search.pipe, n, traced)
    bins = np.minimum((np.arange(n) * len(traced)) // n, len(traced) - 1)
    # A target step's share of its traced step; inside it the amplification follows its fall from step to step.
    centre = (np.arange(len(traced)) + 0.5) / len(traced)
    weight = np.exp(_line((np.arange(n) + 0.5) / n, centre, np.log(amplification))) * len(traced) / n

    def cost(option: Option) -> float:
        if option.kind == "dense":
            return 1.0
        blocks = len(search.table(grid, grid_order).weight)
        if config.density is not None:
            return work_density(option, grid, blocks)
        return 0.0 if option.kind == "skip" else costs.relative(option.density, option.tail)

    wanted = config.density - DENSITY_MARGIN if config.density is not None else float(config.budget or 0)
    total = n * len(layers) * heads
    grid_order = orders_for(grid, config.block_size)[0]

    def items(trial: _Layout) -> tuple[list[list[Option]], list[np.ndarray], list[np.ndarray], list[HeadScores]]:
        options, errors, prices, kept = [], [], [], []
        for j, layer in enumerate(layers):
            for head in range(heads):
                table = search.table(grid, orders[layer, head])
                per_step = {
                    s: [search.scores(p, s, layer, head) for p in search.traced()]
                    for s in sorted(set(bins[trial.dense :]))
                }
                for phase in range(trial.phases):
                    members = [i for i in range(trial.dense, n) if trial.phase_of[i - trial.dense] == phase]
                    error: Any = 0.0
                    energy = 0.0
                    for i in members:
                        w = weight[i] * effects[bins[i], j]
                        found = per_step[bins[i]]
                        error = error + w * np.stack([e for e, _ in found]).astype(np.float64)
                        energy += w * float(np.mean([x for _, x in found]))
                    scores = HeadScores(error, energy)
                    stable = is_stable(scores, table.weight, STABILITY_BOUND)
                    if not stable and phase == 0:
                        unstable.add((layer, head))
                    chosen, e, c = prune(head_options(scores, table, bitmaps=stable), cost)
                    options.append(chosen)
                    errors.append(e)
                    prices.append(c * len(members))
                    kept.append(scores)
        return options, errors, prices, kept

    unstable: set[tuple[str, int]] = set()
    curve = []
    for dense in range(n) if config.dense_steps is None else [config.dense_steps]:
        room = wanted * total - dense * len(layers) * heads
        if room <= 0:
            break
        trial = _Layout(dense, (0,) * (n - dense))
        curve.append((dense, trial, room))
    best: tuple[float, _Layout, float] | None = None
    scan: dict[int, float] = {}
    # The error falls, then rises again with the number of dense steps: stop once it has risen twice in a row.
    rising = 0
    with search.bar(len(curve), "assign") as bar:
        for dense, trial, room in curve:
            try:
                _, errors, prices, _ = items(trial)
                found = lagrangian(errors, prices, room)
            except InfeasibleBudget:
                break
            finally:
                bar.update()
            scan[dense] = found.error
            if best is None or found.error < best[0]:
                best, rising = (found.error, trial, room), 0
            else:
                rising += 1
                if rising == 2:
                    break
    if best is None:
        raise BadInput(f"a share of {wanted:.3g} is below what any plan can reach; ask for more")
    for phases in range(2, min(MAX_PHASES, n - best[1].dense) + 1):
        trial = _Layout(best[1].dense, tuple(int(i * phases / (n - best[1].dense)) for i in range(n - best[1].dense)))
        _, errors, prices, _ = items(trial)
        found = lagrangian(errors, prices, best[2])
        if found.error < (1 - PHASE_GAIN) * best[0]:
            best = (found.error, trial, best[2])
    trial = best[1]
    options, errors, prices, kept = items(trial)
    result = assign(errors, prices, best[2])
    rows: dict[str, list[list[HeadEntry]]] = {}
    position = 0
    for layer in layers:
        rows[layer] = [[] for _ in range(trial.phases)]
        for head in range(heads):
            for phase in range(trial.phases):
                option = options[position][result.choice[position]]
                table = search.table(grid, orders[layer, head])
                rows[layer][phase].append(head_entry(option, kept[position], table))
                position += 1
    schedule = Schedule(
        sparse_below=1.0 if trial.dense == 0 else float((levels[trial.dense - 1] + levels[trial.dense]) / 2),
        phase_bounds=tuple(
            float((levels[trial.dense + i - 1] + levels[trial.dense + i]) / 2)
            for i in range(1, n - trial.dense)
            if trial.phase_of[i] != trial.phase_of[i - 1]
        ),
    )
    plan = SparsityPlan.from_table(
        rows,
        schedule=schedule,
        block_size=config.block_size,
        architecture=search.architecture,
        record=_record(search, grid, costs),
    )
    density = plan.trajectory_density(grid, levels)
    plan.record["search"].update(
        {
            "dense_steps": trial.dense,
            "of_steps": n,
            "phases": trial.phases,
            "predicted_error": result.error,
            "lower_bound": result.bound,
            "predicted_by_dense_steps": {str(k): v for k, v in scan.items()},
            "amplification": [float(v) for v in amplification],
            "unstable_heads": sorted(f"{name}/{head}" for name, head in unstable),
            "trajectory_density": density,
            "call_density": float(plan.call_densities(grid).mean()),
            "predicted_attention_time": _predicted_time(options, result.choice, prices, costs, trial, total, config),
        }
    )
    search.say(
        f"chosen: {trial.dense} of {n} steps dense, {trial.phases} phase(s), whole-trajectory density {density:.3f}"
    )
    return plan


def _predicted_time(
    options: list[list[Option]],
    choice: np.ndarray,
    prices: list[np.ndarray],
    costs: CostModel,
    trial: _Layout,
    total: int,
    config: SearchConfig,
) -> float:
    """Attention time of the whole trajectory over dense, by the measured costs."""
    members = np.bincount(trial.phase_of, minlength=trial.phases)
    time_share = float(total * trial.dense / config.steps)
    for i, (found, c) in enumerate(zip(options, choice, strict=True)):
        option = found[c]
        share = {"dense": 1.0, "skip": 0.0}.get(option.kind)
        time_share += (costs.relative(option.density, option.tail) if share is None else share) * members[
            i % trial.phases
        ]
    return float(time_share / total)


def _record(search: _Search, grid: TokenGrid, costs: CostModel) -> dict[str, Any]:
    config = search.config
    name = getattr(search.pipe, "name_or_path", None) or getattr(search.pipe.config, "_name_or_path", "")
    # The folder's own name only: where a model lies on somebody's disk is nobody's business.
    return {
        "model": {"id": Path(str(name)).name, "pipeline": type(search.pipe).__name__},
        "calibration": {
            "prompts_sha256": hashlib.sha256("\n".join(search.prompts).encode()).hexdigest(),
            "traced_prompts": len(search.traced()),
            "seed": config.seed,
            "grid": str(grid),
            "steps": config.steps,
            "trace_steps": config.trace_steps,
            "guidance_scale": config.guidance_scale,
        },
        "search": {"budget": config.budget, "density": config.density, "kernel": _kernel_version()},
        "costs": costs.to_dict(),
        "environment": environment(next(search.transformer.parameters()).device),
    }


def _kernel_version() -> str:
    return f"{sparse_attention.__module__} {diffsparse.__version__}"


def _save_pictures(search: _Search, plan: SparsityPlan, out: Path, grid: TokenGrid, traced: list[float]) -> None:
    """Mean attention mass of every phase, layer and head, for pictures; kernels never read it."""
    from safetensors.numpy import save_file

    phases = plan.schedule.num_phases
    steps = [[s for s, level in enumerate(traced) if plan.schedule.phase(level) == p] for p in range(phases)]
    blocks = max(len(t.weight) for t in search.tables.values())
    side = min(80, blocks)
    pooled = np.zeros((phases, len(search.layers), search.architecture.heads, side, side), np.float16)
    for j, layer in enumerate(search.layers):
        for head in range(search.architecture.heads):
            for p, members in enumerate(steps):
                chosen = members or [len(traced) // 2]
                mass = np.mean([search._arrays(0, s, layer)[f"mass{head}"].astype(np.float32) for s in chosen], axis=0)
                pooled[p, j, head] = _shrink(mass, side)
    metadata = {
        "grid": ",".join(map(str, grid.shape)),
        "block_size": str(search.config.block_size),
        "orders": json.dumps(search.store.get_json("probe")["orders"]),
        "phases": str(phases),
    }
    save_file({"pooled": pooled}, out / "attention.safetensors", metadata=metadata)


def _shrink(mass: np.ndarray, side: int) -> np.ndarray:
    """Pool a square matrix to ``[side, side]``, keeping rows' sums: queries are averaged, keys are summed."""
    edges = np.linspace(0, len(mass), side + 1).astype(int)[:-1]
    rows = np.diff([*edges, len(mass)])[:, None]
    return np.add.reduceat(np.add.reduceat(mass, edges, 0) / rows, edges, 1)
