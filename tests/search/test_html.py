"""The inspector page: its data, its policy, strings that try to get out, its size, and how it behaves in a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffsparse.carry import carry_mask
from diffsparse.entry import Execution, HeadEntry
from diffsparse.grid import TokenGrid
from diffsparse.layout import build_layout
from diffsparse.order import AxisOrder, TileOrder
from diffsparse.patterns import Band, Bitmap, Columns, Empty, Sink, Window
from diffsparse.plan import Architecture, SparsityPlan
from diffsparse.preset_plans import preset
from diffsparse.schedule import Schedule
from diffsparse.search.errors import BadInput
from diffsparse.search.html import inspector, write_html
from diffsparse.search.measured import PooledAttention, figures_beside, fitting_attention
from tests.search.plans import make_plan, with_attention

GRID = TokenGrid(3, 12, 12)
TILE = TileOrder(1, 8, 8)
HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">@@DATA@@\u2028"


class Page(HTMLParser):
    """The elements of a page, and the text inside scripts, styles and the title."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {}
        self.open = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self.open = tag
        if tag in ("script", "style", "title"):
            self.inside.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        self.open = ""

    def handle_data(self, data: str) -> None:
        if self.open in self.inside:
            self.inside[self.open][-1] += data

    @property
    def data(self) -> Any:
        return json.loads(self.inside["script"][0])


def array(text: str, kind: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), kind)


def mask_of(data: Any, phase: int, layer: int, head: int) -> np.ndarray:
    """The shares that the page draws for a head, float ``[side, side]``."""
    index = array(data["maskOf"], "<u4").reshape(-1, len(data["layers"]), data["heads"])
    offset, side, depth = data["masks"]["where"][index[phase, layer, head]]
    bits = np.unpackbits(array(data["masks"]["bits"], "u1")[offset:])[: side * side * depth].reshape(-1, depth)
    return (bits @ (1 << np.arange(depth)[::-1])).reshape(side, side) / (2**depth - 1)


def test_the_page_says_what_the_plan_does() -> None:
    plan = make_plan()
    plan.record["search"] = {"unstable_heads": ["blocks.1.attn1/0", "blocks.7.attn1/0", 3]}
    data = Page(inspector(plan, GRID)).data
    assert data["layers"] == list(plan.layers) and data["heads"] == 2 and not data["uniform"]
    assert data["phases"] == ["0.9 to 0.5", "0.5 to 0"] and data["record"] == plan.record
    assert data["unstable"] == [2] and data["attention"] is None
    entry_of = array(data["entryOf"], "<u4").reshape(plan.index.shape)
    assert (entry_of == plan.index).all()
    for told, entry in zip(data["entries"], plan.entries, strict=True):
        assert told["density"] == pytest.approx(build_layout(GRID, [entry], 64).density, abs=1e-5)
        assert told["order"] == str(entry.order) and told["time"] is None and not told["carried"]
        assert told["family"] in data["families"]
    for phase, layer, head in np.ndindex(plan.index.shape):
        entry = plan.entries[plan.index[phase, layer, head]]
        skipped = entry.execution.mode == "skip"
        mask = entry.pattern.block_mask(GRID, entry.order, 64)
        assert (mask_of(data, phase, layer, head) == (np.zeros_like(mask) if skipped else mask)).all()


def test_measured_attention_and_the_mass_that_is_kept(tmp_path: Path) -> None:
    plan = make_plan()
    folder = plan.save_pretrained(tmp_path)
    with_attention(folder, plan)
    attention = fitting_attention(plan, GRID, folder)
    assert attention is not None
    data = Page(inspector(plan, GRID, attention)).data
    side = data["attention"]["side"]
    heat = array(data["attention"]["heat"], "u1").reshape(*plan.index.shape, side, side)
    assert side == 12 and (heat.max((3, 4)) == 255).all()
    shown = np.unravel_index(heat[0, 0, 0].argmax(), (side, side))
    assert shown == np.unravel_index(attention.pooled[0, 0, 0].argmax(), (side, side))
    kept = array(data["attention"]["kept"], "<u2").reshape(plan.index.shape) / 10000
    for at in np.ndindex(plan.index.shape):
        entry = plan.entries[plan.index[at]]
        if entry.is_dense or entry.execution.mode == "skip":
            assert kept[at] == float(entry.is_dense)
        else:
            share = mask_of(data, *at)
            pooled = attention.pooled[at]
            assert 0 < kept[at] <= 1
            if share.shape == pooled.shape:  # four bits of a share are 1/15 apart
                assert kept[at] == pytest.approx(float((share * pooled).sum() / pooled.sum()), abs=0.04)
    # Masks are drawn in the order that attention was measured in.
    assert set(data["orders"]) == {"tile(1,8,8)"}


