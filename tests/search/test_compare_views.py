"""What a comparison shows: files, page, picture, single calls, equal time."""

from __future__ import annotations

import base64
import csv
import hashlib
import html
import io
import json
import random
import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageColor

from diffsparse.plan import SparsityPlan
from diffsparse.preset_plans import preset
from diffsparse.search.compare.calls import capture_calls, evenly, judge_calls
from diffsparse.search.compare.equal_time import equal_time
from diffsparse.search.compare.page import comparison_page
from diffsparse.search.compare.plot import _ticks, colours, pareto
from diffsparse.search.compare.result import Comparison, difference
from diffsparse.search.generate import GenerationSettings
from diffsparse.search.inputs import as_inputs
from tests.search.comparisons import compare, made_up_row
from tests.search.plans import make_plan
from tests.search.tiny import PROMPTS, SHAPE

# -- files -------------------------------------------------------------------------------------------------------------


def test_json_and_csv_tell_all_rows(comparison: tuple[Path, Comparison]) -> None:
    folder, found = comparison
    data = json.loads((folder / "compare.json").read_text("utf-8"))
    assert data == json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [row["row"] for row in data["rows"]] == [row.key for row in found.rows]
    row = next(row for row in data["rows"] if row["row"] == "xattention-0.7")
    assert row["psnr"]["n"] == 2 and row["psnr"]["low"] is None and len(row["clips"]) == 2
    assert row["above_other_seed"] == pytest.approx(row["psnr"]["mean"] - data["other_seed_psnr"])
    assert row["worst"]["psnr"] == min(clip["psnr"] for clip in row["clips"]) and row["speedup"] > 0
    (table,) = data["equal_density"]
    assert table["against"] == table["rows"][0]["row"] and table["rows"][0]["difference"] is None
    known = [each for each in table["rows"][1:] if each["difference"]]
    assert known and all(each["difference"]["mean"] <= 0 for each in known)
    lines = list(csv.DictReader((folder / "compare.csv").read_text("utf-8").splitlines()))
    assert [line["row"] for line in lines] == [row.key for row in found.rows]
    for line, row in zip(lines, data["rows"], strict=True):
        assert (line["psnr"] == "") == (row["psnr"] is None) and (line["reason"] == "") == (row["reason"] is None)
        assert row["psnr"] is None or float(line["psnr"]) == row["psnr"]["mean"]


def test_a_fitted_plan_is_kept_and_is_the_one_that_ran(pipe: Any, comparison: tuple[Path, Comparison]) -> None:
    folder, found = comparison
    row = next(row for row in found.rows if row.name == "xattention")
    plan = SparsityPlan.from_pretrained(folder / "plans" / row.key)
    assert plan.record["preset"] == "xattention" and plan.rules[0].budget.value == row.options["tau"]


# -- page, picture, single calls ---------------------------------------------------------------------------------------


def test_the_page_holds_tables_picture_and_clips_and_nothing_else(
    comparison: tuple[Path, Comparison],
) -> None:
    folder, found = comparison
    page = (folder / "compare.html").read_text("utf-8")
    assert "default-src &#x27;none&#x27;; img-src data:; style-src" in page and "<script" not in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and "url(" not in page
    for text in ("At a density of 0.7", "Plans at other densities", "At equal time", *PROMPTS):
        assert text in page, text
    for row in found.rows:
        assert (f"<td>{row.name}</td>" in page) == bool(row.clips)
        assert row.reason is None or f"{row.name}: {html.escape(row.reason)}" in page
    # The picture, and of each prompt the dense clip once a group and the clip of every row.
    rows = [row for row in found.rows if row.clips]
    assert page.count("<img") == 1 + 2 * (len(rows) + 2) and page.count('alt="dense"') == 4
    assert str(rows[0].values("psnr")[1])[:4] in page
    pictures = re.findall(r'src="data:image/(\w+);base64,([^"]+)"', page)
    shown = [Image.open(io.BytesIO(base64.b64decode(content))) for _, content in pictures]
    assert [getattr(picture, "n_frames", 1) for picture in shown] == [1] + [9] * (len(shown) - 1)
    digest = base64.b64encode(hashlib.sha256(page.split("<style>")[1].split("</style>")[0].encode()).digest()).decode()
    assert f"sha256-{digest}" in page


