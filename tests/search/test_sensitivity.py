"""What layers do to the output: in large models, neighbours are perturbed together."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from diffsparse.search import load
from diffsparse.search.search import SearchConfig, search_plan
from diffsparse.search.stages import sensitivity
from diffsparse.search.stages.sensitivity import MOST_GROUPS, layer_groups
from diffsparse.search.store import SearchStore
from diffsparse.search.workspace import Workspace
from tests.search.tiny import PROMPTS, SHAPE, build_pipeline


@pytest.mark.parametrize("count", [*range(25), 30, 40, 60, 61, 200])
def test_groups_are_neighbours_and_few(count: int) -> None:
    layers = tuple(f"blocks.{i}" for i in range(count))
    groups = layer_groups(layers)
    assert tuple(chain(*groups)) == layers and all(groups)
    assert len(groups) == min(count, MOST_GROUPS)
    if count > MOST_GROUPS:
        sizes = [len(group) for group in groups]
        assert sizes[0] == min(sizes) and sizes[-1] >= sizes[0], sizes


def test_the_price_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    pipe, stages = build_pipeline(layers=13), set()
    config = SearchConfig(
        density=0.6, steps=3, trace_steps=3, trace_prompts=1, validation_prompts=0, repair=False, samples=1, **SHAPE
    )
    search_plan(
        pipe, PROMPTS, config, tmp_path, progress=False, on_stage=lambda name, done, total: stages.add((name, total))
    )
    assert ("sensitivity", 2 * MOST_GROUPS) in stages


@pytest.mark.slow(reason="traces the small model and perturbs its layers one by one and in twos")
def test_groups_say_what_their_layers_say(repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a trained model: within a factor of 1.6 (rms of the logarithm), where layers differ by a factor of five."""
    place = load.choose_device("cpu")
    pipe = load.load_pipeline(
        str(repo_root / "examples" / "tiny_wan"), device=place, dtype=load.choose_dtype("auto", place)
    )
    prompts = load.read_prompts(repo_root / "examples" / "tiny_wan" / "prompts" / "calibration.txt")
    config = SearchConfig(
        density=0.5, height=64, width=64, num_frames=9, steps=8, trace_prompts=2, validation_prompts=0, repair=False
    ).resolved(pipe)
    search_plan(pipe, prompts, config, tmp_path, progress=False)
    found = []
    for most in (8, 4):
        monkeypatch.setattr(sensitivity, "MOST_GROUPS", most)
        with SearchStore(tmp_path / "search.sqlite") as store:
            work = Workspace(pipe, tuple(prompts), config, store, False, print, lambda *_: None)
            monkeypatch.setattr(work, "has_effect", lambda step, layer: False)
            found.append(np.log(sensitivity.effects(work, *sensitivity.reference(work))))
    alone, grouped = found
    steps = [1, 4]  # those that are perturbed
    off = (grouped - alone)[steps]
    assert np.sqrt((off**2).mean()) < np.log(1.6), off
    assert np.ptp(alone[steps]) > np.log(3), "layers hardly differ: there is nothing to compare"
