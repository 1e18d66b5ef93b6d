"""What a search keeps of its prompts' scores: sums over prompts, and masks judged on other prompts than their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from diffsparse.entry import TAILS
from diffsparse.grid import TokenGrid
from diffsparse.plan import Architecture
from diffsparse.search.candidates import BITMAP_DENSITIES
from diffsparse.search.config import SearchConfig
from diffsparse.search.masks import mask_at
from diffsparse.search.parts import PromptSums
from diffsparse.search.scored import LADDER, CallScores
from diffsparse.search.store import SearchStore
from diffsparse.search.stored_scores import StoredScores
from diffsparse.search.workspace import Probe, Workspace

GRID, LAYER, HEADS, STEPS = TokenGrid(2, 20, 28), "blocks.0.attn1", 3, 8
#: Codes of a byte are off by 4% at most, and maps are added up in half precision.
CODED = 0.1


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Workspace]:
    with SearchStore(tmp_path / "search.sqlite") as store:
        yield made(store)


def made(store: SearchStore, prompts: int = 2) -> Workspace:
    """A search that has been probed: two orders, three heads, two calls a step."""
    found = object.__new__(Workspace)
    StoredScores.__init__(found)
    found.config = SearchConfig(density=0.5, block_size=64, trace_steps=STEPS)
    found.architecture = Architecture("WanTransformer3DModel", (LAYER,), HEADS, 32, (1, 1, 1))
    found.num_prompts, found.store, found.tables = 3, store, {}
    found.transformer = torch.nn.Linear(1, 1)
    found.pipe = SimpleNamespace(_execution_device=torch.device("cpu"))
    first, second = found.layer_orders(GRID)[:2]
    probe: dict[str, Any] = dict(
        grids={LAYER: GRID}, orders={LAYER: (first, second, first)}, branches=2, forward_seconds=1.0, head_dim=32,
        size=None, dense={}, prompts=prompts, samples=4, tails={LAYER: ("mean", "none", "moments")},
    )  # fmt: skip
    found.put_probe(Probe(**probe))
    return found


def scores(work: Workspace, prompt: int, step: int, call: int, head: int) -> CallScores:
    """Of one head, the same for the same place."""
    table = work.table(GRID, work.probe.orders[LAYER][head])
    n = len(table.weight)
    draw = torch.Generator().manual_seed(1000 * prompt + 100 * step + 10 * call + head)
    mass = torch.rand(n, n, generator=draw)
    error = torch.rand(len(TAILS), 1, n, n, generator=draw).pow(4)
    sums = torch.rand(len(TAILS), 1, len(LADDER), generator=draw)
    energy = 10 * torch.rand(1, generator=draw)
    return CallScores(error, (mass / mass.sum(1, keepdim=True))[None], energy, sums, 2 * sums, 1.5 * sums)


def joined(parts: list[CallScores]) -> CallScores:
    each = [
        [getattr(part, name) for part in parts] for name in ("error", "mass", "energy", "summed", "true", "repaired")
    ]
    return CallScores(*(torch.cat(values, axis) for values, axis in zip(each, (1, 0, 0, 1, 1, 1), strict=True)))


def trace(work: Workspace, prompt: int, stop: int = STEPS) -> None:
    sums = PromptSums(work, prompt)
    for step in range(stop):
        for call in range(2):
            if sums.wants(step, LAYER):
                for order, heads in work.heads_of(LAYER).items():
                    found = joined([scores(work, prompt, step, call, head) for head in heads])
                    sums.add(step, LAYER, order, heads, found, 1)
                sums.add_drift(step, LAYER, np.full(HEADS, np.nan if step == 0 else 2.0 + prompt))
    if stop == STEPS:
        sums.flush()
        work.put_trace(prompt, [1 - step / STEPS for step in range(STEPS)], [["transformer"]] * STEPS)


def mean_error(work: Workspace, prompt: int, step: int, head: int) -> np.ndarray:
    return np.mean([scores(work, prompt, step, call, head).error[:, 0].numpy() for call in range(2)], axis=0)


def test_masks_are_judged_on_a_prompt_that_they_were_not_made_from(work: Workspace) -> None:
    for prompt in (0, 1):
        trace(work, prompt)
    assert work.parts == STEPS and [len(runs) for runs in work.windows] == [1, 3, 8]
    tails = [TAILS.index(tail) for tail in work.probe.tails[LAYER]]
    for head in range(HEADS):
        table = work.table(GRID, work.probe.orders[LAYER][head])
        made_from = {step: mean_error(work, 0, step, head)[tails[head]] for step in range(STEPS)}
        for steps in ([3], list(range(STEPS))):
            found = work.scores(LAYER, head, dict.fromkeys(steps, 1.0))
            value = sum(made_from[step] for step in steps)
            for i in (5, 9, 13):
                mask = mask_at(value, table.weight, BITMAP_DENSITIES[i])
                left = sum((mean_error(work, 1, step, head) * ~mask).sum((1, 2)) for step in steps)
                place = table.num_families + i
                assert found.left[:, place] == pytest.approx(left, rel=CODED)
            # Families need no masks of other prompts: the mean over both.
            for place, mask in zip(table.places, table.masks, strict=True):
                left = sum((mean_error(work, p, step, head) * ~mask).sum((1, 2)) / 2 for p in (0, 1) for step in steps)
                assert found.left[:, place] == pytest.approx(left, rel=CODED, abs=CODED)
        # A step by itself, with the mask that all steps share.
        mask = mask_at(sum(made_from.values()), table.weight, BITMAP_DENSITIES[9])
        left = (mean_error(work, 1, 3, head) * ~mask).sum((1, 2))
        found = work.scores(LAYER, head, {3: 1.0}, range(STEPS))
        assert found.left[:, table.num_families + 9] == pytest.approx(left, rel=CODED)
        # A plan's mask is made from both prompts.
        both = sum(mean_error(work, p, 2, head)[tails[head]] for p in (0, 1))
        assert work.value(LAYER, head, {2: 1.0}) == pytest.approx(both, rel=CODED)
        assert work.drift(LAYER, head) == pytest.approx(np.full(STEPS, 2.5))
        energy = np.mean([[float(scores(work, p, 4, c, head).energy) for c in (0, 1)] for p in (0, 1)])
        assert work.scores(LAYER, head, {4: 3.0}).energy == pytest.approx(3 * energy)


def test_one_prompt_is_judged_by_itself(tmp_path: Path) -> None:
    with SearchStore(tmp_path / "search.sqlite") as store:
        work = made(store, prompts=1)
        trace(work, 0)
        table = work.table(GRID, work.probe.orders[LAYER][0])
        left = work.scores(LAYER, 0, {1: 1.0}).left[:, table.num_families :]
        assert (np.diff(left, axis=1) <= 0).all() and (left[:, 8] > 0).all()
        assert (left[:, 8] < 0.95 * left[:, 0]).all()


def test_a_prompt_counts_once_whenever_it_was_cut_off(tmp_path: Path) -> None:
    with SearchStore(tmp_path / "whole.sqlite") as store:
        whole = made(store)
        trace(whole, 0)
        trace(whole, 1)
        with SearchStore(tmp_path / "cut.sqlite") as other:
            cut = made(other)
            for prompt, stops in ((0, (3, 5)), (1, (1, 7))):
                for stop in stops:
                    trace(cut, prompt, stop)
                trace(cut, prompt)
            assert store.names() == other.names()
            for name in store.names("sums") + store.names("map"):
                one, two = store.get_arrays(name), other.get_arrays(name)
                assert one.keys() == two.keys()
                assert [key for key in one if not np.array_equal(one[key], two[key])] == [], name


def test_maps_of_a_large_model_are_of_several_steps(work: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = max(work.table(GRID, order).weight.size for order in work.heads_of(LAYER))
    monkeypatch.setattr("diffsparse.search.stored_scores.MAP_BYTES", 3.5 * HEADS * blocks)
    for prompt in (0, 1):
        trace(work, prompt)
    assert work.parts == 3 and [work.part(step) for step in range(STEPS)] == [0, 0, 0, 1, 1, 1, 2, 2]
    both = sum(mean_error(work, p, step, 1)[0] for p in (0, 1) for step in (3, 4, 5))
    assert work.value(LAYER, 1, {3: 1.0, 4: 1.0, 5: 1.0}) == pytest.approx(both, rel=CODED)
    assert work.picture(LAYER, [0, 7]).shape == (HEADS, work.side, work.side)
    assert work.picture(LAYER, [0, 7]).sum(2) == pytest.approx(np.ones((HEADS, work.side)), rel=CODED)
