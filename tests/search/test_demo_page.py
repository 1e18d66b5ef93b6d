"""The demo's logic without a browser, and the served page with every connection but loopback refused."""

from __future__ import annotations

import gc
import io
import json
import re
import stat
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import diffsparse
from diffsparse.search.demo.generate import Request, Update, duration, explain, generate
from diffsparse.search.demo.inspector import PlanView
from diffsparse.search.demo.launch import _uncollected, bundled_model, serving
from diffsparse.search.demo.live import Cancelled, Made, Step, denoise
from diffsparse.search.demo.preview import Previewer
from diffsparse.search.demo.search_plan import SearchUpdate, search_updates
from diffsparse.search.demo.sessions import Job, Session, Sessions
from diffsparse.search.demo.studio import (
    CONSERVATIVE,
    RADIAL,
    SEARCHED_HERE,
    SHIPPED,
    UPLOADED,
    WINDOW,
    Studio,
)
from diffsparse.search.demo.upload import MAX_FILES, PLAN_FILES, read_uploaded_plan, unpack_plan, write_plan_zip
from diffsparse.search.errors import BadInput
from diffsparse.search.generate import GenerationSettings, generate_clip
from diffsparse.search.measured import ATTENTION_NAME, HeadFigures, plan_digest
from tests.helpers.process import ROOT, heed_ctrl_c
from tests.search.plans import make_plan
from tests.search.tiny import PROMPTS, SHAPE, fix_costs
from tests.tolerance import MODEL, assert_near

SETTINGS = GenerationSettings(num_inference_steps=3, guidance_scale=3.0, **SHAPE)


@pytest.fixture
def sessions(tmp_path: Path) -> Iterator[Sessions]:
    found = Sessions(tmp_path)
    yield found
    found.close()


@pytest.fixture
def session(sessions: Sessions) -> Session:
    return sessions.of("one")


@pytest.fixture
def studio(pipe: Any, plan_folder: Path) -> Studio:
    plan = make_plan()
    return Studio(pipe, "tiny", PROMPTS, PROMPTS, PlanView.of(plan, "the plan", plan_folder))


def request(**changes: Any) -> Request:
    return replace(Request(PROMPTS[0], seed=1, steps=3, plan=SHIPPED, **SHAPE), **changes)


def updates(studio: Studio, session: Session, asked: Request) -> list[Update]:
    return list(generate(studio, session, session.begin(), asked))


# -- uploads -----------------------------------------------------------------------------------------------------------


def plan_files() -> dict[str, bytes]:
    return make_plan().to_files()


