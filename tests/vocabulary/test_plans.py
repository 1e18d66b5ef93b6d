import json
import warnings
from dataclasses import fields, make_dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffsparse.card import plan_card
from diffsparse.codec import decode_entry, decode_schedule, encode_entry, encode_schedule
from diffsparse.entry import Execution, HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.online import OnlineRepair
from diffsparse.order import AxisOrder, RasterOrder, TileOrder
from diffsparse.patterns import Bitmap, Full, Sink, Window
from diffsparse.plan import Architecture, PlanError, SparsityPlan
from diffsparse.preset_plans import PRESETS, preset, presets
from diffsparse.published import PUBLISHED
from diffsparse.schedule import Schedule
from diffsparse.selection import Budget, OnlineSelection
from diffsparse.typed import Reading, read_object
from tests.vocabulary.strategies import orders, token_rules

GOLDEN = Path(__file__).parent / "golden"
GRID = TokenGrid(2, 9, 9)
ARCHITECTURE = Architecture("SomeTransformer", ("blocks.0.attn1", "blocks.1.attn1"), 2, 64, (1, 2, 2), "after")


def example_plan() -> SparsityPlan:
    mask = np.arange(64).reshape(8, 8) % 3 == 0
    order = TileOrder(1, 8, 8)
    bitmap = HeadEntry(
        order, Bitmap.from_mask(mask, GRID, order, 64, Window((1, 0.5, 0.5))), execution=Execution(tail="moments")
    )
    window = HeadEntry(AxisOrder("HWF"), Window((3, 0.2, None)) | Sink(1), execution=Execution(tail="mean"))
    skip = HeadEntry(execution=Execution(mode="skip"))
    return SparsityPlan.from_table(
        {
            "blocks.0.attn1": [[bitmap, window], [skip, window]],
            "blocks.1.attn1": [[window, HeadEntry()], [bitmap, bitmap]],
        },
        schedule=Schedule(sparse_below=0.9, phase_bounds=(0.5,)),
        architecture=ARCHITECTURE,
        record={"model": {"id": "someone/model"}, "quality": {"psnr": 41.5}},
    )


def changed(**changes) -> bytes:
    data = json.loads(example_plan().to_files()["sparse_plan.json"])
    data.update(changes)
    return json.dumps(data).encode()


def arrays():
    from safetensors.numpy import load

    return load(example_plan().to_files()["sparse_plan.safetensors"])


def test_a_plan_round_trips_to_the_same_bytes(tmp_path):
    plan = example_plan()
    plan.save_pretrained(tmp_path)
    again = SparsityPlan.from_pretrained(tmp_path)
    assert again.to_files() == plan.to_files()
    assert again.entries == plan.entries
    assert again.architecture == ARCHITECTURE
    assert "someone/model" in (tmp_path / "README.md").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "sparse_plan.json", "sparse_plan.safetensors"]
    assert SparsityPlan.from_pretrained(tmp_path / "sparse_plan.json").to_files() == plan.to_files()


@pytest.mark.parametrize("version", [1])
def test_plans_of_every_format_version_still_read(version):
    """The folder was written by the first release of that version and is never written again."""
    plan = SparsityPlan.from_pretrained(GOLDEN / f"v{version}")
    assert plan.entries == example_plan().entries
    assert np.array_equal(plan.index, example_plan().index)
    assert plan.schedule == Schedule(sparse_below=0.9, phase_bounds=(0.5,))
    layout = plan.layout(0, "blocks.0.attn1", 2, GRID)
    assert np.array_equal(layout.mask(0).numpy(), np.arange(64).reshape(8, 8) % 3 == 0)


@given(orders, token_rules, st.sampled_from(["none", "mean", "moments"]), st.sampled_from(["exact", "skip"]))
@settings(max_examples=80, deadline=None)
def test_entries_round_trip(order, pattern, tail, mode):
    entry = HeadEntry(order, pattern, execution=Execution(mode, tail))
    held: dict[str, np.ndarray] = {}
    assert decode_entry(json.loads(json.dumps(encode_entry(entry, held))), held) == entry