def test_errors_of_the_heads(tmp_path: Path) -> None:
    """What the search recorded goes into the page, for this plan on this grid and no other."""
    plan = make_plan()
    folder = plan.save_pretrained(tmp_path)
    with_attention(folder, plan)
    old = Page(inspector(plan, GRID, fitting_attention(plan, GRID, folder))).data
    assert old["error"] is None and old["attention"] is not None
    with_attention(folder, plan, figures=True)
    attention = fitting_attention(plan, GRID, folder)
    assert attention is not None and attention.figures is not None
    data = Page(inspector(plan, GRID, attention)).data
    error = array(data["error"], "<f4").reshape(plan.index.shape)
    assert np.array_equal(error, attention.figures.error)
    kept = array(data["attention"]["kept"], "<u2").reshape(plan.index.shape) / 10000
    assert np.allclose(kept, attention.figures.kept_mass, atol=1e-4)
    assert data["attention"]["kept"] != old["attention"]["kept"]
    edited = replace(plan, index=plan.index[:, :, ::-1].copy())
    assert Page(inspector(edited, GRID, fitting_attention(edited, GRID, folder))).data["error"] is None


def test_a_map_without_a_single_number_is_drawn_blank(tmp_path: Path) -> None:
    plan = make_plan()
    attention = PooledAttention(
        np.full((2, 2, 2, 4, 4), np.nan, np.float32), {n: [TILE] * 2 for n in plan.layers}, GRID, 64
    )
    data = Page(inspector(plan, GRID, attention)).data
    assert not array(data["attention"]["heat"], "u1").any() and not array(data["attention"]["kept"], "<u2").any()


def test_attention_that_does_not_fit_is_left_out(tmp_path: Path) -> None:
    plan = make_plan()
    folder = plan.save_pretrained(tmp_path)
    assert fitting_attention(plan, GRID, folder) is None and fitting_attention(plan, GRID, None) is None
    with_attention(folder, plan)
    assert fitting_attention(plan, GRID, folder) is not None
    assert fitting_attention(plan, TokenGrid(3, 16, 9), folder) is None
    assert fitting_attention(replace(plan, block_size=128), GRID, folder) is None
    renamed = replace(plan, layers=("a", "b"), architecture=None)
    assert fitting_attention(renamed, GRID, folder) is None
    file = write_html(plan, TokenGrid(3, 16, 9), tmp_path / "other.html", folder=folder)
    assert Page(file.read_text("utf-8")).data["attention"] is None


def hostile_plan() -> SparsityPlan:
    names = (HOSTILE, "b<1>&'\"")
    entries = [HeadEntry(), HeadEntry(TILE, Window(size=(None, 0.3, 0.3)))]
    return SparsityPlan.from_table(
        {name: [entries] for name in names},
        schedule=Schedule(dense_layers=(names[1],)),
        architecture=Architecture(HOSTILE, names, 2, 32, (1, 1, 1)),
        record={HOSTILE: HOSTILE, "search": {"unstable_heads": [HOSTILE]}},
    )


def test_strings_of_a_plan_stay_strings() -> None:
    plain = Page(inspector(make_plan(), GRID, name="plan"))
    page = Page(inspector(hostile_plan(), GRID, name=HOSTILE))
    assert page.elements == plain.elements, "a string of the plan became an element"
    assert len(page.inside["script"]) == 2 and page.inside["script"][1] == plain.inside["script"][1]
    assert page.data["layers"][0] == HOSTILE and page.data["record"][HOSTILE] == HOSTILE
    assert page.data["denseLayers"] == [1] and page.data["entries"][-1]["family"] == "dense"
    assert page.inside["title"] == [f"Sparsity plan {HOSTILE}"]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", page.inside["script"][1])


def test_the_policy_admits_this_script_and_style_and_nothing_else() -> None:
    text = inspector(make_plan(), GRID)
    page = Page(text)
    (policy,) = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]

    def digest(content: str) -> str:
        return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()

    assert policy == (
        f"default-src 'none'; script-src 'sha256-{digest(page.inside['script'][1])}'; "
        f"style-src 'sha256-{digest(page.inside['style'][0])}'"
    )
    assert "://" not in text and "@import" not in text
    loading = {
        name for _, a in page.elements for name in a if name in ("src", "href", "srcset", "style") or name[:2] == "on"
    }
    assert not loading


