"""Methods side by side on the tiny pipeline: equal densities, reasons, resuming, shards, and what is refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from diffsparse.grid import TokenGrid
from diffsparse.pipelines import sparse_attention_summary
from diffsparse.plan import SparsityPlan
from diffsparse.preset_plans import preset
from diffsparse.search.compare import run
from diffsparse.search.compare.methods import (
    MOST_TRIES,
    NEAR,
    NO_METHODS,
    REACH,
    TRIES,
    Knob,
    OutOfReach,
    find_value,
    knob_of,
    method_names,
)
from diffsparse.search.compare.record import Shard
from diffsparse.search.compare.result import Comparison
from diffsparse.search.compare.trajectory import Trajectory, find_trajectory
from diffsparse.search.errors import BadInput
from diffsparse.search.generate import GenerationSettings, generate_clip
from diffsparse.search.inputs import as_inputs
from diffsparse.search.search import search_plan
from diffsparse.search.store import StoreLocked, StoreMismatch
from tests.search.comparisons import METHODS, compare
from tests.search.plans import make_plan
from tests.search.tiny import PROMPTS, SHAPE, SHAPE_OPTIONS, Cli, build_pipeline, config, fix_costs

# -- knobs -------------------------------------------------------------------------------------------------------------


def test_every_method_has_a_knob_that_gives_plans_at_both_ends() -> None:
    assert {"window", "radial", "xattention", "gna"} <= set(method_names()) and not set(NO_METHODS) & set(
        method_names()
    )
    for name in method_names():
        knob = knob_of(name)
        for value in (knob.low, knob.high, (knob.low + knob.high) / 2):
            assert isinstance(preset(name, **knob.options(value)), SparsityPlan), (name, value)


def test_a_method_without_a_knob_says_so() -> None:
    with pytest.raises(OutOfReach, match="dense has no option that sets how much it computes"):
        knob_of("dense")


@pytest.mark.parametrize("cheap", [True, False])
@pytest.mark.parametrize("wanted", [0.2, 0.35, 0.5, 0.8])
def test_a_smooth_knob_is_brought_near(cheap: bool, wanted: float) -> None:
    """A density that rises slowly first and steeply then, as that of a cumulative share does."""
    known: dict[float, float] = {}
    value, density = find_value(Knob(0.0, 1.0, dict), wanted, lambda v: 0.1 + 0.9 * v**4, known, cheap=cheap)
    assert density == known[value] == pytest.approx(0.1 + 0.9 * value**4)
    assert abs(density - wanted) <= (NEAR if cheap else 0.02)


def test_what_was_tried_for_one_density_serves_the_next() -> None:
    known: dict[float, float] = {}
    tries = []

    def density(value: float) -> float:
        tries.append(value)
        return value

    for wanted in (0.5, 0.35, 0.5):
        assert find_value(Knob(0.0, 1.0, dict), wanted, density, known, cheap=False)[1] == pytest.approx(
            wanted, abs=NEAR
        )
    assert len(tries) == len(set(tries)) == len(known)


def test_a_steep_knob_is_tried_more_often_until_it_is_within_reach() -> None:
    """Nearly all of its range keeps everything."""
    tries: list[float] = []

    def steep(value: float) -> float:
        tries.append(value)
        return min(1.0, 0.2 + 40 * value)

    _, density = find_value(Knob(0.0, 100.0, dict), 0.5, steep, {}, cheap=False)
    assert abs(density - 0.5) <= REACH and TRIES < len(tries) <= MOST_TRIES + 1
    with pytest.raises(OutOfReach, match=r"16 values were tried; the nearest density found is"):
        find_value(Knob(0.0, 1e9, dict), 0.5, steep, {}, cheap=False)


def test_a_knob_with_steps_takes_the_nearest_one_within_reach() -> None:
    def steps(value: float) -> float:
        return 0.3 if value < 0.5 else 0.52

    assert find_value(Knob(0.0, 1.0, dict), 0.49, steps, {}, cheap=True)[1] == 0.52
    with pytest.raises(OutOfReach, match=r"cannot be brought to 0.42: it goes in steps; the nearest .* is 0.520"):
        find_value(Knob(0.0, 1.0, dict), 0.42, steps, {}, cheap=True)
    with pytest.raises(OutOfReach, match=r"it takes 0.300 at least"):
        find_value(Knob(0.0, 1.0, dict), 0.2, steps, {}, cheap=False)
    with pytest.raises(OutOfReach, match=r"it takes 0.520 at most"):
        find_value(Knob(0.0, 1.0, dict), 0.6, steps, {}, cheap=True)


# -- rows --------------------------------------------------------------------------------------------------------------


def test_rows_have_the_density_that_was_asked_for_or_say_why_not(comparison: tuple[Path, Comparison]) -> None:
    _, found = comparison
    rows = {row.key: row for row in found.rows}
    assert set(rows) == {"plan-mine", *(f"{name}-0.7" for name in METHODS)} and found.complete
    for row in rows.values():
        if row.reason is not None:
            assert row.state == "out of reach" and not row.clips
            continue
        assert len(row.clips) == 2 and row.psnr is not None and row.psnr.minimum > found.other_seed_psnr - 10
        if row.asked is not None:
            assert row.density == pytest.approx(row.asked, abs=REACH), row.key
        assert row.loop_seconds > row.attention_seconds > 0
        assert (row.selection_seconds is not None) == bool(row.rules), row.key
        assert row.selection_seconds is None or 0 < row.selection_seconds < row.attention_seconds
    assert rows["xattention-0.7"].state == rows["subblock-0.7"].state == "done"
    # Half of its steps are dense, and its blocks of 64 tokens are few here.
    assert rows["xattention-0.7"].options.keys() == {"tau"}


def test_what_a_plan_without_rules_takes_is_known_beforehand(pipe: Any, comparison: tuple[Path, Comparison]) -> None:
    """And of a rule only where all blocks are as long, which those of this grid are not in tiles."""
    settings = GenerationSettings(num_inference_steps=4, guidance_scale=3.0, **SHAPE)
    source = as_inputs(PROMPTS[:1])[0]
    levels = generate_clip(pipe, source, 1, settings).noise_levels
    trajectory = find_trajectory(pipe, source, 1, settings, levels)
    mine = next(row for row in comparison[1].rows if row.name == "mine")
    assert trajectory.density(make_plan()) == pytest.approx(mine.density, abs=1e-6)
    assert trajectory.density(preset("subblock")) is None is trajectory.density(preset("xattention"))
    even = Trajectory(levels, (("blocks.0.attn1", 2, TokenGrid(2, 16, 16)),))
    assert even.density(preset("subblock", density=0.5)) == pytest.approx(0.75)  # two of four steps are dense
    assert Trajectory.from_dict(json.loads(json.dumps(trajectory.to_dict()))) == trajectory


def test_dense_steps_that_take_too_much_are_cut(pipe: Any, tmp_path: Path) -> None:
    found = compare(pipe, tmp_path / "out", methods=("vmoba",), densities=(0.45,), plans=())
    (row,) = found.rows
    assert row.state == "done" and row.density == pytest.approx(0.45, abs=REACH)
    assert row.note == "its dense steps alone take 0.500 of the attention; cut to 0.000"
    assert row.options is not None and row.options["sparse_below"] == 1.0
    assert f"{row.key}: its dense steps alone take" in found.table()
    again = compare(pipe, tmp_path / "out", methods=("vmoba",), densities=(0.45,), plans=())
    assert again.rows == found.rows


def test_a_density_out_of_reach_is_told(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = compare(pipe, tmp_path / "out", methods=("radial",), densities=(0.02,), plans=())
    assert found.rows[0].state == "out of reach" and found.complete
    assert str(found.rows[0].reason).startswith("cannot be brought to 0.02: it takes")
    assert "radial: cannot be brought to 0.02" in found.table()
    # It is not looked for again.
    monkeypatch.setattr(run.Runner, "_fitted", lambda *args: pytest.fail("looked for again"))
    assert compare(pipe, tmp_path / "out", methods=("radial",), densities=(0.02,), plans=()).rows == found.rows


def test_plans_stand_in_the_table_of_their_density(
    pipe: Any, comparison: tuple[Path, Comparison], tmp_path: Path
) -> None:
    _, found = comparison
    mine = next(row for row in found.rows if row.name == "mine")
    assert [row.name for row in found.others] == ["mine"] and "plans at other densities" in found.table()
    near = compare(pipe, tmp_path / "out", methods=("subblock",), densities=(round(mine.density + 0.005, 3),))
    (density,) = near.densities
    assert {"mine", "subblock"} == {row.name for row in near.at(density)} and not near.others
    assert near.reference(near.at(density)).name == "mine"


def test_a_method_that_raises_is_a_row_and_the_next_run_tries_it_again(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = run.generate_clip

    def fail(pipe: Any, *args: Any, **kwargs: Any) -> Any:
        rules = [rule for t in sparse_attention_summary(pipe).transformers.values() for rule in t.rules]
        if any("sub_block" in rule for rule in rules):
            raise RuntimeError("no room\nfor this")
        return real(pipe, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(run, "generate_clip", fail)
        found = compare(pipe, tmp_path / "out", methods=("subblock", "xattention"), plans=())
    states = {row.name: (row.state, row.reason) for row in found.rows}
    assert states == {"subblock": ("failed", "RuntimeError: no room for this"), "xattention": ("done", None)}
    assert "subblock: RuntimeError: no room for this" in found.table()
    assert not sparse_attention_summary(pipe).enabled
    again = compare(pipe, tmp_path / "out", methods=("subblock", "xattention"), plans=())
    assert {row.state for row in again.rows} == {"done"}


def test_searched_rows_are_composed_from_the_record(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fix_costs(monkeypatch)
    record = tmp_path / "search"
    search_plan(pipe, PROMPTS, config(validation_prompts=0), record, progress=False, say=lambda line: None)
    asked: dict[str, Any] = {"methods": ("subblock",), "plans": (), "searched": record, "densities": (0.7, 0.5)}
    found = compare(pipe, tmp_path / "out", num_inference_steps=6, **asked)
    rows = [row for row in found.rows if row.name == "searched"]
    assert [row.asked for row in rows] == [0.7, 0.5] and all(row.state == "done" for row in rows)
    for row in rows:
        assert row.density == pytest.approx(row.asked, abs=0.02)
        assert SparsityPlan.from_pretrained(tmp_path / "out" / "plans" / row.key).record["search"]
    assert found.reference(found.at(0.5)).name == "searched"
    with pytest.raises(StoreMismatch, match="holds plans from the search in"):
        (tmp_path / "moved").symlink_to(record)
        copied = tmp_path / "copy"
        copied.mkdir()
        (copied / "search.sqlite").write_bytes((record / "search.sqlite").read_bytes())
        compare(pipe, tmp_path / "out", num_inference_steps=6, **asked | {"searched": copied})


# -- going on ----------------------------------------------------------------------------------------------------------


def test_a_second_run_makes_nothing_and_more_methods_add_rows(
    pipe: Any, comparison: tuple[Path, Comparison], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, found = comparison
    folder = shutil.copytree(whole, tmp_path / "copy")
    made_now: list[int] = []
    real = run.generate_clip
    monkeypatch.setattr(run, "generate_clip", lambda *a, **k: made_now.append(1) or real(*a, **k))
    assert compare(pipe, folder).rows == found.rows and not made_now
    more = compare(pipe, folder, methods=(*METHODS, "minference"))
    assert len(more.rows) == len(found.rows) + 1 and len(made_now) >= 2
    assert [row for row in more.rows if row.name != "minference"] == list(found.rows)


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"seeds": (2,)}, "seeds"), ({"guidance_scale": 1.5}, "guidance_scale"), ({"backend": "reference"}, "backend")],
)
def test_other_settings_in_the_same_folder_are_refused(
    pipe: Any, comparison: tuple[Path, Comparison], changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(StoreMismatch, match=rf"holds a comparison with other settings \({named}\)"):
        compare(pipe, comparison[0], **changes)


def test_another_plan_by_the_same_name_is_refused(pipe: Any, comparison: tuple[Path, Comparison]) -> None:
    with pytest.raises(StoreMismatch, match="holds clips of another plan by the name of mine"):
        compare(pipe, comparison[0], plans={"mine": preset("window")})


#: A comparison of the tiny pipeline in a process of its own, which says when a row's clip is stored.
COMPARE = """
    import sys
    from pathlib import Path

    from diffsparse.search.compare.api import compare_methods
    from diffsparse.search.compare.record import Record
    from tests.search.tiny import PROMPTS, SHAPE, build_pipeline

    real = Record.put_clip
    def told(self, *args):
        real(self, *args)
        print("clip", flush=True)
    Record.put_clip = told
    compare_methods(build_pipeline(), PROMPTS, out=sys.argv[1], methods=["subblock", "xattention"], densities=[0.7],
                    num_inference_steps=4, guidance_scale=3.0, seeds=[1], progress=False, **SHAPE)
    print("end", flush=True)