def zipped(path: Path, files: dict[str, bytes] | list[tuple[Any, bytes]], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items() if isinstance(files, dict) else files:
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("prefix", ["", "plan/", "a/b/"])
def test_a_plan_comes_back_from_its_zip(tmp_path: Path, prefix: str) -> None:
    files = {prefix + name: content for name, content in plan_files().items()}
    files |= {prefix + "search.sqlite": b"not wanted", prefix + "more/": b"", "__MACOSX/x": b""}
    into = tmp_path / "into"
    into.mkdir()
    plan = read_uploaded_plan(zipped(tmp_path / "plan.zip", files), into)
    assert plan.to_files() == plan_files()
    assert {path.name for path in into.iterdir()} <= set(PLAN_FILES)


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


def overlapping() -> bytes:
    """A zip whose two entries are the same bytes: the trick of bombs that need no nesting."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("sparse_plan.json", bytes(10_000))
        archive.writestr("sparse_plan.safetensors", bytes(10_000))
    data = bytearray(buffer.getvalue())
    second = data.rfind(b"PK\x01\x02")
    data[second + 42 : second + 46] = (0).to_bytes(4, "little")
    return bytes(data)


def lying(size: int) -> bytes:
    """A zip that unpacks to more than it says."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("sparse_plan.json", bytes(size))
    data = bytearray(buffer.getvalue())
    directory = data.rfind(b"PK\x01\x02")
    data[directory + 24 : directory + 28] = (100).to_bytes(4, "little")
    return bytes(data)


def encrypted() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("sparse_plan.json", b"{}")
    data = bytearray(buffer.getvalue())
    data[data.rfind(b"PK\x01\x02") + 8] |= 1
    return bytes(data)


def odd_attention() -> bytes:
    """Measured attention without a number among its errors."""
    from safetensors.numpy import save

    shape = make_plan().index.shape
    arrays = {"pooled": np.ones((*shape, 9, 9)), "error": np.full(shape, np.nan), "kept_mass": np.ones(shape)}
    about = {"grid": "3,12,12", "block_size": "64", "orders": "{}", "plan": plan_digest(make_plan())}
    return bytes(save(arrays, metadata=about))


BAD_ZIPS: list[tuple[str, Callable[[Path], Path], str]] = [
    ("no_zip", lambda p: _bytes(p, b"hello"), "not a zip file"),
    ("empty", lambda p: _bytes(p, b""), "not a zip file"),
    ("no_plan", lambda p: zipped(p, {"cat.png": b"x"}), "not a plan: it has no sparse_plan.json"),
    ("no_json", lambda p: zipped(p, {"sparse_plan.json": b"{"}), "not valid JSON"),
    ("not_utf8", lambda p: zipped(p, {"sparse_plan.json": b"\xff\xfe\xff"}), "not valid JSON"),
    ("nested_json", lambda p: zipped(p, {"sparse_plan.json": b"[" * 200_000}), "not valid JSON"),
    ("other_json", lambda p: zipped(p, {"sparse_plan.json": b"{}"}), "not a sparsity plan"),
    ("up", lambda p: zipped(p, {"../sparse_plan.json": b"{}"}), "leads outside"),
    ("up_inside", lambda p: zipped(p, {"a/../../sparse_plan.json": b"{}"}), "leads outside"),
    ("backslash", lambda p: zipped(p, {"..\\sparse_plan.json": b"{}"}), "leads outside"),
    ("absolute", lambda p: zipped(p, {"/tmp/sparse_plan.json": b"{}"}), "leads outside"),
    ("drive", lambda p: zipped(p, {"C:\\sparse_plan.json": b"{}"}), "leads outside"),
    ("link", lambda p: zipped(p, [(link("sparse_plan.json"), b"/etc/passwd")]), "a link"),
    ("link_beside", lambda p: zipped(p, [("sparse_plan.json", b"{}"), (link("x"), b"/etc")]), "a link"),
    ("encrypted", lambda p: _bytes(p, encrypted()), "encrypted"),
    ("lzma", lambda p: zipped(p, {"sparse_plan.json": b"{}"}, zipfile.ZIP_LZMA), "another way than deflate"),
    ("many", lambda p: zipped(p, {f"{i}": b"" for i in range(MAX_FILES + 1)}), "holds 65 files"),
    ("two", lambda p: zipped(p, {"a/sparse_plan.json": b"{}", "b/sparse_plan.json": b"{}"}), "2 plans"),
    ("bomb", lambda p: zipped(p, {"sparse_plan.json": bytes(20_000_000)}), "unpacks to more than 16 MiB"),
    ("lying_bomb", lambda p: _bytes(p, lying(20_000_000)), "damaged|unpacks to more than"),
    ("overlap", lambda p: _bytes(p, overlapping()), "damaged"),
    ("cut", lambda p: _bytes(p, zipped(p, plan_files()).read_bytes()[200:]), "damaged|not a zip"),
    ("large_json", lambda p: zipped(p, {"sparse_plan.json": b" " * 9_000_000}), "at most 8 MiB"),
    (
        "grid",
        lambda p: zipped(p, {"sparse_plan.json": b'{"a": [{"grid": [99999, 99999, 99999]}]}'}),
        "at most 200,000",
    ),
    ("torn_attention", lambda p: zipped(p, {**plan_files(), ATTENTION_NAME: b"torn"}), "^attention.+cannot be read"),
    ("odd_attention", lambda p: zipped(p, {**plan_files(), ATTENTION_NAME: odd_attention()}), "cannot be read"),
    ("grid_kind", lambda p: zipped(p, {"sparse_plan.json": b'{"grid": ["x"]}'}), "no model has"),
]


def _bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(("make", "message"), [case[1:] for case in BAD_ZIPS], ids=[case[0] for case in BAD_ZIPS])
def test_bad_zips_get_a_line_and_leave_nothing_outside(
    studio: Studio, session: Session, tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    kept = studio.take_upload(zipped(tmp_path / "good.zip", plan_files()), session)
    file = make(tmp_path / "upload.zip")
    before = {path for path in tmp_path.rglob("*") if session.folder not in path.parents}
    with pytest.raises(BadInput, match=message) as caught:
        studio.take_upload(file, session)
    text = explain(caught.value)
    assert "\n" not in text and str(tmp_path) not in text
    assert {path for path in tmp_path.rglob("*") if session.folder not in path.parents} == before
    assert {path.name for path in session.folder.rglob("*") if path.is_file()} <= set(PLAN_FILES)
    assert session.uploaded is kept


def test_the_zip_of_a_duplicate_name_is_refused(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate"):
        file = zipped(tmp_path / "x.zip", [("sparse_plan.json", b"{}"), ("sparse_plan.json", b"{}")])
    with pytest.raises(BadInput, match="twice"):
        unpack_plan(file, tmp_path)


def test_a_plan_for_another_architecture(studio: Studio, session: Session, tmp_path: Path) -> None:
    file = zipped(tmp_path / "x.zip", make_plan(layers=3).to_files())
    with pytest.raises(BadInput, match="for another model: layers: the plan has 3, the model 2"):
        studio.take_upload(file, session)
    assert session.uploaded is None


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ({"grid": "900x900x900"}, "729,000,000 tokens"),
        ({"grid": 7}, None),
        ({"grid": "a\nb"}, None),
    ],
)
def test_a_record_cannot_ask_for_a_huge_grid(
    studio: Studio, session: Session, tmp_path: Path, calibration: dict[str, Any], message: str | None
) -> None:
    files = make_plan().to_files()
    content = json.loads(files["sparse_plan.json"]) | {"record": {"calibration": calibration}}
    file = zipped(tmp_path / "x.zip", files | {"sparse_plan.json": json.dumps(content).encode()})
    if message is None:
        assert studio.take_upload(file, session).grid.num_visual > 0
    else:
        with pytest.raises(BadInput, match=message):
            studio.take_upload(file, session)


# -- sessions ----------------------------------------------------------------------------------------------------------


def test_sessions_share_nothing(sessions: Sessions) -> None:
    one, two = sessions.of("one"), sessions.of("two")
    assert one is sessions.of("one") and one is not two and one.folder != two.folder
    job = one.begin()
    assert not two.cancel() and not job.cancelled.is_set()
    newer = one.begin()
    assert job.cancelled.is_set() and not newer.cancelled.is_set()
    one.done(job)
    assert one.job is newer
    folder = one.new_folder()
    sessions.end("one")
    assert newer.cancelled.is_set() and not folder.exists() and two.folder.exists()
    assert len(sessions) == 1


# -- generating --------------------------------------------------------------------------------------------------------


def test_a_generation_from_the_first_step_to_the_figures(studio: Studio, session: Session) -> None:
    found = updates(studio, session, request())
    assert [u.kind for u in found[:-1]] == ["busy"] * (len(found) - 1) and found[-1].kind == "done", found[-1].message
    fractions = [u.fraction for u in found]
    assert fractions == sorted(fractions) and fractions[-1] == 1
    assert any(re.fullmatch(r"dense: step 1 of 3, at most .+ left", u.message) for u in found)
    assert any(u.message.startswith("sparse: step 2 of 3") for u in found)
    for side in ("dense", "sparse"):
        pictures = [picture for u in found if (picture := getattr(u, side)) is not None]
        assert len(pictures) >= 2  # while it is denoised, and at the end
        assert all(p.dtype == np.uint8 and p.shape == (48, 48, 3) for p in pictures)
    comparison = found[-1].comparison
    assert comparison is not None and comparison is session.comparison and session.job is None
    rows = dict(comparison.rows)
    assert re.fullmatch(r"\d+\.\d\dx", rows["speed-up of the denoising loop"])
    assert rows["PSNR to dense"].endswith("dB") and 0 < float(rows["SSIM to dense"]) <= 1
    assert 0 < float(rows["attention computed, whole trajectory"].split()[0]) < 1
    assert comparison.sheet().width > 100 and comparison.frame(3).width > 100
    if comparison.video is not None:
        assert session.folder in comparison.video.parents and comparison.video.stat().st_size > 1000


def test_both_clips_are_what_the_pipeline_makes(studio: Studio, session: Session) -> None:
    comparison = updates(studio, session, request())[-1].comparison
    assert comparison is not None
    settings = GenerationSettings(3, studio.defaults().guidance_scale, **SHAPE)
    assert torch.equal(comparison.dense.clip.frames, generate_clip(studio.pipe, PROMPTS[0], 1, settings).frames)
    with diffsparse.sparse_attention(studio.pipe, make_plan()):
        sparse = generate_clip(studio.pipe, PROMPTS[0], 1, settings).frames
    assert torch.equal(comparison.sparse.clip.frames, sparse)
    assert not diffsparse.sparse_attention_summary(studio.pipe).enabled


def test_a_dense_clip_is_made_once(studio: Studio, session: Session) -> None:
    first = updates(studio, session, request())[-1].comparison
    again = updates(studio, session, request(plan=CONSERVATIVE))
    assert not any(u.message.startswith("dense: step") for u in again)
    assert first is not None and again[-1].comparison is not None
    assert again[-1].comparison.dense is first.dense
    other = updates(studio, session, request(seed=2, plan=CONSERVATIVE))
    assert any(u.message.startswith("dense: step") for u in other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "  \n"}, "the prompt is empty"),
        ({"prompt": None}, "the prompt is empty"),
        ({"prompt": "x" * 2001}, "2,001 characters; at most 2,000"),
        ({"seed": -1}, "the seed must be from 0"),
        ({"seed": 1.5}, "the seed must be a whole number"),
        ({"seed": None}, "the seed must be a whole number"),
        ({"steps": 0}, "the number of steps must be from 1 to 100, got 0"),
        ({"steps": 10**9}, "the number of steps must be from 1 to 100"),
        ({"steps": float("nan")}, "must be a whole number"),
        ({"height": 48_000}, "height must be from 1 to 16,384"),
        ({"height": 16_000, "width": 16_000}, "more than this demo takes"),
        ({"height": 50}, "height 50: this model takes multiples of 16, for example 48 or 64"),
        ({"num_frames": 10}, "frames: 10: this model takes 4k+1 frames"),
        ({"guidance": float("inf")}, "guidance must be a number from 0 to 50"),
        ({"plan": UPLOADED}, "no plan was uploaded yet"),
        ({"plan": "../../x"}, "no plan '../../x'"),
        ({"plan": None}, "no plan 'None'"),
        ({"plan": WINDOW, "density": 0}, "the density is a share above 0"),
        ({"plan": RADIAL, "density": "x"}, "the density is a share above 0"),
    ],
)
def test_bad_input_is_one_line(studio: Studio, session: Session, changes: dict[str, Any], message: str) -> None:
    found = updates(studio, session, request(**changes))
    assert [u.kind for u in found] == ["error"]
    assert message in found[0].message and "\n" not in found[0].message and "--" not in found[0].message
    assert session.job is None