@pytest.mark.parametrize("grid", [TokenGrid(1, 24, 40), TokenGrid(2, 16, 16, text_before=7, text_after=70)])
def test_plans_of_images_and_with_text(grid: TokenGrid) -> None:
    entry = HeadEntry(AxisOrder("HWF"), Band(0.1) | Sink(frames=1) | Columns(boxes=((0, 1, 0, 0.5, 0, 0.5),) * 40))
    plan = replace(preset("window"), entries=(entry,))
    data = Page(inspector(plan, grid)).data
    (told,) = data["entries"]
    assert data["uniform"] and data["layers"] == ["*"] and told["family"] == "band|sink|columns"
    assert told["density"] == pytest.approx(build_layout(grid, [entry], 64).density, abs=1e-5)
    values = dict(told["parameters"])
    assert values["band 0: half width"] == "0.1" and values["sink 1: frames"] == "1"
    assert values["columns 2: boxes"].startswith("(0, 1, 0, 0.5, 0, 0.5), ") and values["columns 2: boxes"].endswith(
        "…"
    )


def test_presets_have_a_page_too(tmp_path: Path) -> None:
    for name in ("dense", "window", "radial"):
        file = write_html(preset(name), TokenGrid(5, 16, 16), tmp_path / f"{name}.html")
        page = Page(file.read_text("utf-8"))
        assert page.inside["title"] == [f"Sparsity plan {name}"] and len(page.data["entries"]) == 1


def test_a_bitmap_of_another_grid_is_carried_over() -> None:
    mask = np.eye(9, dtype=bool)
    order = TileOrder(1, 8, 8)
    grid = TokenGrid(1, 24, 24)
    entry = HeadEntry(order, Bitmap.from_mask(mask, grid, order, 64, Window(size=(None, 0.5, None))))
    plan = SparsityPlan.uniform(entry)
    assert (mask_of(Page(inspector(plan, grid)).data, 0, 0, 0) == mask).all()
    data = Page(inspector(plan, TokenGrid(1, 32, 24))).data
    assert data["carried"] and data["entries"][0]["carried"]
    parameters = dict(data["entries"][0]["parameters"])
    assert parameters["measured on"] == "1x24x24, blocks of 64" and parameters["fallback: size"] == "all, 0.5, all"
    carried = carry_mask(mask, grid, TokenGrid(1, 32, 24), order, 64)
    assert (mask_of(data, 0, 0, 0) == carried).all() and carried.diagonal().all()


def test_predicted_times_come_from_the_recorded_costs() -> None:
    plan = make_plan()
    share = {tail: [0.1, 0.2, 0.4, 0.7] for tail in ("none", "mean", "moments", "centroids")}
    plan.record["costs"] = {"device": "cpu", "dense_seconds": 1.0, "densities": [0.02, 0.1, 0.3, 0.6], "share": share}
    told = Page(inspector(plan, GRID)).data["entries"]
    by_family = {t["family"]: t["time"] for t in told}
    assert by_family["dense"] == 1.0 and by_family["skip"] == 0.0 and 0 < by_family["window"] < 1
    del share["mean"]
    with pytest.raises(BadInput, match="costs in the plan's record cannot be read"):
        inspector(plan, GRID)


def test_a_large_plan_stays_small_enough() -> None:
    """The pictures of 40 layers, 40 heads and 4 phases, all different, share 15.5 MB."""
    from diffsparse.search import html

    layers, heads, phases = 40, 40, 4
    count = layers * heads * phases
    side = html._side(count, html.MASK_BYTES, bits=4)
    shown = html._side(count, html.ATTENTION_BYTES, bits=8)
    assert side >= 40 and shown >= 32
    assert (count * (side * side / 2 + shown * shown)) * 4 / 3 < 16.5e6
    # Measured on a smaller one: every head has a mask and a map of its own, and all else stays within 700 bytes a head.
    rng = np.random.default_rng(0)
    grid = TokenGrid(1, 80, 80)
    names = tuple(f"transformer_blocks.{i}.attn" for i in range(6))
    n = TILE.partition(grid, 64).num_blocks
    entries = tuple(
        HeadEntry(TILE, Bitmap.from_mask(rng.random((n, n)) < 0.3, grid, TILE, 64, Window(size=(None, 0.5, 0.5))))
        for _ in range(6 * 8)
    )
    plan = SparsityPlan(entries=entries, index=np.arange(48).reshape(1, 6, 8), layers=names)
    pooled = rng.random((1, 6, 8, 40, 40), np.float32)
    attention = PooledAttention(pooled, {name: [TILE] * 8 for name in names}, grid, 64)
    text = inspector(plan, grid, attention)
    data = Page(text).data
    pictures = len(data["masks"]["bits"]) + len(data["attention"]["heat"])
    template = len(Page(inspector(preset("dense"), TokenGrid(1, 8, 8))).inside["script"][1])
    assert len(text) - pictures - template - 16000 < 48 * 700
    assert (mask_of(data, 0, 5, 7) == entries[-1].pattern.block_mask(grid, TILE, 64)).all()