def test_names_and_prompts_are_text_in_the_page(comparison: tuple[Path, Comparison]) -> None:
    folder, found = comparison
    odd = replace(found, cases=tuple((f"<b>{prompt}</b> & more", seed) for prompt, seed in found.cases))
    page = comparison_page(odd, folder, [0], Image.new("RGB", (4, 4)))
    assert "<b>" not in page and "&lt;b&gt;a red circle&lt;/b&gt; &amp; more" in page


def test_the_picture_has_a_line_for_every_method(comparison: tuple[Path, Comparison]) -> None:
    folder, found = comparison
    with Image.open(folder / "pareto.png") as picture:
        assert picture.width > 1000 and picture.height > 400
        seen = {colour for _, colour in picture.convert("RGB").getcolors(2**24)}
    names = [row.name for row in found.rows if row.clips]
    styles = colours(names, {"mine"})
    assert len(set(styles.values())) == len(names)
    for colour, _ in styles.values():
        assert ImageColor.getrgb(colour) in seen
    many = colours([f"m{i}" for i in range(32)] + ["p"], {"p"})
    assert len(set(many.values())) == 33
    nothing = pareto(replace(found, rows=(), other_seed_psnr=None))
    assert nothing.width < 1000


def test_ticks_are_round_and_hold_what_is_shown() -> None:
    rng = random.Random(0)
    for _ in range(200):
        low = rng.uniform(-50, 50)
        high = low + 10 ** rng.uniform(-4, 3)
        ticks = _ticks(low, high)
        steps = {round(b - a, 8) for a, b in zip(ticks, ticks[1:])}
        assert ticks[0] <= low + 1e-6 * abs(low) and ticks[-1] >= high - 1e-6 * abs(high) and 2 <= len(ticks) <= 9
        assert len(steps) == 1
    assert _ticks(0.3, 0.3)[0] <= 0.3 <= _ticks(0.3, 0.3)[-1]


def test_single_calls_are_judged_by_exact_attention(pipe: Any, tmp_path: Path) -> None:
    plans = {"dense-ish": preset("window", size=(1.0, 1.0, 1.0)), "mine": make_plan()}
    asked: dict[str, Any] = {"methods": ("subblock",), "densities": (0.7, 0.6), "plans": plans}
    found = compare(pipe, tmp_path / "out", calls=True, **asked)
    assert found.calls is not None
    chosen, rows = found.calls["chosen"], {row["row"]: row["calls"] for row in found.calls["rows"]}
    # Two layers, and two of the four steps.
    assert len(chosen) == 4 and {each["layer"] for each in chosen} == {"blocks.0.attn1", "blocks.1.attn1"}
    assert len({each["level"] for each in chosen}) == 2 and {each["grid"] for each in chosen} == {"3x12x12"}
    assert set(rows) == {"plan-dense-ish", "plan-mine", "subblock-0.7", "subblock-0.6"}
    assert all(call["error"] < 1e-5 and call["density"] == 1 for call in rows["plan-dense-ish"])
    mean = {key: statistics.mean(call["error"] for call in calls) for key, calls in rows.items()}
    assert 1e-4 < mean["subblock-0.7"] < mean["subblock-0.6"] < 1
    for call in rows["subblock-0.6"]:
        assert 0 < call["pick_ms"] < call["ms"] and 0.05 < call["density"] < 0.6
    assert all(call["pick_ms"] is None for call in rows["plan-mine"])
    text = found.table()
    assert "relative error of 4 single calls (2 layers, 2 steps)" in text
    assert "Single calls" in (tmp_path / "out" / "compare.html").read_text("utf-8")