@given(st.binary(max_size=60))
def test_noise_is_refused_with_one_line(content):
    with pytest.raises(PlanError) as caught:
        SparsityPlan.from_json(content)
    assert "\n" not in str(caught.value)


@given(st.integers(0, 10_000), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_a_truncated_or_cut_plan_is_refused_or_reads_the_same(position, length):
    whole = example_plan().to_files()["sparse_plan.json"]
    position %= len(whole)
    with pytest.raises(PlanError):
        SparsityPlan.from_json(whole[:position], arrays())
    cut = whole[:position] + whole[position + length :]
    try:
        SparsityPlan.from_json(cut, arrays())
    except PlanError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "not a sparsity plan"),
        ({"format_version": 2}, "newer than 1"),
        ({"format_version": "1"}, "format_version must be an integer"),
        ({"gain": 3}, "does not know: gain"),
        ({"block_size": 50}, "block_size must be one of"),
        ({"block_size": None}, "block_size must be an integer, got None"),
        ({"block_size": 64.0}, r"block_size must be an integer, got 64\.0"),
        ({"block_size": True}, "block_size must be an integer, got True"),
        ({"block_size": 10**30}, "block_size must lie within"),
        ({"layers": "ab"}, "layers must be a list, got 'ab'"),
        ({"layers": ["blocks.0.attn1", 5]}, r"layers\[1\] must be a string, got 5"),
        ({"layers": ["blocks.0.attn1", "\x1b[31mred"]}, r"none a control character, got '\\x1b\[31mred'"),
        ({"layers": ["*"], "architecture": None, "index": [["0 0"], ["0 0"]]}, "any model has one head"),
        ({"ignorable": 5}, "ignorable must be a list of keys, got 5"),
        ({"ignorable": "gain", "gain": 3}, "ignorable must be a list of keys"),
        ({"schedule": {"dense_layers": 5}}, r"schedule\.dense_layers must be a list, got 5"),
        ({"schedule": {"dense_layers": [5]}}, r"dense_layers\[0\] must be a string"),
        ({"schedule": {"phase_bounds": 0.5}}, r"phase_bounds must be a list, got 0\.5"),
        ({"schedule": {"sparse_below": True}}, r"sparse_below must be a number, got True"),
        ({"layers": ["blocks.0.attn1"]}, "phases and 1 layers"),
        ({"layers": ["a", "b"]}, "but its architecture has no such layer"),
        ({"layers": ["blocks.0.attn1"] * 2}, "named twice"),
        ({"index": [["0 9", "0 0"], ["0 0", "0 0"]]}, "one of the plan's"),
        ({"index": "0"}, "index must have a list for each phase"),
        ({"index": [["0", "0 0"], ["0 0", "0 0"]]}, "index must have as many heads"),
        ({"index": [["0 0", "0 0"], ["0 0"]]}, "as many of them in every phase"),
        ({"index": [["0 0", 5], ["0 0", "0 0"]]}, "index must have one string"),
        ({"index": [["0 -1", "0 0"], ["0 0", "0 0"]]}, "places in entries, parted by spaces; got '-'"),
        ({"index": [["0 \u0661", "0 0"], ["0 0", "0 0"]]}, "parted by spaces"),
        ({"index": [["0 " + "9" * 30, "0 0"], ["0 0", "0 0"]]}, "parted by spaces"),
        ({"index": [["", ""], ["", ""]]}, "index must have as many heads"),
        ({"entries": []}, "one of the plan's 0"),
        ({"entries": {}}, "entries must be a list"),
        ({"entries": [{"pattern": {"kind": "spiral"}}]}, "unknown pattern kind 'spiral'"),
        ({"entries": [{"pattern": {"kind": "window", "size": [1, 1, 1], "speed": 2}}]}, "does not know: speed"),
        ({"entries": [{"pattern": {"kind": "window"}}]}, "lacks size"),
        ({"entries": [{"pattern": {"kind": "window", "size": []}}]}, r"size must be a list of 3, got \[\]"),
        ({"entries": [{"pattern": {"kind": "window", "size": [1, 1]}}]}, "size must be a list of 3"),
        ({"entries": [{"pattern": {"kind": "window", "size": [1, 1, True]}}]}, r"size\[2\] must be .* got True"),
        ({"entries": [{"pattern": {"kind": "window", "size": [1, 1, 0]}}]}, "size is units >= 1"),
        ({"entries": [{"pattern": {"kind": "union", "parts": []}}]}, "union takes a tuple of at least one pattern"),
        ({"entries": [{"pattern": {"kind": "intersection", "parts": []}}]}, "intersection takes a tuple"),
        ({"entries": [{"pattern": {"kind": "diagonals", "offsets": [[0, 0, 10**30]]}}]}, "must lie within"),
        ({"entries": [{"pattern": {"kind": "diagonals", "offsets": [[0, 0, 10**400]]}}]}, "must lie within"),
        ({"entries": [{"pattern": {"kind": "sink", "frames": 1.0}}]}, r"frames must be an integer, got 1\.0"),
        ({"entries": [{"pattern": {"kind": ["window"]}}]}, r"unknown pattern kind \['window'\]"),
        ({"entries": [{"order": "tile(1,8,8)", "pattern": {"kind": "radial", "rule": "code"}}]}, "raster order only"),
        (
            {
                "entries": [
                    {
                        "pattern": {
                            "kind": "bitmap",
                            "grid": [1, 20000, 20000],
                            "order": "raster",
                            "block_size": 64,
                            "bits": "bitmap_0",
                        }
                    }
                ]
            },
            "more than 524,288 tokens",
        ),
        (
            {
                "entries": [
                    {
                        "pattern": {
                            "kind": "bitmap",
                            "grid": [1, 700, 700],
                            "order": "raster",
                            "block_size": 1,
                            "bits": "bitmap_0",
                        }
                    }
                ]
            },
            "at most 67,108,864 pairs of blocks",
        ),
        ({"entries": [{"order": "phase(" + "9" * 30 + ")"}]}, "unknown token order"),
        ({"entries": [{"order": "phase(9999999999)"}]}, "integer of at least 1"),
        ({"entries": [{"order": "tile(0,1,1)"}]}, "tile sizes must be integers of at least 1"),
        ({"entries": [{"order": ["raster"]}]}, "must be an order, got"),
        ({"entries": [{"selection": "x" * 10_000}]}, "selection must be a name of at most 256 characters"),
        ({"entries": [{"order": "spiral"}]}, "unknown token order"),
        ({"entries": [{"execution": {"tail": "long"}}]}, "tail must be one of"),
        ({"schedule": {"sparse_below": 2}}, r"noise levels lie in \[0, 1\]"),
        ({"schedule": {"phase_bounds": [0.2, 0.4]}}, "descend"),
        ({"schedule": {"steps": 3}}, "does not know: steps"),
        ({"architecture": {"model_class": "X"}}, "architecture lacks head_dim, heads, layers, patch_size"),
        ({"architecture": 5}, "architecture must be an object"),
        ({"record": []}, "record an object"),
        ({"record": {"model": 5}}, r"record\.model must be an object, got 5"),
        ({"record": {"preset": "\x1b[2J"}}, r"record\.preset must be a text"),
        ({"record": {"calibration": []}}, r"record\.calibration must be an object"),
        ({"record": {"calibration": {"trace_steps": "8"}}}, "trace_steps must be an integer from 0 to 1,048,576"),
        ({"record": {"calibration": {"steps": 10**30}}}, "steps must be at most 1,048,576"),
        ({"record": {"calibration": {"guidance_scale": 10**400}}}, "guidance_scale must be at most"),
        ({"record": {"quality": {"reached": "yes"}}}, "quality.reached must be true or false, got 'yes'"),
        ({"record": {"quality": {"ssim_worst": 1e308}}}, "ssim_worst must be from -1 to 1, got 1e"),
        ({"record": {"quality": {"prompts": -1}}}, "prompts must be an integer from 0"),
        ({"record": {"search": {"points": {}}}}, "points must be a list"),
        ({"record": {"search": {"points": [{"budget": "x"}]}}}, r"points\[0\]\.budget"),
        ({"record": {"calibration": {"grid": "1x20000x20000"}}}, "grid has 400,000,000 tokens, at most 524,288"),
        ({"record": {"calibration": {"grid": [1, 20000, 20000]}}}, "grid has 400,000,000 tokens"),
        ({"record": {"search": {"unstable_heads": [1]}}}, r"unstable_heads\[0\] must be a text"),
        ({"record": {"costs": {"share": {"none": ["1"]}}}}, r"share\.'none'\[0\] must be a number"),
    ],
)
def test_damaged_plans_say_what_is_wrong(changes, message):
    with pytest.raises(PlanError, match=message) as caught:
        SparsityPlan.from_json(changed(**changes), arrays())
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 2.0}, r"architecture\.heads must be an integer, got 2\.0"),
        ({"heads": 0}, r"architecture\.heads must be at least 1, got 0"),
        ({"patch_size": [1, 2]}, "patch_size must be a list of 3"),
        ({"patch_size": [1, 0, 2]}, "patch_size must be at least 1"),
        ({"layers": []}, "at least one layer"),
        ({"layers": 5}, "layers must be a list, got 5"),
        ({"text_position": "left"}, "one of none, before, after; got 'left'"),
        ({"model_class": "x\x1b[0m"}, "none a control character"),
        ({"speed": 1}, "does not know: speed"),
    ],
)
def test_damaged_architectures_say_what_is_wrong(changes, message):
    data = json.loads(example_plan().to_files()["sparse_plan.json"])
    data["architecture"] |= changes
    with pytest.raises(PlanError, match=message):
        SparsityPlan.from_json(json.dumps(data).encode(), arrays())