def test_what_fails_inside_is_logged_and_named_without_a_traceback(
    studio: Studio, session: Session, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("a secret of the machine")

    monkeypatch.setattr("diffsparse.search.demo.live.generate_clip", fail)
    last = updates(studio, session, request())[-1]
    assert last.kind == "error" and "ZeroDivisionError" in last.message and "secret" not in last.message
    assert "a secret of the machine" in caplog.text
    monkeypatch.undo()
    assert updates(studio, session, request())[-1].kind == "done"  # nothing is left locked


def test_cancelling(studio: Studio, session: Session) -> None:
    job = session.begin()
    found: list[Update] = []
    for update in generate(studio, session, job, request(steps=50)):
        found.append(update)
        if "step 2" in update.message:
            assert session.cancel() and not session.cancel()
    assert found[-1].kind == "stopped" and len(found) < 10
    assert session.comparison is None and not studio.lock.locked()
    assert not diffsparse.sparse_attention_summary(studio.pipe).enabled
    waiting = session.begin()
    session.cancel()
    assert [u.kind for u in generate(studio, session, waiting, request())] == ["stopped"]


def test_a_page_that_goes_away_frees_the_model(studio: Studio, sessions: Sessions) -> None:
    leaving = sessions.of("leaving")
    events = generate(studio, leaving, leaving.begin(), request(steps=50))
    while "step 1" not in next(events).message:
        pass
    sessions.end("leaving")  # and nobody asks the generator for more
    other = sessions.of("other")
    assert updates(studio, other, request())[-1].kind == "done"
    events.close()


def test_a_closed_generator_stops_its_thread(studio: Studio) -> None:
    job = Job()
    events = denoise(studio.pipe, None, PROMPTS[0], 0, replace(SETTINGS, num_inference_steps=50), job, studio.lock)
    assert isinstance(next(events), Step)
    events.close()  # type: ignore[attr-defined]
    assert job.cancelled.is_set() and not studio.lock.locked()
    with pytest.raises(Cancelled):
        list(denoise(studio.pipe, None, PROMPTS[0], 0, SETTINGS, job, studio.lock))


def test_two_users_at_once_each_get_their_own_clip(studio: Studio, sessions: Sessions) -> None:
    wanted = {"one": (1, SHIPPED), "two": (2, WINDOW)}
    results: dict[str, Update] = {}

    def use(key: str) -> None:
        seed, plan = wanted[key]
        results[key] = updates(studio, sessions.of(key), request(seed=seed, plan=plan, density=0.5))[-1]

    threads = [threading.Thread(target=use, args=(key,)) for key in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for key, (seed, plan) in wanted.items():
        together = results[key].comparison
        assert together is not None, results[key].message
        alone = updates(studio, sessions.of(f"{key} alone"), request(seed=seed, plan=plan, density=0.5))[-1].comparison
        assert alone is not None
        assert torch.equal(together.dense.clip.frames, alone.dense.clip.frames)
        assert torch.equal(together.sparse.clip.frames, alone.sparse.clip.frames)
        assert together is sessions.of(key).comparison


def test_previews_show_the_clean_clip_and_keep_to_their_share(pipe: Any) -> None:
    now = 0.0

    class Clock:
        calls = 0

        def __call__(self) -> float:
            nonlocal now
            now += 1.0  # every preview takes a second or two by this clock
            return now

    seen: list[torch.Tensor] = []
    found: list[bool] = []
    watch = Previewer(pipe, Clock())

    def on_step(step: int, latents: torch.Tensor) -> None:
        seen.append(watch._clean(step, watch._before, latents))
        found.append(watch.frame(step, latents) is not None)

    made = generate_clip(pipe, PROMPTS[0], 0, replace(SETTINGS, num_inference_steps=8), on_step=on_step)
    assert made.frames.shape[0] == 9 and len(seen) == 8
    # The last step ends without noise: what the model has in mind is then the latents themselves.
    last = watch._before
    assert last is not None
    assert_near(seen[-1], last.float(), MODEL)
    # From one straight step to the next the noise shrinks, and the clean clip, which is extrapolated, stays near.
    assert float((seen[-2] - seen[-1]).norm()) < float((seen[0] - seen[-1]).norm())
    assert found[0] and not all(found) and watch.known


def test_times_leave_out_the_previews(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    original = Previewer.frame

    def slow(self: Previewer, step: int, latents: torch.Tensor) -> Any:
        time.sleep(0.5)
        self.seconds += 0.5
        return original(self, step, latents)

    monkeypatch.setattr(Previewer, "frame", slow)
    events = list(denoise(studio.pipe, None, PROMPTS[0], 0, SETTINGS, Job(), studio.lock))
    made = events[-1]
    assert isinstance(made, Made) and 0 < made.clip.loop_seconds < 0.9 and made.clip.seconds > made.clip.loop_seconds


def test_the_density_slider_moves_the_ready_made_plans(studio: Studio, session: Session) -> None:
    grid = studio.grid(SETTINGS)
    assert grid is not None and grid.shape == (3, 12, 12)
    for name in (WINDOW, RADIAL):
        densities = [
            float(studio.plan(name, wanted, session, SETTINGS).call_densities(grid).mean())
            for wanted in (0.05, 0.4, 0.7, 1.0)
        ]
        assert densities == sorted(densities) and densities[0] < densities[-1]


def test_durations() -> None:
    assert [duration(s) for s in (-1, 0.6, 59, 61, 3600, 7260)] == [
        "0 s", "1 s", "59 s", "1 min 1 s", "1 h 0 min", "2 h 1 min",
    ]  # fmt: skip


# -- searching ---------------------------------------------------------------------------------------------------------


def test_a_search_is_cancelled_goes_on_and_loads_its_plan(
    studio: Studio, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    fix_costs(monkeypatch)
    asked = ("\n".join(PROMPTS), 0.6, 3)
    with pytest.raises(BadInput, match="no search has ended"):
        studio.view(SEARCHED_HERE, session)
    first: list[SearchUpdate] = []
    for update in search_updates(studio, session, session.begin(), *asked):
        first.append(update)
        if update.message.startswith("sensitivity: 1 of"):
            session.cancel()
    assert first[-1].kind == "stopped" and session.searched is None and not studio.lock.locked()
    assert not any("schedule" in update.message for update in first)
    second = list(search_updates(studio, session, session.begin(), *asked))
    assert second[-1].kind == "done", second[-1].message
    texts = [update.message for update in second]
    assert texts[0] == "going on with the search" and not any(text.startswith("trace") for text in texts)
    assert any(re.fullmatch(r"assign: 1 of 1, took .+", line) for line in second[-1].lines)
    found = studio.view(SEARCHED_HERE, session)
    assert found is session.searched and found is second[-1].view
    assert found.attention is not None and found.pictures(0, 0, 0)[0] is not None
    facts = dict(found.facts(0, 0, 0))
    assert "predicted" in facts["error of the plan"] and "as the search predicts" in facts["error of the head"]
    assert updates(studio, session, request(plan=SEARCHED_HERE))[-1].kind == "done"


@pytest.mark.parametrize(
    ("prompts", "budget", "steps", "message"),
    [
        ("", 0.4, 3, "there is no prompt"),
        (None, 0.4, 3, "there is no prompt"),
        ("\n".join(map(str, range(17))), 0.4, 3, "17 prompts are more than this demo takes"),
        ("x", 0, 3, "a share in"),
        ("x", "a", 3, "the budget is a share"),
        ("x", 0.4, 0, "the number of steps must be from 1"),
    ],
)
def test_bad_searches_are_one_line(
    studio: Studio, session: Session, prompts: Any, budget: Any, steps: Any, message: str
) -> None:
    found = list(search_updates(studio, session, session.begin(), prompts, budget, steps))
    assert [update.kind for update in found] == ["error"] and message in found[0].message


# -- inspecting --------------------------------------------------------------------------------------------------------


def with_attention(folder: Path, shape: tuple[int, ...] = (2, 2, 2, 9, 9)) -> Path:
    from safetensors.numpy import save_file

    pooled = np.random.default_rng(0).random(shape, np.float32).astype(np.float16)
    orders = {layer: ["tile(1,8,8)"] * 2 for layer in make_plan().layers}
    metadata = {"grid": "3,12,12", "block_size": "64", "orders": json.dumps(orders), "phases": "2"}
    save_file({"pooled": pooled}, folder / "attention.safetensors", metadata=metadata)
    return folder


@pytest.fixture
def view(tmp_path: Path) -> PlanView:
    plan = make_plan()
    return PlanView.of(plan, "a plan", with_attention(plan.save_pretrained(tmp_path / "plan")))


def test_the_grid_of_all_heads(view: PlanView) -> None:
    text = view.overview(1, 1, 0)
    buttons = re.findall(r'<button [^>]*data-layer="(\d)" data-head="(\d)"[^>]*aria-pressed="(\w+)"', text)
    assert buttons == [("0", "0", "false"), ("0", "1", "false"), ("1", "0", "true"), ("1", "1", "false")]
    for layer in range(2):
        for head in range(2):
            assert f"density {view.at(1, layer, head).density:.3f}" in text
    assert view.at(0, 0, 1).density == 1 and view.at(1, 1, 1).density < 0.2  # dense; skip
    assert "skip (1)" in text and "dense (1)" in text and "window (2)" in text


def test_one_head(view: PlanView) -> None:
    attention, mask = view.pictures(0, 1, 1)
    assert attention is not None and attention.size == mask.size and attention.tobytes() != mask.tobytes()
    facts = dict(view.facts(0, 1, 1))
    assert facts["order"] == "raster" and facts["tail"] == "none" and facts["family"] == "window"
    assert "tile(1,8,8)" in facts["pictures' axes"]  # what was measured is drawn in the order that it was measured in
    kept = float(facts["kept mass"].split()[0])
    assert 0 < kept < 1
    assert facts["cost of the head"] == "not recorded" and facts["error of the plan"] == "not recorded"
    assert float(dict(view.facts(0, 0, 1))["kept mass"].split()[0]) == 1  # a dense head
    assert float(dict(view.facts(1, 1, 1))["kept mass"].split()[0]) == 0  # one that is left out


def test_the_error_of_a_head_is_shown_where_the_search_recorded_it(view: PlanView, tmp_path: Path) -> None:
    assert dict(view.facts(0, 1, 1))["error of the head"] == "not recorded"
    assert view.attention is not None
    shape = view.plan.index.shape
    error, kept = np.arange(8).reshape(shape) / 8, np.full(shape, 0.125)
    attention = view.attention
    attention.figures = HeadFigures(error, kept, plan_digest(view.plan))
    attention.save(tmp_path / "plan")
    found = PlanView.of(view.plan, "a plan", tmp_path / "plan")
    facts = dict(found.facts(0, 1, 1))
    assert facts["error of the head"] == "0.38 of its output (squared), as the search predicts"
    assert facts["kept mass"] == "0.125 of the attention"
    assert "not recorded" not in {dict(found.facts(*at))["error of the head"] for at in np.ndindex(shape)}
    into = tmp_path / "into"
    into.mkdir()
    again = PlanView.of(read_uploaded_plan(found.write_zip(tmp_path), into), "from its zip", into)
    assert again.facts(0, 1, 1) == found.facts(0, 1, 1)
    other = replace(view.plan, index=view.plan.index[:, ::-1].copy())
    shown = PlanView.of(other, "another", tmp_path / "plan")
    assert shown.attention is not None and dict(shown.facts(0, 1, 1))["error of the head"] == "not recorded"


def test_recorded_cost_and_error_are_shown(view: PlanView) -> None:
    share = {tail: [0.1, 0.2, 0.4, 0.7] for tail in ("none", "mean", "moments", "centroids")}
    costs = {"device": "a machine", "dense_seconds": 1.0, "densities": [0.02, 0.1, 0.3, 0.6], "share": share}
    record = {"costs": costs, "search": {"predicted_error": 12.5}, "quality": {"psnr_mean": 30.0}}
    shown = dict(replace(view, plan=replace(view.plan, record=record)).facts(0, 1, 1))
    assert re.fullmatch(r"0\.\d\d of a dense head, by the times measured on a machine", shown["cost of the head"])
    assert "12.5 predicted" in shown["error of the plan"] and "30.0 dB" in shown["error of the plan"]
    broken = dict(replace(view, plan=replace(view.plan, record={"costs": {"share": 3}})).facts(0, 1, 1))
    assert "cannot be read" in broken["cost of the head"]


def test_without_measured_attention_the_mask_alone_is_shown(tmp_path: Path) -> None:
    plan = make_plan()
    folder = plan.save_pretrained(tmp_path / "plan")
    assert PlanView.of(plan, "x", folder).pictures(0, 0, 0)[0] is None
    with_attention(folder, (1, 2, 2, 9, 9))  # measured for another number of phases
    other = PlanView.of(plan, "x", folder)
    assert other.attention is None and "not known" in dict(other.facts(0, 0, 0))["kept mass"]


@pytest.mark.parametrize("chosen", [(2, 0, 0), (0, 2, 0), (0, 0, -1), (0, "1", 0), (None, 0, 0), (0, True, 0)])
def test_heads_that_are_not_there(view: PlanView, chosen: tuple[Any, Any, Any]) -> None:
    with pytest.raises(BadInput, match=r"this plan has (phase|layer|head)s 0 to 1"):
        view.check(*chosen)


def test_steps_name_their_phase(view: PlanView) -> None:
    levels = [1.0, 0.8, 0.4]
    assert [view.step(levels, i)[0] for i in (1, 2, 3)] == [None, 0, 1]
    assert view.step(levels, 1)[1] == "step 1 of 3: noise level 1.000, dense"
    with pytest.raises(BadInput, match="steps 1 to 3"):
        view.step(levels, 4)


def test_the_trajectory_is_the_schedulers(studio: Studio) -> None:
    levels, own = studio.trajectory(3)
    made = generate_clip(studio.pipe, PROMPTS[0], 0, SETTINGS)
    assert own and levels == pytest.approx(made.noise_levels)


def test_names_from_a_plan_are_shown_as_text(studio: Studio) -> None:
    plan = make_plan()
    bad = "<img src=x onerror=alert(1)>"
    renamed = replace(plan, layers=(bad, plan.layers[1]), architecture=None)
    text = PlanView.of(renamed, bad, None).overview(0)
    assert "<img" not in text and "&lt;img" in text


def test_a_plan_downloads_as_the_zip_that_can_be_uploaded(
    view: PlanView, studio: Studio, session: Session, tmp_path: Path
) -> None:
    taken = studio.take_upload(view.write_zip(tmp_path), session)
    assert taken.plan.to_files() == view.plan.to_files()
    assert taken.attention is not None and view.attention is not None
    assert np.array_equal(taken.attention.pooled, view.attention.pooled)
    again = write_plan_zip(view.plan, tmp_path / "again.zip")
    assert again.read_bytes() == write_plan_zip(view.plan, tmp_path / "more.zip").read_bytes()


@pytest.mark.parametrize("name", [SHIPPED, CONSERVATIVE, WINDOW, RADIAL])
def test_every_choice_can_be_looked_into(studio: Studio, session: Session, name: str) -> None:
    view = studio.view(name, session)
    assert "<button" in view.overview(0)
    assert view.pictures(0, 0, 0)[1].size == (480, 480)
    assert dict(view.facts(0, 0, 0))["density of a call, tail counted"]
    with pytest.raises(BadInput, match="no plan was uploaded"):
        studio.view(UPLOADED, session)


# -- starting ----------------------------------------------------------------------------------------------------------


def test_without_the_clone_it_says_how_to_name_a_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert Path(bundled_model()) == ROOT / "examples" / "tiny_wan"
    monkeypatch.setattr(diffsparse, "__file__", str(tmp_path / "diffsparse" / "__init__.py"))
    with pytest.raises(BadInput, match="diffsparse demo --model"):
        bundled_model()


def test_without_gradio_it_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(BadInput, match=r"pip install 'diffsparse\[demo\]'"), serving(None):
        pass


def test_garbage_is_looked_for_again_after_the_start_and_after_one_that_failed() -> None:
    assert gc.isenabled()
    try:
        with pytest.raises(BadInput), _uncollected():
            assert not gc.isenabled()
            raise BadInput("no such model")
        assert gc.isenabled() and gc.get_freeze_count() == 0
        with _uncollected():
            pass
        assert gc.isenabled() and gc.get_freeze_count() > 1000
        gc.disable()
        with _uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.unfreeze()
        gc.enable()


needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="needs gradio (the extra demo)")


@needs_gradio
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "0"], "--port 0: a port is a number from 1 to 65535"),
        (["--model", "no/such/model"], "no model at 'no/such/model'"),
        (["--device", "abacus"], "unknown device 'abacus'"),
    ],
)
def test_the_command_refuses_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    from diffsparse.search.cli import main

    with pytest.raises(SystemExit) as stopped:
        main(["demo", *arguments])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and last.startswith("error: ") and message in last