def test_a_single_call_has_the_error_of_its_formula(pipe: Any) -> None:
    """Against attention with the mask written out, in double precision."""
    settings = GenerationSettings(num_inference_steps=3, guidance_scale=3.0, **SHAPE)
    source, device = as_inputs(PROMPTS[:1])[0], torch.device("cpu")
    plan = preset("window", size=(1, 0.4, 0.4), tail="none", sparse_below=1.0)
    captured = capture_calls(pipe, source, 1, settings, [1.0, 0.8, 0.5], device)
    for call, judged in zip(captured, judge_calls(plan, captured, device, "auto"), strict=True):
        layout = plan.layout(0, call.layer, 2, call.grid)
        q, k, v = (x[0].double().transpose(0, 1) for x in (call.q, call.k, call.v))
        logits = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        block_of = torch.empty(call.grid.seq_len, dtype=torch.long)
        partition = plan.entries[0].order.partition(call.grid, plan.block_size)
        block_of[torch.as_tensor(partition.permutation)] = torch.arange(partition.num_blocks).repeat_interleave(
            torch.as_tensor(partition.lengths).long()
        )
        kept = layout.index.mask()[0, 0][block_of][:, block_of]
        exact, mine = logits.softmax(-1) @ v, logits.masked_fill(~kept, -torch.inf).softmax(-1) @ v
        assert judged["error"] == pytest.approx(float((mine - exact).norm() / exact.norm()), rel=1e-4)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_places_are_spread_evenly(count: int) -> None:
    for places in (1, 2, 3, 5):
        found = evenly(count, places)
        assert len(found) == len(set(found)) == min(count, places) and found[0] >= 0 and found[-1] < count


# -- equal time --------------------------------------------------------------------------------------------------------


def test_equal_time_interpolates_between_points_around_it_and_never_beyond(comparison: tuple[Path, Comparison]) -> None:
    rows = (
        made_up_row("searched", 2.0, [30.0, 32.0], "searched"),
        made_up_row("a", 1.0, [20.0, 22.0], asked=0.25),
        made_up_row("a", 5.0, [28.0, 34.0]),
        made_up_row("slow", 3.0, [40.0, 40.0]),
        made_up_row("fast", 1.5, [10.0, 10.0]),
        made_up_row("untimed", None, [10.0, 10.0]),
    )
    (table,) = equal_time(replace(comparison[1], rows=rows, densities=(0.5, 0.25)))
    assert (table.reference, table.seconds) == ("searched-0.5", 2.0)
    found = {each.name: each for each in table.methods}
    assert list(found) == ["searched", "a", "slow", "fast"]
    assert found["a"].psnr is not None and found["a"].between == ("a-0.25", "a-0.5")
    assert (found["a"].psnr.minimum, found["a"].psnr.maximum) == (22.0, 25.0)  # a quarter of the way, clip by clip
    assert found["a"].difference is not None and found["a"].difference.mean == pytest.approx(-7.5)
    assert found["slow"].psnr is None and found["slow"].why == "all that was measured takes longer, 3 s at least"
    assert found["fast"].psnr is None and found["fast"].why == "all that was measured takes less, 1.5 s at most"


def test_differences_have_an_interval_from_six_clips_on(comparison: tuple[Path, Comparison]) -> None:
    few, many = ([30.0, 31.0, 29.0, 30.5, 30.2, 28.0][:n] for n in (5, 6))
    for values, interval in ((few, False), (many, True)):
        rows = (
            made_up_row("searched", 1.0, values, "searched"),
            made_up_row("a", 1.0, [v - 4 - 0.1 * i for i, v in enumerate(values)]),
        )
        found = replace(comparison[1], rows=rows, densities=(0.5,))
        between = difference(rows[1], rows[0])
        assert between is not None and (between.low is not None) == interval and between.mean < -4
        assert ("±" in found.table()) == interval and "to searched" in found.table()