def test_a_record_that_could_not_be_read_is_not_written():
    plan = example_plan()
    plan.record["costs"] = {"densities": (0.1, np.float64(0.2)), "share": {"none": (0.1, 0.2)}}
    assert SparsityPlan.from_json(plan.to_files()["sparse_plan.json"], arrays()).record["costs"]["densities"] == [
        0.1,
        0.2,
    ]
    plan.record["calibration"] = {"trace_steps": "128"}
    with pytest.raises(PlanError, match=r"calibration\.trace_steps must be an integer"):
        plan.to_files()


def test_an_edited_architecture_does_not_match_its_fingerprint():
    data = json.loads(example_plan().to_files()["sparse_plan.json"])
    data["architecture"]["head_dim"] = 32
    with pytest.raises(PlanError, match="fingerprint"):
        SparsityPlan.from_json(json.dumps(data).encode(), arrays())


def test_twice_the_same_key_and_nan_are_refused():
    text = example_plan().to_files()["sparse_plan.json"].decode()
    with pytest.raises(PlanError, match="stands twice"):
        SparsityPlan.from_json(text.replace('"block_size"', '"format": 1, "block_size"', 1).encode(), arrays())
    with pytest.raises(PlanError, match="NaN"):
        SparsityPlan.from_json(text.replace("0.9", "NaN", 1).encode(), arrays())
    with pytest.raises(PlanError, match="1e999 is too large"):
        SparsityPlan.from_json(text.replace("0.9", "1e999", 1).encode(), arrays())


