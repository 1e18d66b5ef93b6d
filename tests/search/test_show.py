"""Tables and pictures of plans, and sheets of clips."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffsparse.entry import Execution, HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.layout import build_layout
from diffsparse.online import OnlineRepair
from diffsparse.order import AxisOrder, RasterOrder, TileOrder, TokenOrder
from diffsparse.patterns import Empty, Full, Sink, Window
from diffsparse.plan import SparsityPlan
from diffsparse.preset_plans import preset
from diffsparse.search.columns import text_table
from diffsparse.search.errors import BadInput
from diffsparse.search.measured import PooledAttention, figures_beside
from diffsparse.search.report import can_write_videos, write_video
from diffsparse.search.sheet import (
    colour_ramp,
    contact_sheet,
    frame_sheet,
    kept_share,
    plan_sheet,
    side_by_side_frames,
)
from diffsparse.search.show import (
    describe,
    draw,
    family,
    grid_of,
    parse_grid,
    plan_table,
    tail_of,
)
from tests.search.plans import make_plan, with_attention

GRID = TokenGrid(3, 12, 12)


def test_families_and_tails() -> None:
    window = HeadEntry(RasterOrder(), Window(size=(1, 2, 3)) | Sink(frames=1), execution=Execution(tail="mean"))
    assert (family(window), tail_of(window)) == ("window|sink", "mean")
    assert (family(HeadEntry()), tail_of(HeadEntry(execution=Execution(tail="mean")))) == ("dense", "none")
    assert family(HeadEntry(pattern=Empty(), execution=Execution(mode="skip"))) == "skip"


def test_description() -> None:
    plan = make_plan()
    data = json.loads(json.dumps(describe(plan, GRID), allow_nan=False))
    assert [(r["phase"], r["layer"]) for r in data["layers"]] == [
        (p, f"blocks.{i}.attn1") for p in range(2) for i in range(2)
    ]
    calls = plan.call_densities(GRID)
    assert [r["density"] for r in data["layers"]] == pytest.approx(calls.reshape(-1).tolist())
    assert data["call_density"] == pytest.approx(float(calls.mean()))
    assert sum(data["layers"][0]["families"].values()) == 2
    assert describe(plan)["call_density"] is None


def test_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = plan_table(make_plan(), GRID)
    assert "WanTransformer3DModel, 2 layers, 2 heads of 32" in text and "0: 0.9 to 0.5, 1: 0.5 to 0" in text
    assert "1 window, 1 dense" in text and "call density" in text
    assert "--grid T,H,W gives densities" in plan_table(preset("window"))


def test_an_online_repair_is_told_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    plan = replace(make_plan(), repair=OnlineRepair(32))
    data = json.loads(json.dumps(describe(plan, GRID), allow_nan=False))
    assert data["online_rows"] == 32 and data["repaired_heads"] == 0
    calls = plan.call_densities(GRID)
    assert [r["density"] for r in data["layers"]] == pytest.approx(calls.reshape(-1).tolist())
    assert data["call_density"] > describe(make_plan(), GRID)["call_density"]
    assert "online, by 32 exact rows of each sparse call" in plan_table(plan, GRID)
    assert "online" not in plan_table(make_plan(), GRID)


@pytest.mark.parametrize("name", ["xattention", "adaspa", "sparsed"])
def test_what_picks_blocks_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    plan, grid = preset(name), TokenGrid(3, 16, 16)
    (rule,) = plan.rules
    data = describe(plan, grid)
    assert data["rules"] == [str(rule)] and data["layers"][0]["families"] == {rule.rule: 1}
    assert data["call_density"] == pytest.approx(plan.call_densities(grid).mean())
    table = " ".join(plan_table(plan, grid).split())
    assert f"{rule}, while the model runs" in table
    assert ("the most that this allows" in table) == (name != "sparsed")  # what the others keep depends on the data
    assert describe(preset("window"), grid)["rules"] == []


def test_errors_of_the_heads_are_a_column_where_they_are_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    plan = make_plan()
    folder = plan.save_pretrained(tmp_path)
    with_attention(folder, plan)
    assert figures_beside(plan, folder) is None and figures_beside(plan, None) is None
    assert describe(plan, GRID)["layers"][0]["error"] is None and "worst head" not in plan_table(plan, GRID)
    with_attention(folder, plan, figures=True)
    figures = figures_beside(plan, folder, GRID)
    assert figures is not None and figures_beside(plan, folder, TokenGrid(3, 16, 9)) is None
    rows = describe(plan, GRID, figures)["layers"]
    for row, error, kept in zip(rows, figures.error.reshape(4, 2), figures.kept_mass.reshape(4, 2), strict=True):
        assert row["error"] == pytest.approx(error.mean()) and row["worst_error"] == pytest.approx(error.max())
        assert row["kept_mass"] == pytest.approx(kept.mean())
    text = plan_table(plan, GRID, figures)
    assert text.splitlines()[-1].endswith(f"{rows[-1]['error']:.1e} ({rows[-1]['worst_error']:.1e})")
    assert "mean (worst head)" in text and f"({rows[0]['worst_error']:.1e})" in plan_table(
        plan, GRID, figures, styled=True
    )


def test_a_dense_layer_counts_as_dense() -> None:
    plan = preset("window", dense_layers=("blocks.0.attn1",))
    assert describe(plan, GRID)["layers"][0]["families"] == {"window": 1}
    named = make_plan()
    from dataclasses import replace

    named = replace(named, schedule=replace(named.schedule, dense_layers=("blocks.1.attn1",)))
    row = describe(named, GRID)["layers"][1]
    assert row["families"] == {"dense": 2} and row["density"] == 1.0


@pytest.mark.parametrize(
    ("text", "grid"),
    [
        ("5x32x32", TokenGrid(5, 32, 32)),
        ("226+13x30x45", TokenGrid(13, 30, 45, text_before=226)),
        ("33x45x80+256", TokenGrid(33, 45, 80, text_after=256)),
        ("something", None),
    ],
)
def test_the_grid_is_read_from_the_record(text: str, grid: TokenGrid | None) -> None:
    plan = preset("window")
    plan.record["calibration"] = {"grid": text}
    assert grid_of(plan) == grid
    if grid is not None:
        assert str(grid) == text


def test_text_tokens_are_known_beside_measured_attention_too(tmp_path: Path) -> None:
    plan = make_plan()
    folder = plan.save_pretrained(tmp_path)
    with_attention(folder, plan)
    for recorded, wanted in (("3x12x12+20", "3x12x12+20"), ("3x8x16+20", "3x12x12"), ("?", "3x12x12")):
        plan.record["calibration"] = {"grid": recorded}
        assert str(grid_of(plan, folder)) == wanted


def test_a_record_that_is_not_as_we_write_it() -> None:
    plan = preset("window")
    for calibration in ("text", ["5x32x32"], 3, None):
        plan.record["calibration"] = calibration
        assert grid_of(plan) is None
    for grid in ("0x4x4", [1, 2], [1, 2, "3"]):
        plan.record["calibration"] = {"grid": grid}
        assert grid_of(plan) is None


def test_parse_grid() -> None:
    assert parse_grid("5,32,32") == TokenGrid(5, 32, 32)
    with pytest.raises(BadInput, match="--grid"):
        parse_grid("5,x")


@pytest.mark.parametrize("order", [RasterOrder(), TileOrder(1, 8, 8), TileOrder(1, 4, 16), AxisOrder("HWF")])
def test_kept_share_is_exact(order: TokenOrder) -> None:
    """In any order, from any other order: the share of kept token pairs of every pair of bins."""
    entry = HeadEntry(AxisOrder("WHF"), Window(size=(2, 0.5, 4)))
    share = kept_share(entry, GRID, 64, order)
    kept = build_layout(GRID, [entry], 64).token_mask(0).double().numpy()
    starts = order.partition(GRID, 64).start
    permutation = order.permutation(GRID)
    kept = kept[permutation][:, permutation]
    wanted = np.add.reduceat(np.add.reduceat(kept, starts[:-1], 0), starts[:-1], 1)
    lengths = np.diff(starts)
    np.testing.assert_allclose(share, wanted / np.outer(lengths, lengths))


def test_kept_share_in_few_bins() -> None:
    grid = TokenGrid(16, 32, 32)
    share = kept_share(HeadEntry(pattern=Full()), grid, 64)
    assert share.shape == (80, 80) and (share == 1).all()
    skipped = HeadEntry(pattern=Empty(), execution=Execution(mode="skip"))
    assert not kept_share(skipped, grid, 64).any()


def test_the_colours_grow_lighter_evenly() -> None:
    rgb = colour_ramp(np.linspace(0, 1, 64))
    assert rgb.min() >= 0 and rgb.max() <= 1
    light = rgb**2.2 @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(light) > -1e-3).all() and light[-1] > light[0] + 0.5
    assert np.isfinite(colour_ramp(np.array([np.nan, -1, 2]))).all()


def test_the_sheet_over_measured_attention(tmp_path: Path) -> None:
    plan = make_plan()
    folder = plan.save_pretrained(tmp_path / "plan")
    bare = draw(plan, GRID, tmp_path / "bare.png", folder=folder)
    with_attention(folder, plan)
    assert grid_of(plan, folder) == GRID
    full = draw(plan, GRID, tmp_path / "deep" / "full.png", folder=folder)
    one = draw(plan, GRID, tmp_path / "one.png", folder=folder, phase=1)
    sizes = [Image.open(f).size for f in (bare, full, one)]
    assert sizes[0][0] > 500 and sizes[1][0] > sizes[2][0]
    assert full.read_bytes() != bare.read_bytes()


def test_attention_of_another_grid_is_left_out(tmp_path: Path) -> None:
    plan = make_plan()
    folder = plan.save_pretrained(tmp_path)
    bare = draw(plan, GRID, tmp_path / "bare.png", folder=folder).read_bytes()
    with_attention(folder, plan, grid="3,8,16")
    assert draw(plan, GRID, tmp_path / "other.png", folder=folder).read_bytes() == bare


def test_damaged_attention_is_named(tmp_path: Path) -> None:
    (tmp_path / "attention.safetensors").write_bytes(b"torn")
    with pytest.raises(BadInput, match="delete it to draw the plan without it"):
        PooledAttention.beside(tmp_path)
    assert PooledAttention.beside(None) is None


def test_a_sheet_of_many_heads_stays_small() -> None:
    index = np.zeros((3, 40, 40), np.int64)
    plan = SparsityPlan(
        entries=preset("window").entries,
        index=index,
        layers=tuple(f"blocks.{i}.attn1" for i in range(40)),
        schedule=make_plan().schedule.__class__(phase_bounds=(0.6, 0.3)),
    )
    picture = plan_sheet(plan, GRID)
    assert picture.width < 6000 and picture.height < 3000


def test_contact_sheet() -> None:
    clip = torch.rand(9, 3, 16, 24)
    picture = contact_sheet([("one\nsmall", clip, clip), ("two", clip, clip * torch.nan)], frames=4, height=48)
    assert picture.width > 4 * 72 and picture.height > 6 * 48
    with pytest.raises(ValueError, match="at least one clip"):
        contact_sheet([])


def test_one_frame_large() -> None:
    dense, sparse = torch.zeros(3, 16, 24), torch.zeros(3, 16, 24)
    sparse[:, :8] = 0.1
    picture = frame_sheet(dense, sparse, caption="frame 1 of 2", height=48)
    assert picture.width > picture.height and picture.width >= 3 * 72
    pixels = np.asarray(picture)
    # The panel on the right is bright where the two differ, above, and dark below.
    x = picture.width - 8 - 36
    assert pixels[58 + 12, x].sum() > pixels[58 + 36, x].sum() + 100
    same = np.asarray(frame_sheet(dense, dense, caption="x", height=48))
    assert (same[58 + 12, x] == same[58 + 36, x]).all()


def test_video_frames_suit_encoders() -> None:
    frames = side_by_side_frames(torch.rand(3, 3, 50, 70), torch.rand(3, 3, 50, 70))
    assert len(frames) == 3 and frames[0].dtype == np.uint8
    assert frames[0].shape[0] % 16 == 0 and frames[0].shape[1] % 16 == 0


@pytest.mark.skipif(not can_write_videos(), reason="needs imageio and its ffmpeg")
def test_video(tmp_path: Path) -> None:
    file = write_video(torch.rand(5, 3, 32, 32), torch.rand(5, 3, 32, 32), tmp_path / "clip.mp4")
    assert file.read_bytes()[4:8] == b"ftyp"


def test_text_tables() -> None:
    assert text_table([["a", "1"], ["bcd", "22"]], header=["x", "n"], right=[1]) == (
        "x     n\n---  --\na     1\nbcd  22"
    )
    assert text_table([]) == ""
