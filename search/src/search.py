"""The search: trace, score, cost, assign, validate. A model and prompts go in, a sparsity plan comes out."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import diffsparse
from diffsparse.entry import TAILS, Execution, HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.kernels import sparse_attention
from diffsparse.layout import BlockLayout
from diffsparse.order import TokenOrder, parse_order
from diffsparse.patterns import Bitmap
from diffsparse.pipelines import find_transformers, tap_attention
from diffsparse.pipelines import sparse_attention as attached
from diffsparse.plan import SparsityPlan
from diffsparse.search import metrics
from diffsparse.search.call import sizes_seen
from diffsparse.search.candidates import orders_for
from diffsparse.search.columns import shorten
from diffsparse.search.compose import Candidate, Composer, strides
from diffsparse.search.cost import CostModel, measure_costs
from diffsparse.search.environment import environment
from diffsparse.search.errors import BadInput, writing
from diffsparse.search.generate import MAX_SEED, GenerationSettings, generate_clip
from diffsparse.search.identity import model_identity
from diffsparse.search.layers import common_architecture, layouts_by_call, main_grid, switch_level
from diffsparse.search.load import shape_rule, sparse_backend
from diffsparse.search.measured import HeadFigures, PooledAttention, plan_digest
from diffsparse.search.observe import (
    Recording,
    Tracer,
    call_levels,
    final_latents,
    first_step,
    partial_error,
    record,
    replaying,
    step_effect,
)
from diffsparse.search.options import (
    FamilyTable,
    HeadScores,
    reference_mask,
)
from diffsparse.search.signature import check_generates, parameters
from diffsparse.search.store import SearchStore

__all__ = ["SearchConfig", "run_search", "thoroughness"]

log = logging.getLogger("diffsparse")

# Counted up whenever what the store holds changes.
STORE_FORMAT = 5
# What may differ between two searches that share a store: nothing that is measured depends on it.
FREE_SETTINGS = ("budget", "density", "steps", "dense_steps", "validation_prompts", "candidates")
REFERENCE_DENSITY = 0.06
INJECTED_SHARE = 0.25


@dataclass(frozen=True)
class SearchConfig:
    """What to search for. Exactly one of ``budget`` and ``density`` is set.

    ``budget``: share of the dense run's self-attention time over the whole trajectory. ``density``: whole-trajectory
    density. ``steps``: denoising steps of the generations that the plan is tuned for (it runs with any number).
    ``trace_steps``: steps of the generations that are measured. ``trace_prompts``: how many of the prompts are traced.
    ``samples``: queries sampled of every query block. ``dense_steps`` fixes the number of dense first steps, which the
    search chooses otherwise. ``validation_prompts``: on how many prompts that were not traced whole generations choose
    among the best ``candidates`` plans (0: the predicted best is taken). Sizes are in pixels. Steps, guidance and sizes
    that are None are the pipeline's own (:meth:`resolved`).
    """

    budget: float | None = 0.4
    density: float | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    seed: int = 0
    block_size: int = 64
    trace_steps: int = 8
    trace_prompts: int = 2
    samples: int = 4
    dense_steps: int | None = None
    validation_prompts: int = 1
    candidates: int = 3

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.density is None):
            raise BadInput("give a budget or a density, one of the two")
        share = self.budget if self.budget is not None else self.density
        if share is None or not 0 < share <= 1:
            raise BadInput(f"a budget or density is a share in (0, 1], got {share}")
        for name in ("steps", "trace_steps", "trace_prompts", "samples", "candidates"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise BadInput(f"{name} must be at least 1, got {value}")
        if not 0 <= self.seed <= MAX_SEED:
            raise BadInput(f"the seed is an integer from 0 to {MAX_SEED}, got {shorten(str(self.seed), 60)}")
        if self.validation_prompts < 0:
            raise BadInput(f"validation_prompts must be at least 0, got {self.validation_prompts}")
        if self.dense_steps is not None and self.dense_steps < 0:
            raise BadInput(f"dense_steps must be at least 0, got {self.dense_steps}")
        if self.dense_steps is not None and self.steps is not None and self.dense_steps >= self.steps:
            raise BadInput(f"dense_steps lies between 0 and {self.steps - 1}, got {self.dense_steps}")

    def resolved(self, pipe: Any) -> SearchConfig:
        """The same with the pipeline's own steps, guidance and sizes in the place of None.

        Raises :class:`BadInput` where no search is possible with this pipeline, with the reason.
        """
        check_generates(pipe)
        if "num_inference_steps" not in parameters(pipe):
            raise BadInput(
                f"{type(pipe).__name__} takes no num_inference_steps, and a search measures generations of few steps; "
                "search with another pipeline of this model: a plan fits every pipeline with the same transformer"
            )
        own = self.settings(self.steps).resolved(pipe)
        if own.num_inference_steps is None:
            raise BadInput(f"{type(pipe).__name__} has no number of steps of its own; give it: --steps, or steps=")
        return replace(
            self,
            steps=own.num_inference_steps,
            guidance_scale=own.guidance_scale,
            height=own.height,
            width=own.width,
            num_frames=own.num_frames,
        )

    def settings(self, steps: int | None) -> GenerationSettings:
        """Of a generation with this many steps, all else as it is searched for."""
        return GenerationSettings(
            steps, self.guidance_scale, self.height, self.width, self.num_frames, true_cfg_scale=self.true_cfg_scale
        )


def thoroughness(device: torch.device, trace_prompts: int | None = None, samples: int | None = None) -> dict[str, int]:
    """How much to measure, where nobody said: on a GPU more than what a few CPU cores can do in minutes."""
    on_gpu = device.type == "cuda"
    return {
        "trace_prompts": (4 if on_gpu else 2) if trace_prompts is None else trace_prompts,
        "samples": (12 if on_gpu else 4) if samples is None else samples,
    }


class _Stage:
    """One stage's bar, and whoever else follows how far it is."""

    def __init__(self, total: int, label: str, progress: bool, on_stage: Callable[[str, int, int], None]) -> None:
        self._bar = tqdm(total=total, desc=label, disable=not progress, leave=True)
        self._label, self._total, self._done, self._on_stage = label, total, 0, on_stage

    def __enter__(self) -> _Stage:
        self._on_stage(self._label, 0, self._total)
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()

    def update(self, count: int = 1) -> None:
        self._bar.update(count)
        self._done += count
        self._on_stage(self._label, self._done, self._total)