def test_keys_that_a_newer_writer_calls_ignorable_only_warn():
    with pytest.warns(UserWarning, match="ignores: colour"):
        plan = SparsityPlan.from_json(changed(colour="blue", ignorable=["colour"]), arrays())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert SparsityPlan.from_json(plan.to_files()["sparse_plan.json"], arrays()).entries == plan.entries


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(PlanError, match=r"no sparse_plan\.json"):
        SparsityPlan.from_pretrained(tmp_path)
    example_plan().save_pretrained(tmp_path)
    (tmp_path / "sparse_plan.safetensors").write_bytes(b"\x00" * 9)
    with pytest.raises(PlanError, match="cannot be read"):
        SparsityPlan.from_pretrained(tmp_path)
    (tmp_path / "sparse_plan.safetensors").unlink()
    with pytest.raises(PlanError, match="bitmap_0"):
        SparsityPlan.from_pretrained(tmp_path)


def test_another_models_plan_names_the_differences():
    other = Architecture("SomeTransformer", ("blocks.0.attn1",), 4, 64, (1, 2, 2), "after")
    lines = example_plan().check_architecture(other)
    assert len(lines) == 2
    assert "blocks.1.attn1" in lines[0]
    assert "heads: the plan has 2, the model 4" in lines[1]
    assert example_plan().check_architecture(ARCHITECTURE) == []
    assert ARCHITECTURE.fingerprint == "a3638f7185136d1a"  # on every platform and Python