# -- in a browser ------------------------------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")


def rendered(page: Path, width: int = 1200) -> str:
    """The page's elements after its script ran, from a file, without a network."""
    done = subprocess.run(
        [
            str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'profile'}",
            "--host-resolver-rules=MAP * ~NOTFOUND", f"--window-size={width},900", "--virtual-time-budget=5000",
            "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow(reason="starts a browser")
@needs_browser
def test_in_a_browser(tmp_path: Path) -> None:
    plan = make_plan()
    folder = plan.save_pretrained(tmp_path / "plan")
    with_attention(folder, plan)
    old = rendered(write_html(plan, GRID, tmp_path / "old.html", folder=folder))
    assert "<dt>error</dt><dd>not recorded" in old
    with_attention(folder, plan, figures=True)
    text = rendered(write_html(plan, GRID, tmp_path / "page.html", folder=folder, phase=1))
    assert text.count('class="cell"') == 4 and "blocks.0.attn1, head 0" in text
    assert text.count('<input type="radio"') == 2 + 3 and "kept mass" in text
    figures = figures_beside(plan, folder)
    assert figures is not None
    shown = re.search(r"<dt>error</dt><dd>([\d.e-]+)<small>of its output, squared, predicted", text)
    assert shown is not None and float(shown[1]) == pytest.approx(float(figures.error[1, 0, 0]), rel=0.06)
    labels = re.findall(r'class="cell".*?aria-label="[^"]*, error ([\d.e-]+)"', text)
    assert [float(label) for label in labels] == pytest.approx(figures.error[1].reshape(-1).tolist(), rel=0.06)
    assert re.search(r"<span>window \(\d\)</span></li>", text)


@pytest.mark.slow(reason="starts a browser")
@needs_browser
def test_hostile_strings_in_a_browser(tmp_path: Path) -> None:
    text = rendered(write_html(hostile_plan(), GRID, tmp_path / "page.html"))
    assert "<title>Sparsity plan </title>" in text or "<title>Sparsity plan</title>" in text
    assert text.count("<img") == 0 and text.count('class="cell"') == 4


# Our policy lets no other script run, so the test's copy goes without it.
PROBE = """
<script>
const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
cells[0].focus();
for (const key of ["ArrowRight", "ArrowDown", "ArrowRight", "ArrowUp", "ArrowDown"]) press(key);
document.querySelector("#views input[type=radio]:nth-of-type(1)");
document.title = [document.activeElement.getAttribute("aria-label"), document.getElementById("head-title").textContent,
  document.querySelectorAll('.cell[tabindex="0"]').length,
  document.documentElement.scrollWidth <= window.innerWidth ? "fits" : "too wide"].join(" | ");
</script>
"""


@pytest.mark.slow(reason="starts a browser")
@needs_browser
@pytest.mark.parametrize("width", [1200, 500])
def test_keyboard_and_narrow_windows(tmp_path: Path, width: int) -> None:
    long = "a_very_long_name_of_a_layer" * 12
    table = {
        name: [[HeadEntry(), HeadEntry(pattern=Empty(), execution=Execution(tail="mean"))] * 20] for name in (long, "b")
    }
    text = inspector(SparsityPlan.from_table(table), GRID)
    text = re.sub(r'<meta http-equiv="Content-Security-Policy".*?>', "", text).replace("</body>", PROBE + "</body>")
    (tmp_path / "page.html").write_text(text, "utf-8")
    found = re.search(r"<title>(.*?)</title>", rendered(tmp_path / "page.html", width))
    assert found is not None
    label, title, stops, fits = found[1].split(" | ")
    assert label.startswith("b, head 2: dense") and title == "b, head 2"
    assert (stops, fits) == ("1", "fits")