"""


def start(out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(COMPARE), str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


@pytest.mark.slow(reason="kills a comparison of the tiny model in a process of its own, and runs it again")
def test_killed_it_goes_on_and_another_process_is_refused_meanwhile(
    pipe: Any, tmp_path: Path, comparison: tuple[Path, Comparison]
) -> None:
    process = start(tmp_path / "out")
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(3)] == ["clip\n"] * 3
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(StoreLocked, match=rf"another comparison is running on .* \(process {process.pid} on "):
        compare(pipe, tmp_path / "out")
    process.kill()
    process.wait()
    again, _ = start(tmp_path / "out").communicate(timeout=300)
    assert again.splitlines() == ["clip", "end"]
    data = json.loads((tmp_path / "out" / "compare.json").read_text("utf-8"))
    wanted = {row.key: row for row in comparison[1].rows}
    for row in data["rows"]:
        assert row["state"] == "done"
        psnr = list(wanted[row["row"]].values("psnr").values())
        assert [clip["psnr"] for clip in row["clips"]] == pytest.approx(psnr)


def test_shards_make_their_parts_and_the_last_run_puts_them_together(
    pipe: Any, comparison: tuple[Path, Comparison], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for shard in ("1/2", "2/2"):
        part = compare(pipe, out, shard=shard)
        assert part.files == () and not (out / "compare.json").exists()
        mine = {row.key for row in part.rows if row.clips}
        assert mine == ({"plan-mine", "subblock-0.7", "vmoba-0.7"} if shard == "1/2" else {"xattention-0.7"})
    whole = compare(pipe, out)
    assert whole.complete and (out / "compare.json").is_file()
    for mine, theirs in zip(whole.rows, comparison[1].rows, strict=True):
        assert mine.values("psnr") == pytest.approx(theirs.values("psnr")) and mine.reason == theirs.reason
        # Each is timed alone at the end: with others beside it times say nothing.
        assert (mine.loop_seconds is None) == (theirs.loop_seconds is None)
        assert not any(clip["alone"] for clip in mine.clips.values())


def test_shards_share_the_list_of_clips_without_leaving_any_out() -> None:
    for count in (1, 2, 3, 5):
        shards = [Shard(i + 1, count) for i in range(count)]
        assert all(sorted(shard.rotated(7)) == list(range(7)) for shard in shards)
        assert [sum(shard.mine(place) for shard in shards) for place in range(11)] == [1] * 11
    assert str(Shard.parse("2/4")) == "2/4"
    for wrong in ("0/4", "5/4", "2", "a/b", "1/2/3", "-1/4", ""):
        with pytest.raises(BadInput, match="--shard"):
            Shard.parse(wrong)


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command(
    cli: Cli, once_loaded: None, prompts_file: Path, model_folder: Path, plan_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    line = ["compare", model_folder, "--prompts", prompts_file, "--methods", "subblock", "--densities", ".7"]
    line += ["--plan", plan_folder, "--seeds", 1, "--device", "cpu", "--no-lpips", "--out", out, *SHAPE_OPTIONS]
    code, printed, said = cli(*line, "--json")
    assert code == 0, said
    data = json.loads(printed)
    assert [row["row"] for row in data["rows"]] == ["plan-plan", "subblock-0.7"] and data["complete"]
    assert "2 inputs x 1 seeds, 2 rows: 4 of 4 clips are still to be made" in said
    code, printed, said = cli(*line)
    assert code == 0 and "at a density of 0.7" in printed and "0 of 4 clips" in said
    assert f"written: {out / 'compare.json'}" in printed


def test_without_lpips_it_says_so_once(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    said: list[str] = []
    found = compare(pipe, tmp_path / "out", methods=(), plans={"mine": make_plan()}, lpips=True, say=said.append)
    assert [line for line in said if "LPIPS" in line] == [
        "LPIPS needs the package lpips and its weights; pip install 'diffsparse[metrics]'"
    ]
    assert found.rows[0].mean("lpips") is None and "LPIPS" not in found.table()


def test_ctrl_c_says_how_to_go_on(
    cli: Cli,
    once_loaded: None,
    prompts_file: Path,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stopped(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "clip_report", stopped)
    line = ["compare", model_folder, "--prompts", prompts_file, "--methods", "subblock", "--densities", ".7"]
    code, printed, said = cli(*line, "--seeds", 1, "--device", "cpu", "--out", tmp_path / "out", *SHAPE_OPTIONS)
    assert code == 130 and printed == ""
    assert said.splitlines()[-1] == (
        "interrupted: what was finished is kept; run the same command again to go on from there"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "magic"], "--methods: there is no method 'magic'; use all, none, or window, radial,"),
        (["--densities", "1.5"], "--densities 1.5: shares of dense attention between 0 and 1"),
        (["--densities", "0"], "--densities 0: shares of dense attention between 0 and 1"),
        (["--densities", ".5,half"], "--densities .5,half: shares of dense attention with commas"),
        (["--from", "/no/such"], "'/no/such' holds no search.sqlite: give the folder that a search wrote"),
        (["--plan", "/no/such"], "no plan at '/no/such'"),
        (["--seeds", "0"], "--seeds 0: it must be at least 1"),
        (["--shard", "3/2"], "--shard 3/2: it is the number of a process and how many there are"),
        (["--methods", "none"], "there is nothing to compare: give methods, plans, or the folder of a search"),
        (["--prompts", "/no/such/file"], "no prompts file at '/no/such/file'"),
        (["--out", "/proc/none"], "cannot write to '/proc/none'"),
    ],
)
def test_mistakes_are_one_line_before_anything_runs(
    cli: Cli,
    once_loaded: None,
    model_folder: Path,
    prompts_file: Path,
    tmp_path: Path,
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "generate_clip", lambda *a, **k: pytest.fail("something ran"))
    line = ["compare", model_folder, "--prompts", prompts_file, "--device", "cpu", "--out", tmp_path / "out", *options]
    code, out, err = cli(*line)
    assert code == 2, err
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err, err


def test_a_search_of_another_model_is_refused(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fix_costs(monkeypatch)
    other = build_pipeline(layers=1)
    search_plan(
        other, PROMPTS, config(validation_prompts=0), tmp_path / "search", progress=False, say=lambda line: None
    )
    with pytest.raises(BadInput, match=r"the search in '.*search' is of another model: layers"):
        compare(pipe, tmp_path / "out", searched=tmp_path / "search")


def test_a_plan_of_another_model_is_refused(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="the plan is for another model"):
        compare(pipe, tmp_path / "out", plans={"mine": make_plan(layers=3)})