@dataclass
class _Search:
    """The state that stages share; everything costly is in the store."""

    pipe: Any
    prompts: tuple[str, ...]
    config: SearchConfig
    store: SearchStore
    progress: bool
    say: Callable[[str], None]
    on_stage: Callable[[str, int, int], None]
    recording: Recording | None = None
    tables: dict[tuple[TokenGrid, TokenOrder], FamilyTable] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.architecture = common_architecture(self.pipe)
        # For what all of them share: the device and the data type.
        self.transformer = next(iter(find_transformers(self.pipe).values()))

    @cached_property
    def grids(self) -> dict[str, TokenGrid]:
        """The grid of every layer that is searched, in the model's order; known when the probe has run."""
        return {layer: TokenGrid(*sizes) for layer, sizes in self.store.get_json("probe")["grids"].items()}

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that are searched; all others stay dense."""
        return tuple(self.grids)

    # -- stages ----------------------------------------------------------------------------------------------------

    def bar(self, total: int, label: str) -> _Stage:
        return _Stage(total, label, self.progress, self.on_stage)

    def probe(self) -> dict[str, Any]:
        """Three steps of one generation: every layer's grid, the time of a model call, and every head's best order."""
        if "probe" not in self.store:
            settings, first = self.config.settings(3), Tracer(self.pipe, self.config.block_size, self.config.seed)
            start = time.perf_counter()
            sizes: list[tuple[int, int]] = []
            with sizes_seen(self.pipe, lambda height, width: sizes.append((height, width))):
                unseen = first_step(self.pipe, self.prompts[0], self.config.seed, settings, first.look)
            seconds = time.perf_counter() - start
            if not first.grids:
                raise BadInput(f"no layer can be searched: {_why_unseen(unseen)}")
            tracer = Tracer(
                self.pipe,
                self.config.block_size,
                self.config.seed,
                max(1, self.config.samples // 2),
                branches=first.counter.calls,
                screen_orders=self._orders,
                screen_steps=(1, 2),
            )
            with self.bar(1, "probe") as bar:
                record(self.pipe, self.prompts[0], self.config.seed, settings, tracer)
                bar.update()
            seen = [n for n in self.architecture.layers if all(n in layers for layers in tracer.steps.values())]
            if not seen:
                raise BadInput(f"no layer can be searched at every step: {_why_unseen(tracer.unseen)}")
            chosen: dict[str, list[str]] = {}
            for layer in seen:
                orders = self._orders(tracer.grids[layer])
                # [orders, heads]; of generations that have one step whatever they are asked for there is nothing
                error = tracer.screened.get(layer, np.zeros((len(orders), self.architecture.heads)))
                best = error.argmin(0)
                # The first order costs least to gather; another one must be clearly better.
                keep = error[0] <= 1.1 * error.min(0)
                chosen[layer] = [str(orders[0 if k else int(b)]) for k, b in zip(keep, best, strict=True)]
            grids = {n: tracer.grids[n] for n in seen}
            self.store.put_json(
                "probe",
                {
                    "grids": {n: [*g.shape, g.text_before, g.text_after] for n, g in grids.items()},
                    "branches": tracer.counter.calls,
                    "forward_seconds": seconds / first.counter.calls,
                    "orders": chosen,
                    "head_dim": tracer.head_dim,
                    "size": list(sizes[0]) if sizes else None,
                    "dense": {n: _why_unseen(tracer.unseen, n) for n in self.architecture.layers if n not in seen},
                },
            )
        return dict(self.store.get_json("probe"))

    def _orders(self, grid: TokenGrid) -> list[TokenOrder]:
        return orders_for(grid.visual_only(), self.config.block_size)

    def costs(self, head_dim: int) -> dict[TokenGrid, CostModel]:
        """Costs on every grid of a layer, measured once per search: a resumed one must end in the same plan."""
        found: dict[TokenGrid, CostModel] = {}
        for grid in dict.fromkeys(self.grids.values()):
            name = f"costs/{grid}"
            if name not in self.store:
                parameter = next(self.transformer.parameters())
                device = torch.device(getattr(self.pipe, "_execution_device", parameter.device))
                order = self._orders(grid)[0]
                model = measure_costs(
                    grid, self.architecture.heads, head_dim, order, self.config.block_size, device, parameter.dtype
                )
                self.store.put_json(name, model.to_dict())
            found[grid] = CostModel.from_dict(self.store.get_json(name))
        return found

    def traced(self) -> list[int]:
        return list(range(min(self.config.trace_prompts, len(self.prompts))))

    def trace(self, orders: dict[tuple[str, int], TokenOrder], branches: int) -> None:
        """Score every step of a generation of each traced prompt."""
        todo = [p for p in self.traced() if f"trace/{p}/levels" not in self.store]
        if not todo:
            return
        with self.bar(len(todo), "trace") as bar:
            for p in todo:
                tracer = Tracer(
                    self.pipe,
                    self.config.block_size,
                    self.config.seed + p,
                    self.config.samples,
                    branches,
                    orders,
                    grids=dict(self.grids),  # a prompt must not bring another size
                )
                recording = record(
                    self.pipe,
                    self.prompts[p],
                    self.config.seed + p,
                    self.config.settings(self.config.trace_steps),
                    tracer,
                )
                if p == 0:
                    self.recording = recording
                for step, layers in tracer.steps.items():
                    for layer in self.layers:
                        if layer not in layers:
                            raise BadInput(
                                f"{layer} cannot be searched at step {step} of prompt {p}: "
                                f"{_why_unseen(tracer.unseen, layer)}"
                            )
                        self.store.put_arrays(f"trace/{p}/{step}/{layer}", layers[layer])
                self.store.put_json(f"trace/{p}/parts", [sorted(tracer.parts[s]) for s in sorted(tracer.parts)])
                self.store.put_json(f"trace/{p}/levels", recording.levels)
                bar.update()

    def effect_steps(self) -> tuple[int, ...]:
        """Trace steps at which layers are perturbed."""
        n = self.config.trace_steps
        return tuple(sorted({min(n - 1, n // 8), n // 2}))

    def inject_steps(self) -> tuple[int, ...]:
        """Trace steps at which an error is put into the trajectory; growth falls evenly, on a log scale, between."""
        n = self.config.trace_steps
        return tuple(sorted({0, 3 * n // 4}))

    def dense_recording(self) -> Recording:
        """The recorded generation of the first prompt; run again where an earlier process made it."""
        if self.recording is None:
            settings = self.config.settings(self.config.trace_steps)
            self.recording = record(self.pipe, self.prompts[0], self.config.seed, settings, None)
        return self.recording

    def call_levels(self) -> list[float]:
        """The noise level of every model call of the generation that the plan is for."""
        name = f"levels/{self.config.steps}"
        if name not in self.store:
            settings = self.config.settings(self.config.steps)
            self.store.put_json(name, call_levels(self.pipe, self.prompts[0], self.config.seed, settings))
        return [float(v) for v in self.store.get_json(name)]

    # -- validation ------------------------------------------------------------------------------------------------

    def validate(self, candidates: list[Candidate]) -> tuple[Candidate, dict[str, Any]]:
        """The candidate that comes closest to dense on prompts that were not traced, and what was measured for it.

        Predicted errors of plans with different numbers of dense steps are near each other; generations decide.
        """
        config = self.config
        settings = config.settings(config.steps)
        cases = [(prompt, config.seed + 1000) for prompt in self.prompts[len(self.traced()) :]]
        # Where every prompt was traced, another seed is the best there is.
        cases = (cases or [(self.prompts[0], config.seed + 1000)])[: config.validation_prompts]
        keys = [plan_digest(candidate.plan) for candidate in candidates]
        backend = sparse_backend(self.pipe)
        with self.bar(len(cases) * (1 + len(candidates)), "validate") as bar:
            for i, (prompt, seed) in enumerate(cases):
                name = f"validation/{i}/{config.steps}"
                if all(f"{name}/{key}" in self.store for key in keys):
                    bar.update(1 + len(candidates))
                    continue
                dense = generate_clip(self.pipe, prompt, seed, settings)
                bar.update()
                for key, candidate in zip(keys, candidates, strict=True):
                    with attached(self.pipe, candidate.plan, backend=backend):
                        clip = generate_clip(self.pipe, prompt, seed, settings)
                    found = {
                        "psnr": metrics.psnr(clip.frames, dense.frames),
                        "speedup": dense.loop_seconds / clip.loop_seconds,
                    }
                    self.store.put_json(f"{name}/{key}", found)
                    bar.update()
        rows = {
            key: [self.store.get_json(f"validation/{i}/{config.steps}/{key}") for i in range(len(cases))]
            for key in keys
        }
        means = [float(np.mean([row["psnr"] for row in rows[key]])) for key in keys]
        best = int(np.argmax(means))
        tried = {str(c.plan.record["search"]["dense_steps"]): m for c, m in zip(candidates, means, strict=True)}
        chosen = rows[keys[best]]
        return candidates[best], {
            "prompts": len(cases),
            "steps": config.steps,
            "psnr_mean": means[best],
            "psnr_worst": min(row["psnr"] for row in chosen),
            "psnr_by_dense_steps": tried,
            "loop_speedup": float(np.mean([row["speedup"] for row in chosen])),
        }

    # -- scores ----------------------------------------------------------------------------------------------------

    def scores(self, layer: str, head: int, weights: Mapping[int, float]) -> HeadScores:
        """Scores of a head over the traced steps in ``weights``, each with its weight."""
        parts = [[(w, self._arrays(p, step, layer)) for step, w in weights.items()] for p in self.traced()]

        def total(name: str) -> np.ndarray:
            return np.stack([sum(w * a[f"{name}{head}"].astype(np.float64) for w, a in part) for part in parts])

        return HeadScores(total("error"), float(total("energy").mean()), total("summed").mean(0), total("true").mean(0))

    def mass(self, prompt: int, layer: str, head: int, steps: Sequence[int]) -> np.ndarray:
        """Attention mass of a head's visual blocks, per query, mean over traced steps: float ``[NB, NB]``."""
        found = [self._arrays(prompt, s, layer)[f"mass{head}"].astype(np.float32) for s in steps]
        return np.asarray(np.mean(found, axis=0))

    def _arrays(self, prompt: int, step: int, layer: str) -> dict[str, np.ndarray]:
        key = (prompt, step, layer)
        if not hasattr(self, "_held") or self._held[0] != layer:
            self._held: tuple[str, dict[tuple[int, int, str], dict[str, np.ndarray]]] = (layer, {})
        held = self._held[1]
        if key not in held:
            held[key] = self.store.get_arrays(f"trace/{prompt}/{step}/{layer}")
        return held[key]

    def reference(self, orders: dict[tuple[str, int], TokenOrder]) -> tuple[dict[str, list[HeadEntry]], np.ndarray]:
        """Sparse entries of every layer, equal at all steps: bitmaps of the reference density, each head's best tail.

        Also the squared error that they should make in every layer at every traced step: ``[steps, layers]``.
        """
        found: dict[str, list[HeadEntry]] = {}
        predicted = np.zeros((self.trace_length, len(self.layers)))
        for j, (layer, grid) in enumerate(self.grids.items()):
            found[layer] = []
            for head in range(self.architecture.heads):
                order = orders[layer, head]
                table = self.table(grid, order)
                steps = [self.scores(layer, head, {s: 1.0}) for s in range(self.trace_length)]
                together = self.scores(layer, head, {s: 1 / max(x.energy, 1e-30) for s, x in enumerate(steps)})
                tries = []
                for t, tail in enumerate(TAILS):
                    mask = reference_mask(together.mean[t], table.weight, REFERENCE_DENSITY)
                    left = [x.corrected(t, float(x.mean[t][~mask].sum())) for x in steps]
                    tries.append((float(np.sum(left)), tail, mask, left))
                _, tail, mask, left = min(tries, key=lambda x: x[0])
                predicted[:, j] += left
                bitmap = Bitmap.from_mask(mask, grid, order, self.config.block_size)
                found[layer].append(HeadEntry(order, bitmap, execution=Execution(tail=tail)))
        return found, predicted

    def table(self, grid: TokenGrid, order: TokenOrder) -> FamilyTable:
        key = (grid.visual_only(), order)
        if key not in self.tables:
            self.tables[key] = FamilyTable(*key, self.config.block_size)
        return self.tables[key]

    @property
    def trace_length(self) -> int:
        return len(self.store.get_json("trace/0/levels"))

    # -- sensitivities ---------------------------------------------------------------------------------------------

    def effects(self, entries: dict[str, list[HeadEntry]], predicted: np.ndarray) -> np.ndarray:
        """Squared change of the guided output per predicted squared error of each layer: ``[steps, layers]``."""
        steps = [s for s in self.effect_steps() if s < self.trace_length]
        todo = [(s, n) for s in steps for n in self.layers if f"effect/{s}/{n}" not in self.store]
        find = layouts_by_call(entries, self.config.block_size)
        settings = self.config.settings(self.config.trace_steps)
        if todo:
            with self.bar(len(todo), "sensitivity") as bar:
                for step, layer in todo:

                    def one(call: Any, layer: str = layer) -> BlockLayout | None:
                        return find(call) if call.layer == layer else None

                    effect = step_effect(
                        self.pipe, self.dense_recording(), self.prompts[0], self.config.seed, settings, step, one
                    )
                    self.store.put_json(f"effect/{step}/{layer}", effect)
                    bar.update()
        measured = np.empty((len(steps), len(self.layers)))
        for j, layer in enumerate(self.layers):
            for i, step in enumerate(steps):
                effect = float(self.store.get_json(f"effect/{step}/{layer}"))
                measured[i, j] = effect / max(float(predicted[step, j]), 1e-30)
        every = np.arange(self.trace_length)
        logs = np.log(np.maximum(measured, 1e-30))
        return np.exp(np.stack([np.interp(every, steps, logs[:, j]) for j in range(len(self.layers))], 1))

    def amplification(self, entries: dict[str, list[HeadEntry]], output_error: np.ndarray) -> np.ndarray:
        """Growth of an error between the step that makes it and the final latent, for the traced steps.

        An error of the model's output moves the latent by that error times the step's change of noise level, and what
        follows makes it ``growth`` times larger (as a squared norm).

        A part of the sparse error is put into one step of the recorded generation, which then goes on dense. Only a
        part, because a whole one at an early step leads to a different clip, whose distance says nothing about the
        size of the error any more. ``output_error``: predicted for the whole error, ``[steps]``.
        """
        steps = [s for s in self.inject_steps() if s < self.trace_length]
        todo = [s for s in steps if f"inject/{s}" not in self.store]
        if todo:
            find = layouts_by_call(entries, self.config.block_size)
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
        stride = strides(np.array(self.store.get_json("trace/0/levels")))
        found = [
            float(self.store.get_json(f"inject/{s}"))
            / max(INJECTED_SHARE**2 * float(output_error[s]) * stride[s] ** 2, 1e-30)
            for s in steps
        ]
        return np.exp(np.interp(np.arange(self.trace_length), steps, np.log(np.maximum(found, 1e-30))))