@needs_gradio
def test_a_port_that_is_taken_or_none(studio: Studio) -> None:
    import socket

    with pytest.raises(BadInput, match="a port is a number"), serving(studio, 99_999):
        pass
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(BadInput, match=f"--port {port}: it is taken"), serving(studio, port):
            pass


# Run in a process of its own: every connection but to this machine is refused, and counted.
OFFLINE = """
import dataclasses, ipaddress, json, socket, sys, threading, time, urllib.request
refused = []
connect, resolve = socket.socket.connect, socket.getaddrinfo

def local(host):
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("localhost", None, "")

def only_local(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and not local(address[0]):
        refused.append(str(address))
        raise OSError(101, "the test allows no network")
    return connect(self, address)

def resolve_local(host, *args, **kwargs):
    if not local(host if not isinstance(host, bytes) else host.decode()):
        refused.append(str(host))
        raise socket.gaierror(-3, "the test allows no network")
    return resolve(host, *args, **kwargs)

socket.socket.connect, socket.getaddrinfo = only_local, resolve_local
from pathlib import Path
from diffsparse.search.demo.generate import Request, generate
from diffsparse.search.demo.launch import serve
from diffsparse.search.demo.search_plan import search_updates
from diffsparse.search.demo.sessions import Session
from diffsparse.search.demo.studio import Studio

from diffsparse.entry import TAILS
from diffsparse.kernels.costs import CostTable
from diffsparse.search.stages import compose

costs = CostTable.of_call("cpu", 1.0, (0.02, 0.1, 0.3, 0.6), {tail: (0.1, 0.2, 0.4, 0.7) for tail in TAILS})
compose.measure_costs = lambda *args: costs  # calls this small take so little time that measured ones are noise

stop, told = threading.Event(), []

def use():
    studio, session = Studio.open(sys.argv[1]), Session(Path(sys.argv[2]))
    size = dict(height=48, width=48, num_frames=9)
    studio.defaults = lambda: dataclasses.replace(Studio.defaults(studio), **size)
    asked = Request("a red circle", steps=2, plan="conservative", **size)
    made = list(generate(studio, session, session.begin(), asked))
    found = list(search_updates(studio, session, session.begin(), "a red circle", 0.9, 2))
    looked = session.searched is not None and session.searched.overview(0)
    return [made[-1].kind, found[-1].kind, bool(looked)]

def say(text):
    told.append(text)
    if "http" not in text:
        return
    address = text.split()[4]
    page = urllib.request.urlopen(address, timeout=60).read().decode()
    config = json.load(urllib.request.urlopen(address + "config", timeout=60))
    try:
        urllib.request.urlopen(address + "gradio_api/file=/etc/passwd", timeout=60)
        outside = "read"
    except urllib.error.HTTPError as error:
        outside = error.code
    used = use()
    time.sleep(1)
    print(json.dumps({"used": used, "page": len(page), "labels": [c["props"].get("label") for c in
          config["components"]], "analytics": config.get("analytics_enabled"), "address": address,
          "refused": refused, "outside": outside}))
    stop.set()

serve(sys.argv[1], say=say, until=stop)
"""


