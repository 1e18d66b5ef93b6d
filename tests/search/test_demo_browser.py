"""The demo as a person uses it, in Chromium. Screenshots go to ``out/demo``."""

from __future__ import annotations

import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from diffsparse.search.demo.inspector import PlanView
from diffsparse.search.demo.launch import serving
from diffsparse.search.demo.studio import Studio
from tests.search.plans import make_plan
from tests.search.tiny import PROMPTS, fix_costs

CHROMIUM = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
MISSING = [
    text
    for missing, text in (
        (find_spec("gradio") is None, "gradio (the extra demo)"),
        (find_spec("playwright") is None, "playwright (pip install playwright)"),
        (CHROMIUM is None, "chromium (apt-get install chromium)"),
    )
    if missing
]
pytestmark = [
    pytest.mark.slow(reason="a browser generates clips and searches a plan"),
    pytest.mark.skipif(bool(MISSING), reason=f"the demo in a browser needs {', '.join(MISSING)}"),
]
PATIENCE = 120_000  # milliseconds


@pytest.fixture(scope="module")
def address(pipe: Any, plan_folder: Path) -> Iterator[str]:
    plan = make_plan()
    with serving(Studio(pipe, "tiny", PROMPTS, PROMPTS, PlanView.of(plan, "the plan", plan_folder))) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


Open = Callable[..., Any]