def _why_unseen(unseen: Mapping[str, str], layer: str | None = None) -> str:
    """The reason why a layer's (or any) call runs dense whatever the plan."""
    reason = unseen.get(layer) if layer is not None else next(iter(unseen.values()), None)
    return reason or "its self-attention was not seen; is it replaced by something else?"


def run_search(
    pipe: Any,
    prompts: Sequence[str],
    config: SearchConfig,
    out: Path,
    *,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
    on_stage: Callable[[str, int, int], None] | None = None,
) -> SparsityPlan:
    """Search a plan and write it to ``out``, with ``search.sqlite`` (to go on after a kill) and the pictures' data.

    ``say`` receives the lines meant for the user (the estimate, what was chosen), ``on_stage`` a stage's name, how many
    of its parts are done, and of how many. What they raise ends the search; the same call then goes on where it was.
    Raises :class:`BadInput` for settings that cannot work, :class:`StoreMismatch` where ``out`` holds another search.
    """
    if not prompts:
        raise BadInput("a search needs at least one prompt")
    say = say or log.info
    out = Path(out)
    config = config.resolved(pipe)
    with SearchStore(out / "search.sqlite") as store:
        search = _Search(pipe, tuple(prompts), config, store, progress, say, on_stage or (lambda *_: None))
        resumed = store.claim(
            {
                "format": STORE_FORMAT,
                "version": diffsparse.__version__,
                "architecture": search.architecture.fingerprint,
                **model_identity(pipe),
                "prompts": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
                **{k: v for k, v in asdict(config).items() if k not in FREE_SETTINGS},
            }
        )
        if resumed:
            say(f"going on with the search in {out}")
        return _run(search, out)