@needs_gradio
def test_the_demo_works_without_a_network(model_folder: Path, tmp_path: Path) -> None:
    """The page is served, a pair is generated, a plan is searched and looked into."""
    import os

    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "HF_HUB_OFFLINE"))}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(model_folder), str(tmp_path)],
        cwd=ROOT,
        env={**kept, "PYTHONPATH": os.pathsep.join([str(ROOT), kept.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["refused"] == [] and found["used"] == ["done", "done", True]
    assert found["address"].startswith("http://127.0.0.1:")
    assert found["analytics"] is False
    assert {"Prompt", "Plan", "Seed", "Steps", "dense", "sparse", "Phase", "Layer", "Head"} <= set(found["labels"])
    assert found["page"] > 1000 and found["outside"] in (403, 404)


@needs_gradio
@pytest.mark.parametrize("path", ["/etc/passwd", "../../../../../etc/passwd", str(ROOT / "pyproject.toml")])
def test_a_file_that_was_not_uploaded_is_not_read(studio: Studio, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a page would never send: the upload's answer with a path of its own choosing."""
    taken: list[Any] = []
    monkeypatch.setattr(Studio, "take_upload", lambda self, file, session: taken.append(file))
    with serving(studio) as address:
        config = json.load(urllib.request.urlopen(address + "config", timeout=60))
        kinds = {component["id"]: component["type"] for component in config["components"]}
        (upload,) = [d for d in config["dependencies"] if [kinds[i] for i in d["inputs"]] == ["file"]]
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        body = {"data": [file], "fn_index": upload["id"], "session_hash": "somebody"}
        asked = urllib.request.Request(
            address + "gradio_api/queue/join", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        urllib.request.urlopen(asked, timeout=60)
        answers = urllib.request.urlopen(address + "gradio_api/queue/data?session_hash=somebody", timeout=60)
        last = next(line for line in answers if b"process_completed" in line).decode()
        assert json.loads(last.removeprefix("data: "))["success"] is False
        assert not taken and "root:" not in last and str(ROOT) not in last and "Traceback" not in last
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(address + "gradio_api/file=" + path, timeout=60)
        assert refused.value.code in (403, 404)


@needs_gradio
@pytest.mark.slow(reason="starts the demo twice, libraries and all")
@pytest.mark.timed
@pytest.mark.parametrize("command", [["-m", "diffsparse.search", "demo"], [str(ROOT / "examples" / "gradio_demo.py")]])
def test_it_starts_within_15_seconds(command: list[str]) -> None:
    """On the bundled model, from the first line of Python to a page that answers; ended by Ctrl-C.

    What it is doing is said at once, before anything heavy is imported.
    """
    import os
    import signal
    import time

    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    seconds, silent = [], []
    for _ in range(2):  # the first one may have to read the libraries from a cold disk
        start = time.perf_counter()
        running = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={**kept, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=heed_ctrl_c,
        )
        try:
            assert running.stderr is not None
            assert running.stderr.readline().startswith("loading ")
            silent.append(time.perf_counter() - start)
            line = next((line for line in running.stderr if line.startswith("the demo is at http://127.0.0.1:")), "")
            assert line, f"the demo ended with {running.wait(60)}"
            with urllib.request.urlopen(line.split()[4], timeout=60) as page:
                assert b"gradio" in page.read()
            seconds.append(time.perf_counter() - start)
            running.send_signal(signal.SIGINT)
            rest = running.communicate(timeout=60)[1]
            assert running.returncode == 130 and rest.strip().endswith("interrupted: the demo has ended")
        finally:
            running.kill()
            running.wait()
    assert min(seconds) < 15 and min(silent) < 2, (seconds, silent)
