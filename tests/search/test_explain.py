"""What a plan would do, told before anything runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffsparse.entry import TAILS, Execution, HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.kernels.break_even import device_name, save_local
from diffsparse.kernels.costs import CostTable
from diffsparse.layout import build_layout
from diffsparse.online import OnlineRepair
from diffsparse.order import AxisOrder, CurveOrder, RasterOrder, TileOrder
from diffsparse.patterns import Band, Bitmap, Empty, Full, Radial, Window
from diffsparse.pipelines import sparse_attention, sparse_attention_summary
from diffsparse.pipelines.families.sizes import USUAL_SIZES
from diffsparse.pipelines.policy import SLOWER
from diffsparse.plan import Architecture, SparsityPlan
from diffsparse.preset_plans import preset
from diffsparse.schedule import Schedule
from diffsparse.search import load
from diffsparse.search.columns import printable, text_table
from diffsparse.search.density import call_density, kept_density
from diffsparse.search.errors import BadInput
from diffsparse.search.explain import Explanation, HeadForecaster, explain, recorded_costs, shape_for
from diffsparse.search.explain_table import explain_table
from diffsparse.search.generate import GenerationSettings, generate_clip
from diffsparse.search.scale import TokenScale, scale_of_class, scale_of_pipeline, scale_of_record
from diffsparse.search.show import parse_grid
from diffsparse.selection import Budget, OnlineSelection
from diffsparse.work import block_fill
from tests.search.plans import make_plan

CPU = torch.device("cpu")
GRID = TokenGrid(3, 12, 12)
COSTS = {
    "device": "cpu",
    "dense_seconds": 0.5,
    "densities": [0.02, 0.1, 0.3, 0.6],
    "share": {tail: [0.1 + extra, 0.2 + extra, 0.5 + extra, 0.9 + extra] for tail, extra in
              {"none": 0.0, "mean": 0.02, "moments": 0.05, "centroids": 0.3}.items()},
}  # fmt: skip


def told(plan: SparsityPlan, grid: TokenGrid | None = GRID, **options: Any) -> Explanation:
    shape = shape_for(plan, grid=grid)
    return explain(plan, shape, device=CPU, dtype=torch.float32, **options)


# -- densities ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [GRID, TokenGrid(1, 13, 21), TokenGrid(2, 9, 10, text_before=70, text_after=5)])
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("tail", ["none", "mean", "centroids"])
def test_densities_are_those_of_layouts(grid: TokenGrid, block_size: int, tail: str) -> None:
    for order in (RasterOrder(), TileOrder(1, 8, 8), AxisOrder("WHF"), CurveOrder()):
        for pattern in (Full(), Empty(), Window(size=(1, 0.4, None)), Band(0.1), Radial()):
            entry = HeadEntry(order, pattern, execution=Execution(tail=tail))
            assert call_density(entry, grid, block_size) == pytest.approx(
                build_layout(grid, [entry], block_size).density, rel=1e-9
            )
            plain = replace(entry, execution=Execution())
            assert kept_density(entry, grid, block_size) == pytest.approx(
                build_layout(grid, [plain], block_size).density, rel=1e-9
            )
    assert call_density(HeadEntry(execution=Execution(mode="skip", tail=tail)), grid, block_size) == 0


def test_an_online_repair_costs_its_rows_and_its_product() -> None:
    entry, online = HeadEntry(pattern=Band(0.1)), OnlineRepair(64)
    share = 64 / GRID.seq_len
    layout = build_layout(GRID, [entry], 64)
    assert call_density(entry, GRID, 64, online) == pytest.approx(layout.repaired(online).density, rel=1e-9)
    assert call_density(entry, GRID, 64, online) == pytest.approx(layout.density + share, rel=1e-9)
    share_of = {tail: (0.1, 0.4, 1.0) for tail in TAILS}
    costs = CostTable.of_call("cpu", 1.0, (0.1, 0.5, 1.0), share_of)
    plain, mended = (
        HeadForecaster(SparsityPlan.uniform(entry, repair=repair), costs).head(entry, GRID) for repair in (None, online)
    )
    assert plain.time is not None and mended.time is not None
    assert mended.time - plain.time == pytest.approx(share + 128 / GRID.seq_len)
    assert mended.density - plain.density == pytest.approx(share)


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [Budget("density", 0.3), Budget("top_p", 0.9, most=0.4), Budget("top_p", 0.9)])
def test_a_rule_is_named_and_counted_by_its_budget(budget: Budget) -> None:
    rule = OnlineSelection("pooled", budget)
    entry = HeadEntry(TileOrder(1, 8, 8), selection=rule, execution=Execution(tail="mean"))
    plan = SparsityPlan.from_table({"a": [[entry, HeadEntry()]]}, record={"costs": COSTS})
    found = told(plan)
    layer = found.layers[0].phases[0]
    assert layer.dense_because is None and layer.families == {"pooled": 1, "dense": 1}
    assert layer.density == pytest.approx(build_layout(GRID, [entry, HeadEntry()]).density)
    assert layer.time is not None and 0 < layer.time <= 1
    note = next(n for n in found.notes if "picked while the model runs" in n)
    assert str(rule) in note and ("the most" in note) == (budget.kind == "top_p") and note in found.to_dict()["notes"]
    assert str(rule) in " ".join(explain_table(found).replace("\n", " ").split())


def test_usual_sizes_give_their_grids() -> None:
    refused = []
    for name, (_, grid) in USUAL_SIZES.items():
        try:
            scale, size = scale_of_class(name)
        except BadInput:
            refused.append(name)
            continue
        assert scale.grid(*size).shape == grid.shape, name
    assert refused == ["WanAnimateTransformer3DModel"]


def test_sizes_that_are_no_whole_tokens() -> None:
    scale = TokenScale(16, 16, 4, source="here")
    assert scale.grid(480, 832, 81) == TokenGrid(21, 30, 52)
    assert replace(scale, frame_patch=2).grid(480, 832, 81).frames == 11
    assert replace(scale, first_alone=False).grid(16, 16, 8).frames == 2
    assert replace(scale, frames=None).grid(32, 16, None) == TokenGrid(1, 2, 1)
    for size, message in (
        ((8, 16, 1), "--height 8: a token covers 16 pixels .here., .* for example 16 or 32"),
        ((16, 40, 1), "--width 40: .* for example 32 or 48"),
        ((16, 16, 4), r"--num-frames 4: this model takes 4k\+1 frames .* for example 1 or 5"),
        ((16, 16, None), "give --num-frames too"),
    ):
        with pytest.raises(BadInput, match=message):
            scale.grid(*size)


def test_the_plans_own_record_tells_what_a_token_covers() -> None:
    record = {"height": 48, "width": 96, "num_frames": 9}
    assert scale_of_record(record, TokenGrid(3, 12, 12)) == TokenScale(4, 8, 4, source="by the plan's calibration")
    image = scale_of_record({"height": 48, "width": 96}, TokenGrid(1, 12, 12))
    assert image is not None and image.frames is None
    for wrong in (None, {}, {"height": "48", "width": 96}, {"height": 50, "width": 96}, record | {"num_frames": 10}):
        assert scale_of_record(wrong, TokenGrid(3, 12, 12)) is None
    plan = make_plan()
    assert shape_for(plan).grid == GRID
    assert shape_for(plan, height=64, num_frames=17).grid == TokenGrid(5, 16, 12)
    plan.record["calibration"] = {"grid": "7+3x12x12+9", "height": 48, "width": 48, "num_frames": 9}
    assert shape_for(plan, width=96).grid == TokenGrid(3, 12, 24, text_before=7, text_after=9)
    plan.record["calibration"] = {"grid": "3x12x12"}
    with pytest.raises(BadInput, match="how many pixels a token covers"):
        shape_for(plan, width=96)


def test_a_model_folder_tells_the_grid_that_its_pipeline_runs_on(model_folder: Path, pipe: Any) -> None:
    shapes = load.load_shapes(str(model_folder))
    assert all(p.device.type == "meta" for p in shapes.transformer.parameters())
    assert shapes.text_encoder is None and scale_of_pipeline(shapes) == scale_of_pipeline(pipe)
    grid = shape_for(preset("window"), model_shape=str(model_folder), height=48, width=64, num_frames=5).grid
    with sparse_attention(pipe, "window"):
        generate_clip(pipe, "a circle", 0, GenerationSettings(1, 1.0, 48, 64, 5))
        assert list(sparse_attention_summary(pipe).transformers["transformer"].grids) == [str(grid)]
    with pytest.raises(BadInput, match="--height is missing"):
        shape_for(preset("window"), model_shape=str(model_folder), width=64)
    with pytest.raises(BadInput, match="takes multiples of 16, for example 32 or 48"):
        shape_for(preset("window"), model_shape=str(model_folder), height=40, width=64, num_frames=5)


def test_damaged_model_folders(model_folder: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    config = folder / "transformer" / "config.json"
    config.write_text("{")
    with pytest.raises(BadInput, match="the configuration of 'transformer' cannot be read"):
        load.load_shapes(str(folder))
    index = folder / "model_index.json"
    index.write_text(json.dumps({"_class_name": "NoPipeline"}))
    with pytest.raises(BadInput, match="has no pipeline 'NoPipeline'"):
        load.load_shapes(str(folder))
    index.write_text(json.dumps({"_class_name": "WanPipeline", "vae": [None, None]}))
    with pytest.raises(BadInput, match="cannot be understood without its weights"):
        load.load_shapes(str(folder))


def test_a_class_must_be_that_of_the_plan() -> None:
    with pytest.raises(BadInput, match="the plan is for WanTransformer3DModel, --model-shape says FluxTransformer2D"):
        shape_for(make_plan(), model_shape="FluxTransformer2DModel")
    shape = shape_for(preset("window"), model_shape="FluxTransformer2DModel", height=512)
    assert shape.grid == TokenGrid(1, 32, 64) and "text tokens are not known" in shape.notes[0]


# -- forecasts ---------------------------------------------------------------------------------------------------------


def test_layers_that_a_break_even_table_speaks_against(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFSPARSE_CACHE", str(tmp_path))
    plan = preset("window", tail="none")
    assert told(plan).layers[0].phases[0].dense_because is None
    for ratio, reason in ((1.2, SLOWER), (0.9, None)):
        rows = ((ratio, ratio),)
        save_local(
            CostTable(
                device=device_name(CPU), backend="cpu", dtype="float32", heads=2, head_dim=64, block_size=64,
                tokens=(1000,), densities=(0.1, 1.0), ratio=dict.fromkeys(TAILS, rows), gather=(0.0,), dense=("any",),
                about={},
            )
        )  # fmt: skip
        found = told(plan)
        assert found.layers[0].phases[0].dense_because == reason
        assert found.layers[0].backend == (None if reason else "cpu")
        assert told(plan, backend="cpu").layers[0].phases[0].dense_because is None  # asked for by name


def test_densities_and_times_of_layers() -> None:
    plan = make_plan()
    plan.record["costs"] = {**COSTS, "fill": 0.9}
    found = told(plan)
    costs = recorded_costs(plan)
    assert costs is not None
    for p, densities in enumerate(plan.call_densities(GRID)):
        assert [layer.phases[p].density for layer in found.layers] == pytest.approx(list(densities))
    for j, layer in enumerate(found.layers):
        for p, phase in enumerate(layer.phases):
            times = []
            for entry in plan.layer_entries(p, plan.layers[j], 2) or ():
                skipped = entry.execution.mode == "skip"
                kept = kept_density(entry, GRID, 64)
                tail = "none" if kept == 1 else entry.execution.tail
                if kept < 1:
                    kept *= (0.9 / block_fill(entry.order, GRID, 64)) ** 2
                times.append(0.0 if skipped else costs.head_ratio(GRID.seq_len, kept, tail))
            assert phase.time == pytest.approx(np.mean(times))
    assert found.time == pytest.approx([np.mean([x.phases[p].time for x in found.layers]) for p in range(2)])
    assert found.break_even["none"] == 0.99 and found.break_even["centroids"] < found.break_even["moments"]
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["tokens"] == 432 and data["backend"] == "cpu" and data["layers"][1]["phases"][0]["time"] is not None


def test_what_runs_is_what_was_told(pipe: Any) -> None:
    plan = make_plan()
    plan = replace(plan, schedule=replace(plan.schedule, dense_layers=("blocks.1.attn1",), sparse_below=1.0))
    found = told(plan)
    with sparse_attention(pipe, plan):
        generate_clip(pipe, "a circle", 0, GenerationSettings(1, 1.0, 48, 48, 9))
        ran = sparse_attention_summary(pipe).transformers["transformer"]
    for layer, summary in zip(found.layers, ran.layers, strict=True):
        assert layer.layer == summary.name
        assert (layer.phases[0].dense_because is None) == (list(summary.backends) == [layer.backend])
        assert layer.phases[0].density == pytest.approx(summary.total_density)
        assert list(summary.dense_reasons) == [r for r in [layer.phases[0].dense_because] if r is not None]


def test_why_layers_are_dense() -> None:
    names = tuple(f"blocks.{i}.attn1" for i in range(6))
    window = HeadEntry(TileOrder(1, 8, 8), Window(size=(1, None, None)))
    wide = HeadEntry(pattern=Window(size=(None, None, None)))
    table = {names[0]: window, names[1]: wide, names[2]: HeadEntry(), names[3]: window, names[4]: window}
    plan = SparsityPlan.from_table(
        {name: [[entry] * 2] for name, entry in table.items()},
        schedule=Schedule(dense_layers=(names[3],)),
        architecture=Architecture("WanTransformer3DModel", names, 2, 32, (1, 1, 1)),
    )
    found = told(plan)
    assert [layer.phases[0].dense_because for layer in found.layers] == [
        None,
        "every block is kept on this grid",
        "all heads are dense in the plan",
        "dense layer of the plan",
        None,
        "dense layer of the plan",
    ]
    assert [layer.backend for layer in found.layers] == ["cpu", None, None, None, "cpu", None]
    assert "every block is kept on this grid" in explain_table(found)


def test_layers_that_agree_are_one_line() -> None:
    names = tuple(f"blocks.{i}.attn1" for i in range(12))
    architecture = Architecture("WanTransformer3DModel", names, 2, 32, (1, 1, 1))
    plan = replace(preset("window", dense_layers=(names[4],)), architecture=architecture)
    lines = explain_table(told(plan, TokenGrid(5, 16, 16)), "window").splitlines()
    shown = [line.split("  ")[0] for line in lines if line.startswith("blocks")]
    assert shown == ["blocks.0-3.attn1 (4)", "blocks.4.attn1", "blocks.5-11.attn1 (7)"]
    assert "one rule for all layers" not in "\n".join(lines)


def test_bitmaps_of_another_grid_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    order = TileOrder(1, 8, 8)
    n = order.partition(GRID, 64).num_blocks
    bitmap = HeadEntry(order, Bitmap.from_mask(np.eye(n, dtype=bool), GRID, order, 64, Window(size=(1, 0.5, 0.5))))
    plan = SparsityPlan.from_table({"a": [[bitmap, HeadEntry()]], "b": [[bitmap, bitmap]]})
    assert told(plan).carried_heads == 0
    other = told(plan, TokenGrid(3, 16, 12))
    assert other.carried_heads == 3 and [x.phases[0].carried_heads for x in other.layers] == [1, 2]
    assert "the bitmaps of 3 of 4 heads (of all phases)" in explain_table(other)


def test_uniform_plans_and_images() -> None:
    found = told(preset("window"), TokenGrid(1, 32, 32))
    assert [layer.layer for layer in found.layers] == ["*"] and found.time is None
    text = explain_table(found)
    assert "all layers" in text and "one rule for all layers and heads" in text and "1,024 (1x32x32)" in text
    dense = told(preset("dense"), GRID)
    assert dense.backend == "cpu" and dense.layers[0].backend is None
    assert dense.layers[0].phases[0].dense_because == "all heads are dense in the plan"


def test_layers_without_text_have_fewer_tokens() -> None:
    from diffsparse.pipelines.family import family_by_class, known_classes

    name, family = next((n, f) for n in known_classes() if (f := family_by_class(n)).visual_only)
    path = next(p for p in family.layers if p not in family.visual_only).replace("*", "0")
    silent = family.visual_only[0].replace("*", "0")
    architecture = Architecture(name, (path, silent), 2, 32, (1, 1, 1), family.text_position)
    plan = replace(preset("window"), architecture=architecture)
    found = told(plan, replace(GRID, text_after=100))
    assert [layer.tokens for layer in found.layers] == [532, 432]


def test_costs_of_elsewhere_are_said_to_be() -> None:
    plan = make_plan()
    plan.record["costs"] = COSTS | {"device": "a GPU"}
    plan.record["search"] = {"trajectory_density": 0.25, "predicted_attention_time": 0.4, "of_steps": 20}
    notes = told(plan).notes
    assert any("measured on a GPU, this is cpu" in note for note in notes)
    assert any("over all 20 steps" in note and "density 0.250, attention time 0.40" in note for note in notes)
    notes = told(plan, TokenGrid(3, 16, 12)).notes
    assert any("on another grid they are estimates" in note for note in notes)
    assert not any("over all 20 steps" in note for note in notes)


@pytest.mark.parametrize(
    "damage",
    [
        {"share": {}},
        {"densities": [0.1]},
        {"densities": [0.6, 0.3, 0.1, 0.0]},
        {"share": 3},
        {"densities": ["a"] * 4},
        {"fill": 0},
        {"fill": 1.5},
        {"fill": float("nan")},
        {"fill": "all"},
        {"fill": [1]},
    ],
)
def test_damaged_costs_are_named(damage: dict[str, Any]) -> None:
    plan = make_plan()
    plan.record["costs"] = COSTS | damage
    with pytest.raises(BadInput, match="costs in the plan's record cannot be read"):
        told(plan)


def test_a_backend_that_cannot_run_there() -> None:
    with pytest.raises(BadInput, match=r"--backend triton: .*see `diffsparse env`"):
        told(preset("window"), backend="triton")
    assert told(preset("window"), backend="reference").layers[0].backend == "reference"


# -- in a terminal -----------------------------------------------------------------------------------------------------


def test_a_terminal_obeys_no_name_of_a_plan() -> None:
    plan = SparsityPlan.from_table({"evil\x1b[2J[bold]x[/bold]": [[HeadEntry(), HeadEntry()]]})
    assert "\x1b" not in explain_table(told(plan), "plan\x1b]0;x\x07")
    assert printable("a\x1b\n\u202eb") == "a\ufffd\ufffd\ufffdb"
    from diffsparse.search.show import plan_table

    assert "\x1b" not in plan_table(plan, GRID)
    styled = plan_table(plan, GRID, styled=True)
    assert "\x1b[2J" not in styled and "[bold]x[/bold]" in styled


def test_a_styled_table_is_as_wide_as_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    import re

    rows = [["blocks.0.attn1", "x" * 100], ["b", "2"]]
    text = text_table(rows, ["layer", "what"], right=[1], styles=["bold", "cyan"], width=40)
    bare = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert "\x1b[" in text and max(map(len, bare.splitlines())) <= 40 and bare.count("x") >= 100
    monkeypatch.setenv("NO_COLOR", "1")
    assert "36m" not in text_table(rows, ["layer", "what"], styles=["bold", "cyan"], width=40)


@pytest.mark.parametrize("text", ["1000,1000,1000", "1,1,600000", "9" * 30 + ",1,1"])
def test_grids_that_no_memory_holds_are_refused_before_anything_is_made(text):
    with pytest.raises(BadInput, match=r"--grid.*at most 524,288 can be shown; give a smaller size") as caught:
        parse_grid(text)
    assert len(str(caught.value)) < 200


def test_sizes_in_pixels_that_no_memory_holds_are_refused():
    with pytest.raises(BadInput, match="at most 524,288 can be shown"):
        shape_for(preset("window"), model_shape="WanTransformer3DModel", height=100_000, width=100_000, num_frames=81)