def _estimate(probe: dict[str, Any], config: SearchConfig, layers: int, prompts: int) -> float:
    """Seconds that the stages after the probe will take."""
    forward, branches, steps = probe["forward_seconds"], probe["branches"], config.trace_steps
    rest = sum(steps - s for s in {0, 3 * steps // 4})
    return float(forward * (1.3 * prompts * branches * steps + 2 * branches * layers + branches * rest) + 15)


def _run(search: _Search, out: Path) -> SparsityPlan:
    config, store, say = search.config, search.store, search.say
    begin = time.perf_counter()
    probe = search.probe()
    grid = main_grid(search.grids)
    seconds = _estimate(probe, config, len(search.layers), len(search.traced()))
    say(f"{grid} = {grid.seq_len} tokens, {len(search.layers)} layers of {search.architecture.heads} heads")
    if dense := probe["dense"]:
        name, reason = next(iter(dense.items()))
        say(f"{len(dense)} other layers stay dense ({name}: {reason})")
    say(f"estimate: {seconds / 60:.1f} minutes, validation apart")
    costs = search.costs(probe["head_dim"])
    orders = {(n, h): parse_order(o) for n, row in probe["orders"].items() for h, o in enumerate(row)}
    search.trace(orders, probe["branches"])
    reference, predicted = search.reference(orders)
    effects = search.effects(reference, predicted)
    traced = [float(v) for v in store.get_json("trace/0/levels")]
    parts: list[list[str]] = store.get_json("trace/0/parts")
    growth = search.amplification(reference, (effects * predicted).sum(1))
    switch = switch_level(search.pipe, traced, parts)
    composer = Composer(search, search.call_levels(), search.grids, orders, costs, effects, growth, traced, switch)
    with search.bar(1, "assign") as bar:
        candidates = composer.candidates(config.candidates if config.validation_prompts else 1)
        bar.update()
    seconds = time.perf_counter() - begin
    chosen = candidates[0]
    quality: dict[str, Any] | None = None
    if config.validation_prompts:
        chosen, quality = search.validate(candidates)
    plan = chosen.plan
    if quality is not None:
        plan.record["quality"] = quality
    about = _record(search, grid, costs[grid])
    about["search"] |= plan.record["search"] | {"seconds": round(seconds, 1)}
    plan.record.update(about)
    about = plan.record["search"]
    say(
        f"chosen: {about['dense_steps']} of {about['of_steps']} steps dense, {about['phases']} phase(s), "
        f"whole-trajectory density {about['trajectory_density']:.3f}"
    )
    measured = _measured(search, chosen, traced)
    with writing(out, then="run the same command again: it goes on from what was measured"):
        plan.save_pretrained(out)
        measured.save(out)
    return plan


def _record(search: _Search, grid: TokenGrid, costs: CostModel) -> dict[str, Any]:
    config = search.config
    name = getattr(search.pipe, "name_or_path", None) or getattr(search.pipe.config, "_name_or_path", "")
    # The folder's own name only: where a model lies on somebody's disk is nobody's business.
    sizes = _size_that_ran(search, grid)
    return {
        "model": {"id": Path(str(name)).name, "pipeline": type(search.pipe).__name__},
        "calibration": {
            "prompts_sha256": hashlib.sha256("\n".join(search.prompts).encode()).hexdigest(),
            "traced_prompts": len(search.traced()),
            "seed": config.seed,
            "grid": str(grid),
            "steps": config.steps,
            "trace_steps": config.trace_steps,
            **{
                name: value
                for name in ("guidance_scale", "true_cfg_scale", "height", "width", "num_frames")
                if (value := sizes.get(name, getattr(config, name))) is not None
            },
        },
        "search": {"budget": config.budget, "density": config.density, "kernel": _kernel_version()},
        "costs": costs.to_dict(),
        "environment": environment(next(search.transformer.parameters()).device),
    }


def _size_that_ran(search: _Search, grid: TokenGrid) -> dict[str, int]:
    """Height and width in pixels where nobody gave them, and the pipeline has them from its model.

    What the pipeline prepared latents for counts only where it agrees with the grid that was seen.
    """
    size, rule = search.probe().get("size"), shape_rule(search.pipe)
    if size is None or size != [grid.height * rule.height, grid.width * rule.width]:
        return {}
    return {"height": size[0], "width": size[1]}


def _kernel_version() -> str:
    return f"{sparse_attention.__module__} {diffsparse.__version__}"


def _measured(search: _Search, chosen: Candidate, traced: list[float]) -> PooledAttention:
    """Mean attention of every phase, layer and head, and what the chosen entries make of it."""
    plan = chosen.plan
    phases, heads = plan.schedule.num_phases, search.architecture.heads
    members = [[s for s, level in enumerate(traced) if plan.schedule.phase(level) == p] for p in range(phases)]
    orders = {n: [parse_order(o) for o in row] for n, row in search.store.get_json("probe")["orders"].items()}
    # Orders cut a ragged grid into different numbers of blocks; the bins are equally many for all.
    side = min(80, *(len(t.weight) for t in search.tables.values()))
    pooled = np.zeros((phases, len(search.layers), heads, side, side), np.float16)
    kept = np.zeros((phases, len(search.layers), heads))
    for j, (layer, grid) in enumerate(search.grids.items()):
        for head in range(heads):
            table = search.table(grid, orders[layer][head])
            for p in range(phases):
                steps = members[p] or [len(traced) // 2]
                masses = [search.mass(prompt, layer, head, steps) for prompt in search.traced()]
                pooled[p, j, head] = _shrink(masses[0], side)
                kept[p, j, head] = _kept_mass(plan.entries[plan.index[p, j, head]], np.mean(masses, axis=0), table)
    figures = HeadFigures(chosen.error, kept, plan_digest(plan))
    return PooledAttention(pooled, orders, main_grid(search.grids), plan.block_size, figures)


def _kept_mass(entry: HeadEntry, mass: np.ndarray, table: FamilyTable) -> float:
    """Share of the attention that an entry computes exactly, by the ``mass [NB, NB]`` of the blocks of its order."""
    if entry.is_dense or entry.execution.mode == "skip":  # in no order of their own
        return float(entry.is_dense)
    dropped = ~entry.pattern.block_mask(table.grid, entry.order, table.block_size)
    share = table.weight.sum(1)  # of the queries, by block
    return float(np.clip(1 - share @ (mass * dropped).sum(1), 0, 1))


def _shrink(mass: np.ndarray, side: int) -> np.ndarray:
    """Pool a square matrix to ``[side, side]``, keeping rows' sums: queries are averaged, keys are summed."""
    edges = np.linspace(0, len(mass), side + 1).astype(int)[:-1]
    rows = np.diff([*edges, len(mass)])[:, None]
    return np.add.reduceat(np.add.reduceat(mass, edges, 0) / rows, edges, 1)
