"""Searches at two sizes: masks are made from both, options are judged at both, and the plan says so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from diffsparse.carry import carry_mask
from diffsparse.entry import TAILS
from diffsparse.grid import TokenGrid
from diffsparse.order import CurveOrder, RasterOrder, TileOrder, TokenOrder
from diffsparse.patterns import Window
from diffsparse.plan import Architecture, SparsityPlan
from diffsparse.search.candidates import BITMAP_DENSITIES
from diffsparse.search.carried import Carry, joined_values
from diffsparse.search.errors import BadInput
from diffsparse.search.facts import Facts
from diffsparse.search.masks import levels_of
from diffsparse.search.options import FamilyTable, is_stable
from diffsparse.search.parts import PromptSums
from diffsparse.search.recompose import compose_plan
from diffsparse.search.scored import LADDER, CallScores
from diffsparse.search.search import SearchConfig, search_plan
from diffsparse.search.section import Section
from diffsparse.search.show import plan_table
from diffsparse.search.stages.also import CarriedMasks, _carry
from diffsparse.search.store import SearchStore, StoreMismatch
from diffsparse.search.stored_scores import StoredScores
from diffsparse.search.stored_search import StoredSearch
from diffsparse.search.workspace import Probe, Workspace
from tests.search.tiny import PROMPTS, Cli, config, fix_costs

ALSO = (48, 64, 13)
LAYER, HEADS, STEPS = "blocks.0.attn1", 3, 4
GRIDS = [
    (TokenGrid(3, 12, 12), TokenGrid(4, 16, 12), TileOrder(1, 8, 8)),
    (TokenGrid(2, 20, 28), TokenGrid(5, 28, 20), TileOrder(1, 8, 8)),
    (TokenGrid(4, 9, 13), TokenGrid(3, 10, 21), RasterOrder()),
    (TokenGrid(5, 16, 16), TokenGrid(2, 11, 19), CurveOrder()),
]

# -- the rule ----------------------------------------------------------------------------------------------------------


def carry(source: TokenGrid, target: TokenGrid, order: TokenOrder) -> tuple[Carry, FamilyTable, FamilyTable]:
    tables = FamilyTable(source, order, 64), FamilyTable(target, order, 64)
    return Carry(*tables), *tables


@pytest.mark.parametrize(("source", "target", "order"), GRIDS)
def test_worth_is_carried_by_pairs_of_tokens(source: TokenGrid, target: TokenGrid, order: TokenOrder) -> None:
    rule, old, new = carry(source, target, order)
    even = torch.from_numpy(old.weight).float()[None]
    assert rule.values(even)[0].numpy() == pytest.approx(new.weight, rel=1e-4)
    value = torch.rand(3, *old.weight.shape, generator=torch.Generator().manual_seed(0))
    carried = rule.values(value)
    assert carried.sum((1, 2)).numpy() == pytest.approx(value.sum((1, 2)).numpy(), rel=1e-4)
    same, _, _ = carry(source, source, order)
    assert same.values(value).numpy() == pytest.approx(value.numpy(), rel=1e-4)


@pytest.mark.parametrize(("source", "target", "order"), GRIDS)
def test_masks_are_carried_as_a_run_carries_them(source: TokenGrid, target: TokenGrid, order: TokenOrder) -> None:
    rule, old, new = carry(source, target, order)
    value = torch.rand(2, *old.weight.shape, generator=torch.Generator().manual_seed(1)).pow(3)
    level = levels_of(value, torch.from_numpy(old.weight))
    carried = rule.levels(level)
    assert carried.shape == (2, *new.weight.shape)
    shares = rule.shares.numpy()
    for head in range(2):
        for i, density in enumerate(BITMAP_DENSITIES):
            mask = (level[head] <= i).numpy()
            wanted = carry_mask(mask, source, target, order, 64)
            found = (carried[head] <= i).numpy()
            rows = 1.0 / len(new.weight) if mask.any(1).all() else 0.0  # each row may have one pair more
            largest = float(new.weight.max())
            assert float(new.weight[found].sum()) == pytest.approx(
                float(new.weight[wanted].sum()), abs=2 * largest + rows
            ), density
            # As much of the old mask is under the pairs that are kept, to within what one pair holds.
            score = shares @ mask.astype(np.float32) @ shares.T * new.weight
            assert float(score[found].sum()) >= 0.9 * float(score[wanted].sum()) - 2 * largest


def test_both_sizes_count_alike() -> None:
    own, other = torch.rand(2, 4, 4), 100 * torch.rand(2, 4, 4)
    other[1] = 0
    both = joined_values(own, other)
    assert both[0].sum() == pytest.approx(2 * float(own[0].sum()), rel=1e-5)
    assert torch.equal(both[1], own[1])


# -- masks that do not carry -------------------------------------------------------------------------------------------

MAIN, OTHER = TokenGrid(4, 24, 24), TokenGrid(10, 24, 24)
NEAR = Window((1, 0.1, 0.1))  # a frame away, whatever the number of frames: two and a half times as many here
ORDER = TileOrder(1, 8, 8)


def _scores(grid: TokenGrid, prompt: int, fixed: bool) -> CallScores:
    """Errors of a part of the pairs near to each other. ``fixed``: the same part at all prompts."""
    table = FamilyTable(grid, ORDER, 64)
    near = NEAR.block_mask(grid, ORDER, 64)
    draw = torch.Generator().manual_seed(0 if fixed else 7 + prompt)
    half = torch.rand(near.shape, generator=draw) < 0.5
    error = (torch.from_numpy(near) & half).float() / near.sum()
    error = error.expand(len(TAILS), 3, *near.shape)
    sums = torch.ones(len(TAILS), 3, len(LADDER))
    mass = torch.from_numpy(table.weight).float().expand(3, -1, -1)
    return CallScores(error, mass, torch.ones(3), sums, sums, sums)


def _trace(work: Workspace, grid: TokenGrid, prompt: int) -> None:
    sums = PromptSums(work, prompt)
    for step in range(STEPS):
        if sums.wants(step, LAYER):
            sums.add(step, LAYER, ORDER, range(3), _scores(grid, prompt, fixed=grid == MAIN), 2)
            sums.add_drift(step, LAYER, np.ones(3))
    sums.flush()
    work.put_trace(prompt, [1 - step / STEPS for step in range(STEPS)], [["transformer"]] * STEPS)


def _prepared(store: SearchStore, grid: TokenGrid, also: tuple[int, int, int] | None) -> Workspace:
    """A search that has been probed, without a pipeline."""
    work = object.__new__(Workspace)
    StoredScores.__init__(work)
    work.config = SearchConfig(density=0.5, block_size=64, trace_steps=STEPS, also_size=also)
    work.architecture = Architecture("WanTransformer3DModel", (LAYER,), HEADS, 32, (1, 1, 1))
    work.num_prompts, work.store, work.tables = 3, store, {}
    work.transformer = torch.nn.Linear(1, 1)
    work.pipe = SimpleNamespace(_execution_device=torch.device("cpu"))
    tails = {LAYER: ("none",) * HEADS}
    work.put_probe(Probe({LAYER: grid}, {LAYER: (ORDER,) * HEADS}, 1, 1.0, 32, None, {}, items=2, tails=tails))
    return work


@pytest.mark.parametrize("two", [False, True])
def test_a_mask_that_does_not_carry_loses_to_a_pattern(tmp_path: Path, two: bool) -> None:
    with SearchStore(tmp_path / "search.sqlite") as store:
        work = _prepared(store, MAIN, (24, 24, 10) if two else None)
        if two:
            also = work._also = _prepared(Section(store, "also/"), OTHER, None)
            also.parts = work.parts
            _trace(also, OTHER, 0)
            _carry(work, also, 1)
        for prompt in (0, 1):
            _trace(work, MAIN, prompt)
        if two:
            also.masks = CarriedMasks(work, also)
            _trace(also, OTHER, 1)
            _carry(work, also, 2)
        table = work.table(MAIN, ORDER)
        (scores, *_) = work.layer_scores(LAYER, {0: 1.0})
        errors = table.errors([scores])[0]
        family = next(i for i, o in enumerate(table.options) if o.pattern == NEAR and o.tail == "none")
        density = table.options[family].density
        bitmaps = [
            i for i, o in enumerate(table.options) if o.kind == "bitmap" and o.tail == "none" and o.density <= density
        ]
        best = min(bitmaps, key=lambda i: errors[i])
        assert errors[family] == pytest.approx(0.0, abs=1e-6)
        if two:
            # At the second size a tenth of what there is at least is left by all masks that are as sparse.
            assert errors[best] > 0.02 and errors[family] < errors[best]
            whole = float(work._means_of_both(LAYER)["left"][0, 0, 0, table.places[0]])
            assert errors[best] > 0.1 * whole
        else:
            assert errors[best] == pytest.approx(0.0, abs=1e-6)
            assert min(table.options[i].density for i in bitmaps if errors[i] < 1e-6) < density
            assert is_stable(scores, table)
        # What sensitivity is measured with is of the main size alone.
        (alone, *_) = work.layer_scores(LAYER, {0: 1.0}, alone=True)
        assert table.errors([alone])[0][family] == pytest.approx(0.0, abs=1e-6)
        assert (table.errors([alone])[0][best] < errors[best]) == two


# -- whole searches ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def fixed_costs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        fix_costs(patch)
        yield


def search(pipe: Any, out: Path, **changes: Any) -> SparsityPlan:
    settings = config(**{"also_size": ALSO, **changes})
    return search_plan(pipe, PROMPTS, settings, out, progress=False, say=lambda line: None)


@pytest.fixture(scope="module")
def found(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("also") / "plan"
    search(pipe, folder)
    return folder


def files(plan: SparsityPlan) -> dict[str, bytes]:
    plan.record["search"].pop("seconds", None)
    plan.record.get("quality", {}).pop("loop_speedup", None)
    return plan.to_files()


def test_the_plan_says_at_which_sizes_it_was_measured(found: Path) -> None:
    plan = SparsityPlan.from_pretrained(found)
    calibration = plan.record["calibration"]
    assert calibration["grid"] == "3x12x12"
    assert calibration["also"] == {"grid": "4x12x16", "height": 48, "width": 64, "num_frames": 13}
    assert "also measured" in plan_table(plan) and "4x12x16" in plan_table(plan)


def test_options_have_their_errors_of_both_sizes(found: Path) -> None:
    """What a family leaves is the mean of what was measured at each size, in shares of the output."""
    with SearchStore(found / "search.sqlite", reading=True) as store:
        facts = store.read_json("facts", Facts.from_dict)
        work = StoredSearch(facts.architecture, 2, facts.config, store, False, print, lambda *_: None)
        also = work.also
        assert also is not None and also.grids != work.grids and also.trace_length == work.trace_length
        assert not store.names("carried/1/") and not store.names("also/map/")
        for layer in work.layers:
            both, own, other = work._means_of_both(layer), work._means(layer), also._means(layer)
            for head in range(2):
                table = also.table(also.grids[layer], work.orders[layer, head])
                for place, stand_in in enumerate(table.same_as):
                    share = other["left"][:, head, :, stand_in] / other["energy"][:, head, None]
                    mean = (own["left"][:, head, :, place] + share * own["energy"][:, head, None]) / 2
                    assert both["left"][:, head, :, place] == pytest.approx(mean)
            assert np.array_equal(both["energy"], own["energy"])


@pytest.mark.parametrize("writes", [3, 9, 14, 20])
def test_killed_anywhere_it_ends_in_the_same_plan(
    pipe: Any, found: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    original, left = SearchStore._write, writes

    def dying(self: SearchStore, rows: list[tuple[str, str, bytes]]) -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        original(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(SearchStore, "_write", dying)
        with pytest.raises(KeyboardInterrupt):
            search(pipe, tmp_path / "plan")
    resumed, whole = search(pipe, tmp_path / "plan"), SparsityPlan.from_pretrained(found)
    assert resumed.entries == whole.entries and np.array_equal(resumed.index, whole.index)
    assert resumed.schedule == whole.schedule


def test_another_plan_from_the_record_is_that_of_the_search(pipe: Any, found: Path, tmp_path: Path) -> None:
    composed = compose_plan(found, out=tmp_path / "composed", density=0.4, progress=False)
    searched = search(pipe, found, density=0.4)
    assert composed.record["calibration"]["also"]["grid"] == "4x12x16"
    assert np.array_equal(composed.index, searched.index) and composed.entries == searched.entries
    search(pipe, found)


def test_a_record_without_the_second_size_is_another_search(pipe: Any, found: Path) -> None:
    with pytest.raises(StoreMismatch, match="also_size"):
        search(pipe, found, also_size=None)


def test_one_traced_prompt_is_enough(pipe: Any, tmp_path: Path) -> None:
    plan = search(pipe, tmp_path / "plan", trace_prompts=1, trace_steps=2)
    assert plan.record["calibration"]["also"]["grid"] == "4x12x16"


def test_a_size_of_the_same_tokens_is_one_line(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"--also-size 48x48x9 has the tokens of the main size, 3x12x12; give another"):
        search(pipe, tmp_path / "plan", also_size=(48, 48, 9))
    with pytest.raises(BadInput, match="one size has frames and the other is an image"):
        search(pipe, tmp_path / "other", also_size=(48, 64, 1))


@pytest.mark.parametrize("size", [(48,), (48, 0, 9), (48, 64.0, 9), "48x64", (True, 48, 9), (48, 48, 9, 1), 5])
def test_sizes_that_are_none(size: Any) -> None:
    with pytest.raises(BadInput, match="also_size is a height and a width in pixels") as caught:
        config(also_size=size)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("size", "told"),
    [
        ("48", "--also-size 48: it is a height and a width in pixels, and the frames of a clip: 832x480x81"),
        ("48x-4x9", "--also-size 48x-4x9: it is"),
        ("0x48x9", "--also-size 0x48x9: it is"),
        ("50x48x9", "--also-size 50x48x9: --height 50: this model takes multiples of 16, for example 48 or 64"),
        ("48x48x10", "--also-size 48x48x10: --num-frames 10: this model takes 4k+1 frames, for example 9 or 13"),
    ],
)
@pytest.mark.usefixtures("once_loaded")
def test_the_command_says_what_is_wrong(cli: Cli, tmp_path: Path, model_folder: Path, size: str, told: str) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    code, _, error = cli("search", model_folder, "--prompts", prompts, "--out", tmp_path / "plan", "--also-size", size)
    assert code == 2 and told in error
    assert len([line for line in error.strip().splitlines() if "also-size" in line]) == 1