def test_entries_by_phase_layer_and_head():
    plan = example_plan()
    assert str(plan.layer_entries(1, "blocks.0.attn1", 2)[0]) == "skip"
    assert plan.layer_entries(0, "blocks.7.attn1", 2) is None
    with pytest.raises(PlanError, match="2 heads, the model has 3"):
        plan.layer_entries(0, "blocks.0.attn1", 3)
    assert preset("window").layer_entries(0, "anything", 3) == preset("window").entries * 3
    assert preset("window", dense_layers=("first",)).layer_entries(0, "first", 3) is None


def test_trajectory_density_counts_dense_steps_layers_and_tails():
    entry = HeadEntry(RasterOrder(), Window((1, None, None)), execution=Execution(tail="moments"))
    plan = SparsityPlan.uniform(entry, schedule=Schedule(sparse_below=0.5, dense_layers=("a",)))
    grid = TokenGrid(4, 8, 8)
    call = plan.call_densities(grid, ["a", "b"], 2)
    assert call[0, 0] == 1.0
    assert call[0, 1] == pytest.approx(0.25 + 1.5 / 64)
    # One of two steps is dense, and one of two layers in the other.
    assert plan.trajectory_density(grid, [0.9, 0.4], ["a", "b"], 2) == pytest.approx(0.5 + 0.5 * call.mean())


def test_bitmaps_of_another_grid_are_reported():
    assert example_plan().carried(GRID) == 0
    assert example_plan().carried(TokenGrid(2, 9, 10)) == 1


@pytest.mark.parametrize("name", PRESETS)
def test_presets_serve_any_model_and_grid(name):
    plan = preset(name)
    assert plan.is_uniform
    for grid in (TokenGrid(1, 3, 5), TokenGrid(3, 11, 7, 9, 4), TokenGrid(7, 2, 30)):
        assert 0 < plan.trajectory_density(grid, np.linspace(1, 0.05, 8)) <= 1
    assert SparsityPlan.from_json(plan.to_files()["sparse_plan.json"]).to_files() == plan.to_files()
    assert plan.record["preset"] == name