@pytest.fixture
def open_page(browser: Any, address: str) -> Iterator[Open]:
    """A page in a context of its own. At the end none may have failed, or asked another machine for anything."""
    contexts, wrong = [], []

    def start(width: int = 1280, height: int = 900) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        own = (address, "data:", "blob:", "about:")
        page.on("request", lambda r: wrong.append(r.url) if not r.url.startswith(own) else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#generate")
        page.wait_for_function("document.querySelector('#heads, #status') !== null")
        return page

    yield start
    for context in contexts:
        context.close()
    assert not wrong


@pytest.fixture
def shoot(repo_root: Path) -> Callable[[Any, str], None]:
    folder = repo_root / "out" / "demo"
    folder.mkdir(parents=True, exist_ok=True)

    def save(page: Any, name: str) -> None:
        page.screenshot(path=folder / f"{name}.png", full_page=True)

    return save


def status(page: Any, wanted: str) -> str:
    page.wait_for_function(
        "wanted => document.querySelector('#status').innerText.toLowerCase().includes(wanted)", arg=wanted
    )
    return str(page.inner_text("#status"))


def ask(page: Any, steps: int, prompt: str = PROMPTS[0]) -> None:
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_label("Steps").fill(str(steps))
    page.click("#generate")


def test_generate_and_compare(open_page: Open, shoot: Callable[[Any, str], None]) -> None:
    page = open_page()
    shoot(page, "1_start")
    ask(page, 3)
    status(page, "done")
    page.wait_for_selector("#sheet img")
    figures = page.inner_text("#figures")
    assert re.search(r"speed-up of the denoising loop\s+\d+\.\d\dx", figures)
    assert "PSNR to dense" in figures and "SSIM to dense" in figures
    assert page.locator("#dense img").count() == 1 and page.locator("#sparse img").count() == 1
    shoot(page, "2_compared")


def test_bad_input_and_cancel(open_page: Open, shoot: Callable[[Any, str], None]) -> None:
    page = open_page()
    ask(page, 3, prompt="")
    assert "the prompt is empty" in status(page, "cannot do that")
    shoot(page, "3_empty_prompt")
    ask(page, 100)
    status(page, "step 3 of 100")
    page.click("#cancel")
    status(page, "cancelled")
    ask(page, 2)
    status(page, "done")


def test_a_bad_plan_is_refused_and_a_good_one_taken(
    open_page: Open, shoot: Callable[[Any, str], None], tmp_path: Path
) -> None:
    page = open_page()
    page.get_by_label("an uploaded plan").check()
    files = {"bad": {"../sparse_plan.json": b"{}"}, "other": make_plan(layers=3).to_files()}
    for name, message in (("bad", "leads outside"), ("other", "for another model")):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            for file, content in files[name].items():
                archive.writestr(file, content)
        page.set_input_files("#upload input[type=file]", tmp_path / f"{name}.zip")
        page.wait_for_selector(f"text={message}")
    shoot(page, "4_bad_plan")
    ask(page, 2)
    assert "no plan was uploaded yet" in status(page, "cannot do that")
    good = PlanView.of(make_plan(), "x").write_zip(tmp_path)
    page.set_input_files("#upload input[type=file]", good)
    page.wait_for_selector("text=the plan fits: 2 phases, 2 layers, 2 heads")
    ask(page, 2)
    status(page, "done")


def test_inspect_with_the_keyboard(open_page: Open, shoot: Callable[[Any, str], None], tmp_path: Path) -> None:
    page = open_page()
    page.get_by_role("tab", name="Inspect").focus()
    page.keyboard.press("Enter")
    button = page.locator("#heads button[data-layer='1'][data-head='1']")
    button.wait_for()
    page.locator("#heads button").first.focus()
    for _ in range(3):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#heads button[data-layer='1'][data-head='1'][aria-pressed='true']")
    page.wait_for_selector("#mask img")
    assert "window" in page.inner_text("#facts")
    shoot(page, "5_inspect")
    with page.expect_download() as download:
        page.click("#download")
    saved = tmp_path / "plan.zip"
    download.value.save_as(saved)
    with zipfile.ZipFile(saved) as archive:
        assert "sparse_plan.json" in archive.namelist()


def tab_to(page: Any, selector: str) -> None:
    """Presses Tab, past the page's end to its beginning again, until the focus is on what the selector names."""
    for _ in range(80):
        page.keyboard.press("Tab")
        if page.evaluate("wanted => document.activeElement.matches(wanted)", selector):
            return
    raise AssertionError(f"{selector} cannot be reached with Tab")


def type_into(page: Any, selector: str, text: str) -> None:
    tab_to(page, selector)
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type(text)


def test_all_of_it_with_the_keyboard(open_page: Open, shoot: Callable[[Any, str], None]) -> None:
    """A prompt, another plan, a generation that is cancelled and one that is not, its frames, a head, a search."""
    page = open_page()
    type_into(page, "#prompt textarea", PROMPTS[1])
    tab_to(page, "#plan input[value=conservative]")
    page.keyboard.press("Space")
    assert page.get_by_label("conservative").is_checked()
    type_into(page, "#steps input", "60")
    tab_to(page, "#generate")
    page.keyboard.press("Enter")
    status(page, "step 2 of 60")
    tab_to(page, "#cancel")
    page.keyboard.press("Enter")
    status(page, "cancelled")
    type_into(page, "#steps input", "2")
    tab_to(page, "#generate")
    page.keyboard.press("Space")
    status(page, "done")
    page.wait_for_selector("#one img")
    first = page.locator("#one img").get_attribute("src")
    tab_to(page, "#frame input[type=range]")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("src => document.querySelector('#one img').getAttribute('src') !== src", arg=first)
    shoot(page, "11_keyboard")
    tab_to(page, "[role=tab]:nth-of-type(2)")
    page.keyboard.press("Enter")
    page.wait_for_selector("#heads button[data-layer='0'][data-head='1'][aria-pressed='false']")
    tab_to(page, "#heads button[data-layer='0'][data-head='1']")
    page.keyboard.press("Enter")
    page.wait_for_selector("#heads button[data-layer='0'][data-head='1'][aria-pressed='true']")
    tab_to(page, "[role=tab]:nth-of-type(3)")
    page.keyboard.press("Enter")
    page.wait_for_selector("#search:visible")
    type_into(page, "#prompts textarea", "")
    page.keyboard.press("Delete")
    tab_to(page, "#search")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#search_status').innerText.includes('there is no prompt')")


def test_search_and_look_at_what_was_found(
    open_page: Open, shoot: Callable[[Any, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fix_costs(monkeypatch)  # the page is served by this process
    page = open_page()
    page.get_by_role("tab", name="Search").click()
    page.get_by_label("Prompts, one a line").fill("\n".join(PROMPTS))
    page.get_by_label("Steps to search for").fill("3")
    page.click("#search")
    page.wait_for_function("document.querySelector('#stages').innerText.includes('trace: ')")
    shoot(page, "9_searching")
    page.click("#cancel_search")
    page.wait_for_function("document.querySelector('#search_status').innerText.includes('goes on from here')")
    page.click("#search")
    # An error ends a search as well; waiting for the plan alone would hide what it says.
    page.wait_for_function("/done: |cannot do that/i.test(document.querySelector('#search_status').innerText)")
    assert "done: the plan" in page.inner_text("#search_status")
    stages = page.inner_text("#stages")
    assert "going on with the search" in stages and "probe" not in stages
    assert re.search(r"validate: (\d) of \1", stages)
    shoot(page, "9_searched")
    page.get_by_role("tab", name="Inspect").click()
    page.get_by_label("Plan", exact=True).last.click()
    page.get_by_role("option", name="searched on this page").click()
    page.wait_for_selector("#heads :text('the plan searched here')")
    page.wait_for_selector("#measured img")
    facts = page.inner_text("#facts")
    assert re.search(r"kept mass\s+\d\.\d+ of the attention", facts)
    assert re.search(r"error of the head\s+[\d.e-]+ of its output \(squared\), as the search predicts", facts)
    shoot(page, "10_searched_inspect")


def test_two_users_at_once(open_page: Open, shoot: Callable[[Any, str], None]) -> None:
    one, two = open_page(), open_page()
    ask(one, 60)
    status(one, "step 2 of 60")
    ask(two, 2, PROMPTS[1])
    status(two, "waiting")
    assert "of 60" not in two.inner_text("#status")
    two.click("#cancel")  # before its turn has come
    status(two, "cancelled")
    assert "of 60" in one.inner_text("#status")
    ask(two, 2, PROMPTS[1])
    status(two, "waiting")
    one.click("#cancel")
    status(one, "cancelled")
    status(two, "done")
    assert "cancelled" in one.inner_text("#status") and not one.inner_text("#figures").strip()
    shoot(two, "6_second_user")


def test_a_narrow_window(open_page: Open, shoot: Callable[[Any, str], None]) -> None:
    page = open_page(width=375, height=800)
    page.get_by_label("window", exact=True).check()
    page.get_by_label("Density of a sparse call (about)").first.wait_for()
    ask(page, 2)
    status(page, "done")
    page.wait_for_selector("#sheet img", state="attached")
    for picture in ("#one", "#sheet"):  # loaded once they come into view
        page.locator(picture).scroll_into_view_if_needed()
        page.wait_for_function("name => document.querySelector(name + ' img').naturalWidth > 0", arg=picture)
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    shoot(page, "7_narrow_generate")
    page.get_by_role("tab", name="Inspect").click()
    page.wait_for_selector("#mask img")
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    shoot(page, "8_narrow_inspect")
    page.get_by_role("tab", name="Search").click()
    page.wait_for_selector("#search:visible")
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    shoot(page, "12_narrow_search")
