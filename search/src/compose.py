"""From measurements to plans: the number of dense first steps, the phases, and every head's entry, under a budget."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import replace
from functools import cached_property, partial

import numpy as np

from diffsparse.entry import HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.kernels.costs import CostTable
from diffsparse.order import TokenOrder
from diffsparse.pipelines.policy import Machine
from diffsparse.plan import SparsityPlan
from diffsparse.search.assign import Assignment, InfeasibleBudget, assign, assign_within, lagrangian, most_held
from diffsparse.search.candidate import Candidate, Draft
from diffsparse.search.candidates import orders_for
from diffsparse.search.choices import layer_choices
from diffsparse.search.curves import head_curves
from diffsparse.search.drift import Hold, holds_for
from diffsparse.search.entries import Wanted, layer_entries, workers
from diffsparse.search.errors import BadInput
from diffsparse.search.items import Items, LayerSteps, Measurements
from diffsparse.search.options import NOTHING
from diffsparse.search.pricing import Pricing
from diffsparse.search.schedules import Outlook
from diffsparse.search.trial import Trial, distinct, strides

__all__ = ["Candidate", "Composer"]

# Numbers of phases that are tried.
PHASES = (2, 3, 4, 6)
# A further phase must lower the predicted error by this share, or the plan stays simpler.
PHASE_GAIN = 0.05
# Whole-trajectory densities are kept this far below the wanted one: borders of blocks and short ones round up.
DENSITY_MARGIN = 0.002
# What is over all the same is taken off the budget, and the assignment made again, this many times at most.
_TRIES = 6
# By at least this share: masks have whole blocks.
LEAST_STEP = 0.001
# Plans with one phase only tell about how good others with the same dense steps will be, so that a few are made.
LEAST_TRIED = 3
# Numbers of dense steps whose predicted error is at most this many times the least are worth a generation.
WORTH_TRYING = 4.0


class Composer:
    """Plans from a search's measurements.

    ``levels``: of every model call of the generation that the plan is for. ``grids``: of every layer's calls.
    ``costs``: on each of them. ``machine``: on which the plan is to run. ``effects``: squared change of the guided
    output per squared error of a layer, ``[traced steps, layers]``. ``growth``: of a squared error from the latent
    where it is made to the final one, ``[traced steps]``. ``traced``: noise levels of the traced steps. ``switch``: the
    level below which another expert runs, with layers of its own of the same names. ``memory``: bytes that outputs may
    take which are used again; 0 computes all of them at every step. ``items``: batch items of all calls of a step.
    ``reuse_factor``: what an error of outputs that are used again does, over the sum that is predicted.
    """

    def __init__(
        self,
        search: Measurements,
        levels: Sequence[float],
        grids: Mapping[str, TokenGrid],
        orders: Mapping[tuple[str, int], TokenOrder],
        costs: Mapping[TokenGrid, CostTable],
        machine: Machine,
        effects: np.ndarray,
        growth: np.ndarray,
        traced: Sequence[float],
        switch: float | None = None,
        memory: float = 0.0,
        items: int = 2,
        reuse_factor: float = 1.0,
    ) -> None:
        self.search, self.config, self.grids, self.orders = search, search.config, grids, orders
        self.effects, self.growth = effects, growth
        self.memory, self.reuse_factor = memory, reuse_factor
        row = search.architecture.head_dim + 4  # a row of a head in 8 bits, and its scale
        self.bytes = {layer: float(grid.seq_len * row * items) for layer, grid in grids.items()}
        self.layers, self.heads = search.layers, search.architecture.heads
        self.levels, self.calls = distinct(levels)
        self.steps = len(self.levels)
        self.switch = switch
        #: The first step of the second expert, or 0.
        self.second = 0 if switch is None else int((self.levels >= switch).sum())
        # The traced step that stands for each step: the nearest, but none of another expert.
        away = np.abs(self.levels[:, None] - np.array(traced))
        if switch is not None:
            away += 10.0 * ((self.levels >= switch)[:, None] != (np.array(traced) >= switch))
        self.bins = away.argmin(1)
        # A step's error moves the final latent by this, times the root of the model's output error. Steps beside each
        # other make the same error with the same masks: amplitudes add up, so squares are weighted with all of them.
        self.push = strides(self.levels) * np.sqrt(np.interp(-self.levels, -np.array(traced), growth))
        density, budget = self.config.density, self.config.budget
        self.wanted = density - DENSITY_MARGIN if density is not None else float(budget or 0.0)
        self.blocks = {grid: len(search.table(grid, orders_for(grid, self.config.block)[0]).weight) for grid in costs}
        self.pricing = Pricing(self.config, grids, costs, self.blocks, self.heads, machine)
        largest = max(costs, key=lambda grid: grid.seq_len)
        self.work = {n: (grids[n].seq_len / largest.seq_len) ** 2 for n in self.layers}
        seconds = {grid: float(known.dense_seconds or 0.0) for grid, known in costs.items()}
        self.time = {n: seconds[grids[n]] / seconds[largest] for n in self.layers}
        # Of a dense head call, by layer, over that of a layer on the largest grid.
        self.weight = self.work if self.config.density is not None else self.time

    def at(self, budget: float) -> Composer:
        """The same under another budget. Only for one that is not under a density, which weighs layers otherwise."""
        other = copy(self)
        other.config, other.wanted = replace(self.config, budget=budget, target=None, points=None), budget
        return other

    def attention(self, steps: slice | list[int] = slice(None)) -> float:
        """All attention of some of the steps, in dense head calls on the largest grid."""
        return float(self.calls[steps].sum()) * self.heads * sum(self.weight.values())

    def room(self, dense: list[int]) -> float:
        """What is left of the budget, in dense head calls, after the dense steps."""
        return self.wanted * self.attention() - self.attention(dense)

    def trial(self, dense: int, phases: int) -> Trial:
        return Trial.even(self.steps, dense, phases, self.second)

    def densities(self, plan: SparsityPlan) -> np.ndarray:
        """Work-weighted density of a step's calls, float ``[phases]``."""
        done = np.zeros(plan.schedule.num_phases)
        for grid in self.blocks:
            layers = [n for n in self.layers if self.grids[n] == grid]
            if layers:
                done += plan.call_densities(grid, layers).sum(1) * self.work[layers[0]]
        return done / sum(self.work.values())

    def trajectory_density(self, plan: SparsityPlan) -> float:
        """The same over all steps, dense ones included, and what earlier steps' outputs save."""
        done = np.zeros(self.steps)
        for grid in self.blocks:
            layers = [n for n in self.layers if self.grids[n] == grid]
            if layers:
                done += plan.step_densities(grid, self.levels, layers) * len(layers) * self.work[layers[0]]
        return float(np.average(done / sum(self.work.values()), weights=self.calls))

    @property
    def _holds_all(self) -> bool:
        """Whether there is room for the outputs of all heads."""
        return self.heads * sum(self.bytes.values()) <= self.memory

    def holds_at(self, members: list[int]) -> list[Hold]:
        """The ways to use outputs again in a phase of these steps."""
        return holds_for(self.levels[members].tolist()) if self.memory > 0 else []

    def items(self, trial: Trial) -> Items:
        found = Items([], [], [], [], [], [], set(), [], [])
        push = self.push * self.push[trial.sparse].sum()
        steps = [trial.members(phase) for phase in range(trial.phases)]
        holds = [self.holds_at(members) for members in steps]
        for j, layer in enumerate(self.layers):
            weights = [self._weights(members, push, j) for members in steps]
            every = [self.search.layer_scores(layer, each) for each in weights]
            tables = [self.search.table(self.grids[layer], self.orders[layer, head]) for head in range(self.heads)]
            drift = [self.search.drift(layer, head) for head in range(self.heads)] if self.memory > 0 else None
            late: list[np.ndarray | None] = []
            for phase, members in enumerate(steps):
                bins = self.bins[members]
                rate = self.reuse_factor * push[members] * self.effects[bins, j]
                late.append(None if drift is None or not holds[phase] else rate * np.stack([d[bins] for d in drift]))
            prices_of = partial(self.pricing.of_table, layer=layer)
            calls = [self.calls[members] for members in steps]
            chosen, unstable = layer_choices(tables, every, prices_of, holds, calls, late, self._holds_all)
            found.unstable |= {(layer, head) for head in unstable}
            for head in range(self.heads):
                prices = self.pricing.of_table(tables[head], layer)
                for phase, members in enumerate(steps):
                    choices, cost = chosen[head, phase]
                    found.options.append(choices)
                    found.per_call.append(prices[choices.places])
                    found.bytes.append(np.where(choices.reuses > 0, self.bytes[layer], 0.0))
                    found.errors.append(choices.errors)
                    found.whole.append(int(self.calls[members].sum()) * self.weight[layer])
                    found.prices.append(cost * found.whole[-1])
                    found.scores.append(every[phase][head])
                    found.weights.append(weights[phase])
        return found

    def _weights(self, members: list[int], push: np.ndarray, j: int) -> dict[int, float]:
        """Of the traced steps, in a phase of these steps, for errors of layer ``j``."""
        found: dict[int, float] = {}
        for i in members:
            traced = int(self.bins[i])
            found[traced] = found.get(traced, 0.0) + float(push[i] * self.effects[traced, j])
        return found

    def least(self) -> float:
        """The share of a plan in which every head attends to something, as cheaply as it can.

        Below it heads would be left out only to fit. One that puts out nothing may be left out all the same.
        """
        dense = self.config.dense_steps or 0
        items = self.items(self.trial(dense, 1))
        spent = float(self.attention(slice(dense)))
        for options, prices in zip(items.options, items.prices, strict=True):
            spent += min((p for o, p in zip(options, prices, strict=True) if o.kind != "skip"), default=0.0)
        return spent / self.attention()

    def check_share(self) -> None:
        """Raises :class:`BadInput` where less is asked for than can be had, with the least."""
        name = "density" if self.config.density is not None else "budget"
        asked = float(getattr(self.config, name))
        least = self.least() + (asked - self.wanted)
        if asked >= least:
            return
        ask = math.ceil(least * 1000 + 1e-6) / 1000
        steps = f" with {self.config.dense_steps} dense steps" if self.config.dense_steps else ""
        if ask > 1:
            why = "".join(f" ({reason})" for reason in sorted(self.pricing.reasons))
            raise BadInput(
                f"a {name} of {asked:g} cannot be reached on this model{steps}: the cheapest plan is no cheaper than "
                f"dense attention{why}; ask for fewer dense steps, or leave the model dense"
            )
        raise BadInput(
            f"a {name} of {asked:g} cannot be reached on this model{steps}: the least is {least:.3f}, and below it "
            f"whole heads would be left out; ask for {ask:g} or more"
        )

    def scan(self) -> dict[int, float]:
        """Predicted error of the best plan with one phase for each number of dense steps that fits the budget."""
        counts = range(self.steps) if self.config.dense_steps is None else [self.config.dense_steps]
        found: dict[int, float] = {}
        for dense in counts:
            if self.room(list(range(dense))) <= 0:
                break
            trial = self.trial(dense, 1)
            error = self._least_error(trial, self.items(trial))
            if not math.isfinite(error):
                break
            found[dense] = error
            # With ever less left for the others, the error only rises from here on.
            if found[dense] > 4 * WORTH_TRYING * min(found.values()):
                break
        return found

    def candidates(self, count: int) -> list[Candidate]:
        """The predicted best plan, and up to ``count - 1`` others with other numbers of dense steps worth trying.

        Where outputs are used again, one of them is the best plan without that: how much that costs is the least
        certain of what is predicted.
        """
        self.check_share()
        found = self._by_dense_steps(max(count, LEAST_TRIED), count)
        if count > 1 and any(c.plan.reuses for c in found):
            without = copy(self)
            without.memory = 0.0
            without.__dict__.pop("outlook", None)
            return [*found[: count - 1], *without.candidates(1)]
        return found

    def _by_dense_steps(self, count: int, keep: int) -> list[Candidate]:
        """The best plans, best first: ``keep`` of those with ``count`` numbers of dense steps that are worth trying."""
        scan = self.scan()
        least = min(scan, key=lambda k: scan[k])
        near = [k for k in sorted(scan) if scan[k] <= WORTH_TRYING * scan[least]]
        # Spread over the range: plans with one dense step more or less hardly differ.
        spread = [near[round(i * (len(near) - 1) / max(1, count - 1))] for i in range(count)]
        chosen = list(dict.fromkeys([least, *reversed(spread)]))[:count]
        drafts = sorted((self.draft(k, scan) for k in chosen), key=lambda draft: draft.error)
        made: list[Candidate] = []
        # Masks take most of the time, and what is taken off the budget on their account only adds to an error.
        while drafts and (len(made) < keep or drafts[0].error < made[keep - 1].predicted_error):
            made = sorted([*made, self.plan(drafts.pop(0), scan)], key=lambda candidate: candidate.predicted_error)
        return made[:keep]

    def draft(self, dense: int, scan: Mapping[int, float]) -> Draft:
        """The best plan with this number of dense steps, without its entries."""
        trial, items = self._scheduled(dense, scan[dense])
        room = self.room(trial.dense)
        return Draft(trial, *self._settled(trial, items, room), room)

    def plan(self, draft: Draft, scan: Mapping[int, float]) -> Candidate:
        """A draft with its entries, within the density where one is asked for."""
        trial, items, result, room = draft.trial, draft.items, draft.result, draft.room
        made: dict[Hashable, HeadEntry] = {}
        for left in reversed(range(_TRIES)):
            plan = SparsityPlan.from_table(
                self._entries(trial, items, result, made),
                schedule=trial.schedule(self.levels, self.switch, self.second),
                block_size=self.config.block,
                architecture=self.search.architecture,
                repair=self.config.online,
            )
            excess = self.trajectory_density(plan) - (self.config.density or 1.0)
            if excess <= 0 or not left:
                break
            room = max(
                room - max(1.5 * excess, LEAST_STEP) * self.attention(), sum(float(p.min()) for p in items.prices)
            )
            items, result = self._settled(trial, items, room)
        plan.record["search"] = {
            "dense_steps": len(trial.dense),
            "dense_at": trial.dense,
            "of_steps": self.steps,
            "phases": trial.phases,
            "predicted_error": result.error,
            "lower_bound": result.bound,
            "predicted_by_dense_steps": {str(k): v for k, v in scan.items()},
            "growth": [float(v) for v in self.growth],
            "unstable_heads": sorted(f"{name}/{head}" for name, head in items.unstable),
            "trajectory_density": self.trajectory_density(plan),
            "call_density": float(self.densities(plan).mean()),
            "predicted_attention_time": self._attention_time(trial, items, result),
            "reuse_bytes": most_held(items.bytes, result.choice, trial.phases),
            "reuse_factor": self.reuse_factor,
        }
        chosen = [options[i] for options, i in zip(items.options, result.choice, strict=True)]
        place = [
            [
                [chosen[(j * self.heads + h) * trial.phases + p] for h in range(self.heads)]
                for j in range(len(self.layers))
            ]
            for p in range(trial.phases)
        ]
        return Candidate(plan, items.head_errors(result.choice, len(self.layers), trial.phases), place)

    def _scheduled(self, dense: int, least: float) -> tuple[Trial, Items]:
        """The best schedule with this many dense first steps, where the one with one phase leaves ``least``.

        A further dense step costs as much as it does at the start, so it has to gain as much as a further phase.
        """
        one = self.trial(dense, 1)
        best = one, self.items(one)
        foreseen = self.outlook.cut(one.dense, max(PHASES), self.wanted)
        tried = [weighed.trial for weighed in foreseen if weighed.trial.phases in PHASES]
        if self.config.dense_steps is None:
            tried += self.outlook.further(one.dense, foreseen, self.wanted)
        for trial in tried:
            items = self.items(trial)
            error = self._least_error(trial, items)
            if error < (1 - PHASE_GAIN) * least:
                best, least = (trial, items), error
        return best

    def _least_error(self, trial: Trial, items: Items) -> float:
        """Predicted of the best plan with a schedule; infinite where none fits."""
        try:
            return lagrangian(items.errors, items.prices, self.room(trial.dense)).error
        except InfeasibleBudget:  # options of a step by itself may be cheaper than those of a whole phase
            return math.inf

    @cached_property
    def outlook(self) -> Outlook:
        """Of every schedule; the same for all budgets."""
        factor = self.reuse_factor if self.memory > 0 else None
        curves = head_curves(self.search, self.grids, self.orders, self.effects, self.pricing, self.weight, factor)
        return Outlook(curves, self.push, self.calls, self.bins, self.holds_at, self.second)

    def _settled(self, trial: Trial, items: Items, room: float) -> tuple[Items, Assignment]:
        """The best assignment in which every layer runs as its heads are priced, and the options that it chose from.

        Heads are priced one by one, and a run judges whole layers: beside heads that compute everything a few cheap
        ones need not pay. Such a layer becomes dense, or none of its heads stays so, whichever leaves less error.
        """
        result = self._assign(trial, items, room)
        while self.config.density is None and (which := self._run_dense(trial, items, result)):
            ways: list[tuple[float, Items]] = []
            for way in (items.all_dense(which), items.none_dense(which)):
                with suppress(InfeasibleBudget):  # of dense ones; the others hold the cheapest options
                    ways.append((lagrangian(way.errors, way.prices, room).error, way))
            items = min(ways, key=lambda way: way[0])[1]
            result = self._assign(trial, items, room)
        return items, result

    def _assign(self, trial: Trial, items: Items, room: float) -> Assignment:
        """The best assignment within the budget and the memory."""
        found = assign_within(items.errors, items.prices, room, items.bytes, trial.phases, self.memory)
        if found is not None:
            return found
        without = items.without_reuse()
        exact = assign(without.errors, without.prices, room)
        chosen = zip(items.bytes, exact.choice.tolist(), strict=True)
        return replace(exact, choice=np.array([np.flatnonzero(held == 0)[i] for held, i in chosen]))

    def _chosen(self, trial: Trial, items: Items, result: Assignment) -> Iterator[LayerSteps]:
        """Every layer in every phase, by the heads that compute: what the policy says of their chosen options."""
        members = [trial.members(phase) for phase in range(trial.phases)]
        holds = [{hold.reuse: hold for hold in self.holds_at(steps)} for steps in members]
        for j, layer in enumerate(self.layers):
            orders = [self.orders[layer, head] for head in range(self.heads)]
            for phase, steps in enumerate(members):
                which = [(j * self.heads + head) * trial.phases + phase for head in range(self.heads)]
                options = [items.options[i][result.choice[i]] for i in which]
                used = sorted({option.reuse for option in options} - {0.0})
                calls: Counter[tuple[float, ...]] = Counter()
                for place, step in enumerate(steps):
                    recalled = tuple(reuse for reuse in used if not holds[phase][reuse].computed[place])
                    calls[recalled] += int(self.calls[step])
                for recalled, count in calls.items():
                    computed = [NOTHING if option.reuse in recalled else option for option in options]
                    yield LayerSteps(which, computed, count, self.pricing.layer(computed, layer, orders))

    def _run_dense(self, trial: Trial, items: Items, result: Assignment) -> set[int]:
        """Items of layers that would run dense though not all of their heads are priced so."""
        found: set[int] = set()
        for steps in self._chosen(trial, items, result):
            cheap = (
                items.per_call[i][result.choice[i]] < 1
                for i, option in zip(steps.items, steps.options, strict=True)
                if option is not NOTHING
            )
            if steps.verdict.reason is not None and any(cheap):
                found.update(steps.items)
        return found

    def _entries(
        self, trial: Trial, items: Items, result: Assignment, made: dict[Hashable, HeadEntry]
    ) -> dict[str, list[list[HeadEntry]]]:
        """``made``: entries of items by their options, for the next try."""
        rows: dict[str, list[list[HeadEntry]]] = {}
        size = self.heads * trial.phases
        with workers() as pool:
            for j, layer in enumerate(self.layers):
                tables = [self.search.table(self.grids[layer], self.orders[layer, head]) for head in range(self.heads)]
                every = range(j * size, (j + 1) * size)
                wanted = [
                    Wanted((i, option), (i - every.start) // trial.phases, option, items.weights[i])
                    for i in every
                    for option in [items.options[i][result.choice[i]]]
                ]
                made |= layer_entries(self.search, layer, tables, [w for w in wanted if w.key not in made], pool)
                entries = [made[one.key] for one in wanted]
                rows[layer] = [entries[phase :: trial.phases] for phase in range(trial.phases)]
        return rows

    def _attention_time(self, trial: Trial, items: Items, result: Assignment) -> float:
        """Attention time of the whole trajectory over dense, by the measured costs and as it runs on the machine."""
        step = sum(self.time.values())
        spent = float(self.calls[trial.dense].sum()) * step
        for steps in self._chosen(trial, items, result):
            assert steps.verdict.time is not None  # all costs are known
            layer = self.layers[steps.items[0] // (self.heads * trial.phases)]
            spent += steps.verdict.time * self.time[layer] * steps.calls
        return spent / (float(self.calls.sum()) * step)