def test_presets_are_listed_with_a_line_each():
    told = presets()
    assert tuple(told) == PRESETS and all(line and "\n" not in line for line in told.values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_methods_have_their_own_settings(name):
    method = PUBLISHED[name]
    plan = preset(name)
    assert plan.block_size == method.block_size and plan.schedule.sparse_below == method.sparse_below
    assert ("arXiv" in method.entry.__doc__) == ("arXiv" in method.line)
    changed = preset(name, sparse_below=0.5, block_size=64, dense_layers=("a",), tail="centroids", repair_rows=64)
    assert changed.schedule.sparse_below == 0.5 and changed.block_size == 64 and changed.online_repair.rows == 64
    assert changed.schedule.dense_layers == ("a",) and changed.entries[0].execution.tail == "centroids"
    with pytest.raises(TypeError, match="speed"):
        preset(name, speed=2)


def test_options_of_published_methods():
    assert preset("xattention", tau=0.95, stride=16).entries[0].selection == OnlineSelection(
        "antidiagonal", Budget("top_p", 0.95), (("stride", 16),)
    )
    assert preset("adaspa", search_at=[0.6, 0.3], density=0.1).entries[0].selection == OnlineSelection(
        "mass", Budget("recall_heads", 0.1), (("rows", 64),), (0.6, 0.3)
    )
    assert preset("blade", most=0.1).entries[0].selection.budget == Budget("top_p", 0.95, least=0.05, most=0.1)
    with pytest.raises(ValueError, match="kind 'top_p' must be a number from 0 to 1, got 2"):
        preset("xattention", tau=2)


@pytest.mark.parametrize("name", ["online", "draft", "svg", "hip", "sparsepr"])
def test_a_profile_of_densities_by_head(name):
    profile = {"a": [0.1, 0.5, 0.1], "b": [1.0, 0.2, 0.3]}
    plan = preset(name, densities=profile, tail="none", repair_rows=16)
    rule = preset(name).entries[0].online
    assert plan.layers == ("a", "b") and not plan.is_uniform
    for layer, densities in profile.items():
        entries = plan.layer_entries(0, layer, 3)
        assert [entry.online.budget for entry in entries] == [Budget("density", d) for d in densities]
        assert all(entry.online.rule == rule.rule for entry in entries)
        for entry, density in zip(entries, densities):
            assert entry.online.values.get("share", density) == density
    assert SparsityPlan.from_json(plan.to_files()["sparse_plan.json"]).to_files() == plan.to_files()
    with pytest.raises(ValueError, match="'density' must be a number above 0, got 0"):
        preset(name, densities={"a": [0]})


def test_densities_are_for_rules():
    for name in ("gna", "window", "dense"):
        with pytest.raises(ValueError, match=f"pick blocks while the model runs; '{name}' does not"):
            preset(name, densities={"a": [0.5]})


def test_the_conservative_preset_keeps_more_than_the_window():
    grid = TokenGrid(5, 30, 52)
    wide, window = preset("conservative"), preset("window")
    assert wide.schedule.sparse_below < window.schedule.sparse_below
    assert wide.call_densities(grid).mean() > window.call_densities(grid).mean()
    assert preset("conservative", sparse_below=0.5).schedule.sparse_below == 0.5


def test_online_keeps_more_at_high_noise_levels():
    plan = preset("online", density=0.2, fall=2)
    assert plan.schedule.phase_bounds == (0.93, 0.6) and plan.schedule.sparse_below == 1.0
    shares = [plan.layer_entries(phase, "any", 1)[0].online.budget for phase in range(3)]
    assert shares == [Budget("best_heads", d) for d in (0.4, 0.2, 0.1)]
    assert plan.online_repair == OnlineRepair(64)
    assert preset("online", repair_rows=0).repair is None and preset("sparsepr", repair_rows=0).repair is None
    assert preset("online", density=0.9, fall=5).layer_entries(0, "any", 1)[0].online.budget.value == 1.0
    flat = preset("online", fall=1)
    assert flat.schedule.num_phases == 1 and flat.entries[0].online.budget.value == 0.25
    late = preset("online", sparse_below=0.7)  # dense above, so the first of the levels is not one of the plan
    assert late.schedule.phase_bounds == (0.6,)
    found = [late.layer_entries(phase, "any", 1)[0].online.budget.value for phase in range(2)]
    assert found == [0.25, pytest.approx(0.25 / 1.8)]
    for wrong in (0.5, 11, "much", None):
        with pytest.raises(ValueError, match="fall says how many times more is kept at first, from 1 to 10"):
            preset("online", fall=wrong)
    with pytest.raises(ValueError, match="the value of a budget of kind 'best_heads' must be"):
        preset("online", density=1.5)


@pytest.mark.parametrize("block_size", [64, 128])
def test_radial_for_images_is_on_tiles_of_one_block(block_size):
    entry = preset("radial", images=True, block_size=block_size).entries[0]
    assert entry.order.t * entry.order.h * entry.order.w == block_size
    assert preset("radial", block_size=block_size).entries[0].order.is_raster


def test_presets_refuse_what_they_do_not_have():
    with pytest.raises(ValueError, match="dense, window, radial, conservative"):
        preset("spiral")
    with pytest.raises(TypeError):
        preset("window", decay=0.2)
    with pytest.raises(TypeError, match="tail"):
        preset("dense", tail="mean")
    with pytest.raises(TypeError, match=r"online.*takes no size, speed"):
        preset("online", speed=2, size=3)


def test_schedule_intervals_are_closed_above():
    schedule = Schedule(sparse_below=0.8, dense_below=0.1, phase_bounds=(0.6, 0.3))
    assert schedule.phases([1.0, 0.81, 0.8, 0.61, 0.6, 0.3, 0.11, 0.1, 0.0]) == [None, None, 0, 0, 1, 2, 2, None, None]


def test_a_last_step_at_level_zero_is_dense_only_where_the_schedule_says_so():
    assert Schedule().phases([1.0, 0.0]) == [0, 0]
    assert Schedule(phase_bounds=(0.5,)).phase(0.0) == 1
    assert Schedule(dense_below=0.01).phases([0.02, 0.01, 0.0]) == [0, None, None]
    old = decode_schedule({"sparse_below": 0.9, "dense_below": 0.0, "phase_bounds": [], "dense_layers": []})
    assert old.phases([0.95, 0.5, 0.0]) == [None, 0, 0]


@pytest.mark.parametrize(
    "values", [{"sparse_below": 1.2}, {"phase_bounds": (0.3, 0.5)}, {"phase_bounds": (0.0,)}, {"dense_below": "0"}]
)
def test_bad_schedules_are_refused(values):
    with pytest.raises(ValueError, match=r"noise levels|descend"):
        Schedule(**values)


def test_dense_steps_in_the_middle_and_at_the_end():
    schedule = Schedule(sparse_below=0.9, phase_bounds=(0.5,), dense_between=((0.7, 0.4), (0.1, 0.0)))
    assert schedule.phases([1.0, 0.9, 0.71, 0.7, 0.5, 0.41, 0.4, 0.11, 0.1, 0.0]) == [
        None, 0, 0, None, None, None, 1, 1, None, None,
    ]  # fmt: skip
    assert schedule.dense_steps() == ["above noise level 0.9", "at noise level 0.7 to 0.4", "at noise level 0.1 to 0"]
    # With three steps none lies in the first interval, nor in the second: those that pass through them are dense.
    assert schedule.phases([0.85, 0.8, 0.3]) == [0, None, None]
    assert Schedule(dense_between=((0.7, 0.4),)).phases([0.4, 0.3]) == [0, 0]  # begins below it


@given(
    st.lists(st.integers(0, 100), min_size=1, max_size=12, unique=True),
    st.lists(st.integers(0, 100), min_size=2, max_size=6, unique=True),
)
def test_every_dense_interval_that_a_generation_passes_has_a_dense_step(levels, edges):
    levels, edges = (sorted((n / 100 for n in some), reverse=True) for some in (levels, edges[: len(edges) // 2 * 2]))
    pairs = tuple(zip(edges[::2], edges[1::2], strict=True))
    phases = Schedule(dense_between=pairs).phases(levels)
    needed = set()
    for high, low in pairs:
        inside = {i for i, level in enumerate(levels) if low < level <= high or low == level == 0}
        above = [i for i, level in enumerate(levels) if level > high]
        needed |= inside or set(above[-1:])
    assert {i for i, phase in enumerate(phases) if phase is None} == needed


def test_a_schedule_with_dense_intervals_reads_back_and_older_versions_refuse_it():
    plan = SparsityPlan.uniform(HeadEntry(), schedule=Schedule(dense_between=((0.7, 0.4), (0.1, 0.0))))
    content = plan.to_files()["sparse_plan.json"]
    assert SparsityPlan.from_json(content).schedule == plan.schedule
    assert "at noise level 0.7 to 0.4" in plan_card(plan)
    data = json.loads(content)["schedule"]
    before = make_dataclass("Before", [(f.name, f.type, f) for f in fields(Schedule) if f.name != "dense_between"])
    with pytest.raises(PlanError, match="the schedule has keys this version does not know: dense_between; update"):
        read_object(before, data, "the schedule", "schedule", Reading())
    # Plans without any are written as before, for versions that do not know the key.
    assert "dense_between" not in encode_schedule(Schedule())


@pytest.mark.parametrize(
    "value", [[[0.7]], [[0.4, 0.7]], [[0.7, 0.7]], [[0.7, 0.4], [0.5, 0.2]], [[1.2, 0.4]], [0.7, 0.4], "0.7"]
)
def test_dense_intervals_that_are_none_are_refused_in_one_line(value):
    data = json.loads(preset("window").to_files()["sparse_plan.json"])
    data["schedule"]["dense_between"] = value
    with pytest.raises(PlanError, match=r"dense_between|noise levels lie in") as caught:
        SparsityPlan.from_json(json.dumps(data).encode())
    assert "\n" not in str(caught.value)


def test_outputs_do_not_serve_over_a_dense_step():
    entry = HeadEntry(pattern=Window((None, 0.4, 0.4)), execution=Execution(reuse=1.0))
    plan = SparsityPlan.uniform(entry, schedule=Schedule(dense_between=((0.7, 0.4),)))
    call = float(plan.call_densities(GRID, ["a"], 2)[0, 0])
    found = plan.step_densities(GRID, [1.0, 0.9, 0.8, 0.6, 0.3, 0.2], ["a"], 2)
    assert found == pytest.approx([call, 0, 0, 1, call, 0], abs=1e-12)


def test_numerics_of_a_whole_plan():
    entries = [
        HeadEntry(),
        HeadEntry(execution=Execution(mode="skip")),
        HeadEntry(pattern=Window((1, 0.5, 0.5)), execution=Execution(tail="moments")),
        HeadEntry(pattern=Window((1, 0.5, 0.5)), execution=Execution(tail="centroids")),
        HeadEntry(pattern=Window((1, 0.5, 0.5))),
    ]
    plan = SparsityPlan.from_table({"a": [entries], "b": [entries[::-1]]})
    small = plan.with_numerics("int8")
    got = small.layer_entries(0, "b", 5)[::-1]
    assert got == small.layer_entries(0, "a", 5)
    assert [e.execution.numerics for e in got] == ["auto", "auto", "auto", "int8", "int8"]
    assert [str(e) for e in got[3:]] == [f"{entries[3]} in int8", f"{entries[4]} in int8"]
    assert small.layout(0, "a", 5, GRID).heads.numerics == ("auto", "int8")
    # There and back, and through other numerics.
    assert small.with_numerics("auto").layer_entries(0, "a", 5) == tuple(entries)
    assert small.with_numerics("fp8").layer_entries(0, "a", 5)[3].execution.numerics == "fp8"
    with pytest.raises(ValueError, match="numerics must be one of auto, int8, fp8; got 'int4'"):
        plan.with_numerics("int4")
    with pytest.raises(ValueError, match="the tail 'moments' cannot run with numerics 'fp8': take 'mean' or"):
        Execution(tail="moments", numerics="fp8")


def test_entries_refuse_unknown_choices():
    for values in ({"mode": "fast"}, {"tail": "long"}, {"numerics": "int3"}):
        with pytest.raises(ValueError, match="must be one of"):
            Execution(**values)
    with pytest.raises(ValueError, match="selection must be one of static"):
        HeadEntry(pattern=Full(), selection="magic")
