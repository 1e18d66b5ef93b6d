"""Third stage: what an error in a layer does to the model's output, and what an error in a step does to the clip."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from diffsparse.entry import HeadEntry
from diffsparse.layout import BlockLayout
from diffsparse.pipelines import tap_attention
from diffsparse.search.entries import Wanted, layer_entries, workers
from diffsparse.search.layers import layouts_by_call
from diffsparse.search.observe import Recording, final_latents, replaying, step_effect, watched_updates
from diffsparse.search.options import FamilyTable
from diffsparse.search.perturb import partial_error, stale_outputs
from diffsparse.search.sharing import share
from diffsparse.search.trial import strides
from diffsparse.search.workspace import Probe, Workspace

__all__ = [
    "amplification",
    "effect_steps",
    "effects",
    "inject_steps",
    "layer_groups",
    "most_groups",
    "reference",
    "reuse_factor",
]

#: One of ``BITMAP_DENSITIES``.
REFERENCE_DENSITY = 0.06
INJECTED_SHARE = 0.25
#: Generations that are taken up again for each of the steps, at most: a model of more layers is perturbed in groups.
MOST_GROUPS = 10
#: Groups of a model so slow that all of them would take longer than this, in seconds.
FEWER_GROUPS, GROUPS_SECONDS = 5, 240.0
# Errors of outputs that are used again may add up with those of the blocks that are left out: (a + b)^2 is at most
# 2 (a^2 + b^2).
MARGIN = 2.0
#: Host memory that outputs may take while what they get wrong is measured.
REUSE_BYTES = 2e9


def effect_steps(work: Workspace) -> tuple[int, ...]:
    """Trace steps at which layers are perturbed."""
    n = work.config.trace_steps
    return tuple(sorted({min(n - 1, n // 8), n // 2}))


def most_groups(probe: Probe) -> int:
    """How many groups of layers are perturbed one after another, at most."""
    seconds = MOST_GROUPS * 2 * probe.branches * probe.forward_seconds
    return MOST_GROUPS if seconds <= GROUPS_SECONDS else FEWER_GROUPS


def layer_groups(layers: tuple[str, ...], most: int = MOST_GROUPS) -> list[tuple[str, ...]]:
    """Neighbouring layers that are perturbed together, in at most so many groups.

    The first ones are smaller: from layer to layer, that is where it changes most how much of an error comes through.
    """
    count = min(len(layers), most)
    even = np.linspace(0, 1, count + 1)
    edges = np.rint(len(layers) * (even if count == len(layers) else even**1.5)).astype(int)
    edges = np.maximum(edges, np.arange(count + 1))  # none is empty
    return [tuple(layers[a:b]) for a, b in pairwise(edges.tolist())]


def inject_steps(work: Workspace) -> tuple[int, ...]:
    """Trace steps at which an error is put into the trajectory; growth falls evenly, on a log scale, between."""
    n = work.config.trace_steps
    return tuple(sorted({0, 3 * n // 4}))


def reference(work: Workspace) -> tuple[dict[str, list[HeadEntry]], np.ndarray]:
    """Sparse entries of every layer, equal at all steps: masks of the reference density, each head's best tail.

    Also the squared error that they should make in every layer at every traced step: ``[steps, layers]``.
    """
    found: dict[str, list[HeadEntry]] = {}
    predicted = np.zeros((work.trace_length, len(work.layers)))
    every = range(work.trace_length)  # they share a mask
    with work.bar(len(work.layers), "masks") as bar, workers() as pool:
        for j, (layer, grid) in enumerate(work.grids.items()):
            by_step = [work.layer_scores(layer, {step: 1.0}, every, repaired=False, alone=True) for step in every]
            tables = [work.table(grid, work.orders[layer, head]) for head in range(work.architecture.heads)]
            wanted = []
            for head, table in enumerate(tables):
                steps = [heads[head] for heads in by_step]
                options = _reference_options(table)
                # [steps, tails]; a step counts by what it leaves of its output
                left = table.errors(steps)[:, options]
                energy = np.maximum([scores.energy for scores in steps], 1e-30)
                best = int((left / energy[:, None]).sum(0).argmin())
                predicted[:, j] += left[:, best]
                weights = {s: 1 / e for s, e in enumerate(energy.tolist())}
                wanted.append(Wanted(head, head, table.options[options[best]], weights))
            made = layer_entries(work, layer, tables, wanted, pool)
            found[layer] = [made[one.key] for one in wanted]
            bar.update()
    return found, predicted


def _reference_options(table: FamilyTable) -> list[int]:
    """Places of the measured masks of the reference density, one a tail; on very few blocks of the least there is.

    Nothing but tails where there is one block.
    """
    kinds = [(o.kind, o.density) for o in table.options]
    densities = [d for kind, d in kinds if kind == "bitmap" and d >= REFERENCE_DENSITY]
    wanted = ("bitmap", min(densities)) if densities else ("family", 0.0)
    return [i for i, kind in enumerate(kinds) if kind == wanted]


def effects(work: Workspace, entries: dict[str, list[HeadEntry]], predicted: np.ndarray) -> np.ndarray:
    """Squared change of the guided output per predicted squared error of each layer: ``[steps, layers]``.

    Layers that follow one another pass errors on much alike. So in a model of many a group of neighbours is made sparse
    at once, and each layer counts as its group does.
    """
    steps = [s for s in effect_steps(work) if s < work.trace_length]
    groups = layer_groups(work.layers, most_groups(work.probe))
    todo = [(s, names) for s in steps for names in groups if not work.has_effect(s, names[0])]
    if todo:
        give_recording(work)
        share(work, _perturb, todo, entries)
    measured = np.empty((len(steps), len(work.layers)))
    for names in groups:
        which = [work.layers.index(name) for name in names]
        for i, step in enumerate(steps):
            measured[i, which] = work.effect(step, names[0]) / max(float(predicted[step, which].sum()), 1e-30)
    every = np.arange(work.trace_length)
    logs = np.log(np.maximum(measured, 1e-30))
    return np.exp(np.stack([np.interp(every, steps, logs[:, j]) for j in range(len(work.layers))], 1))


def _perturb(work: Workspace, todo: list[tuple[int, tuple[str, ...]]], entries: dict[str, list[HeadEntry]]) -> None:
    """Measure what the errors of groups of layers do to the output, each at a step."""
    find = layouts_by_call(entries, work.config.block)
    settings = work.settings(work.config.trace_steps)
    with work.bar(len(todo), "sensitivity") as bar:
        for step, names in todo:

            def some(call: Any, names: tuple[str, ...] = names) -> BlockLayout | None:
                return find(call) if call.layer in names else None

            effect = step_effect(
                work.pipe, work.dense_recording(), work.prompts[0], work.config.seed, settings, step, some
            )
            work.put_effect(step, names[0], effect)
            bar.update()


def give_recording(work: Workspace) -> None:
    """The recorded generation of the first prompt for every rank, once."""
    if work.ranks is not None and not work.recording_given:
        share(work, _keep_recording, list(range(work.ranks.count)), work.dense_recording().on("cpu"))
        work.recording_given = True


def _keep_recording(work: Workspace, _: list[int], recording: Recording) -> None:
    if work.recording is None:
        work.recording = recording.on(work.device)


def amplification(work: Workspace, entries: dict[str, list[HeadEntry]], output_error: np.ndarray) -> np.ndarray:
    """Growth of an error between the step that makes it and the final latent, for the traced steps.

    An error of the model's output moves the latent by that error times the step's change of noise level, and what
    follows makes it ``growth`` times larger (as a squared norm).

    A part of the sparse error is put into one step of the recorded generation, which then goes on dense. Only a
    part, because a whole one at an early step leads to a different clip, whose distance says nothing about the
    size of the error any more. ``output_error``: predicted for the whole error, ``[steps]``.
    """
    steps = [s for s in inject_steps(work) if s < work.trace_length]
    todo = [s for s in steps if not work.has_injected(s)]
    if todo:
        give_recording(work)
        share(work, _inject, todo, entries)
    stride = strides(np.array(work.trace_levels))
    found = [work.injected(s) / max(INJECTED_SHARE**2 * float(output_error[s]) * stride[s] ** 2, 1e-30) for s in steps]
    return np.exp(np.interp(np.arange(work.trace_length), steps, np.log(np.maximum(found, 1e-30))))


def _inject(work: Workspace, todo: list[int], entries: dict[str, list[HeadEntry]]) -> None:
    """Measure what errors that are put into steps do to the clip."""
    find = layouts_by_call(entries, work.config.block)
    settings = work.settings(work.config.trace_steps)
    each = work.config.trace_steps
    with work.bar(len(todo) * each, "schedule") as bar, watched_updates(work.pipe, lambda _: bar.update()):
        for i, step in enumerate(todo, 1):
            recording = work.dense_recording()
            # Replayed calls make no attention call, so the first one that is counted belongs to this step.
            inject = partial_error(find, INJECTED_SHARE, 1)
            with replaying(work.pipe, recording, recording.first_call(step)), tap_attention(work.pipe, inject):
                latents = final_latents(work.pipe, work.prompts[0], work.config.seed, settings)
            work.put_injected(step, float((latents - recording.latents).double().square().sum()))
            bar.reach(i * each)


def reuse_factor(work: Workspace, layers: np.ndarray, growth: np.ndarray, memory: float) -> float:
    """What an error of outputs that are used again really does to the clip, over what the sum of errors predicts.

    What changes from step to step changes alike in all layers, so that much of it does not add up; how much depends on
    the model. So it is measured, in one generation: the error of outputs of every second step, from a quarter of the
    generation on, made as small as it is where the steps are as long as in the generation that the plan is for.

    ``layers``: :func:`effects`. ``growth``: :func:`amplification`. ``memory``: bytes that may be kept meanwhile; of a
    large model some layers have to do.
    """
    if (known := work.reuse_factor) is not None:
        return known
    first = work.trace_length // 4
    share = min(1.0, work.trace_length / len(set(work.call_levels())))
    chosen, recording = _layers_within(work, memory), work.dense_recording()
    stale, changed = stale_outputs(chosen, share, first)
    with (
        work.bar(work.config.trace_steps, "reuse") as bar,
        tap_attention(work.pipe, stale),
        watched_updates(work.pipe, lambda _: bar.update()),
    ):
        settings = work.settings(work.config.trace_steps)
        latents = final_latents(work.pipe, work.prompts[0], work.config.seed, settings)
        bar.reach(work.config.trace_steps)
    if not changed:  # too few steps to use anything again
        return work.put_reuse_factor(1.0)
    measured = float((latents - recording.latents).double().square().sum())
    heads = range(work.architecture.heads)
    drift = np.array([sum(work.drift(layer, head) for head in heads) for layer in chosen]).T
    gap = -np.diff(work.trace_levels, prepend=work.trace_levels[0])
    push = strides(np.array(work.trace_levels)) * np.sqrt(growth)
    effect = layers[:, [work.layers.index(layer) for layer in chosen]]
    each = push * ((share * gap[:, None]) ** 2 * drift * effect).sum(1)
    return work.put_reuse_factor(MARGIN * measured / max(float(push[first:].sum() * each[changed].sum()), 1e-30))


def _layers_within(work: Workspace, memory: float) -> list[str]:
    """Layers all over the model whose outputs fit into so many bytes; at least one."""
    largest = max(grid.seq_len for grid in work.grids.values())
    rows = work.architecture.heads * largest * work.probe.branches * work.probe.items
    bytes_each = rows * (work.probe.head_dim + 4)  # in 8 bits, with a scale for each row
    count = min(len(work.layers), max(1, int(min(memory, REUSE_BYTES) // bytes_each)))
    return [work.layers[int(i)] for i in np.linspace(0, len(work.layers) - 1, count).round()]
