"""The pages: fresh where they are made from code, true where they quote it, and whole."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffsparse import SparsityPlan
from tests.docs.pages import ROOT, documents, name
from tests.house.imports import SOURCES, source_files

DOCS = ROOT / "docs"
SEE = DOCS / "see.md"
sys.path.insert(0, str(DOCS / "scripts"))

import pictures  # noqa: E402
import plan_format  # noqa: E402
import readme  # noqa: E402

PACKAGES = ("diffsparse", "diffsparse.kernels", "diffsparse.pipelines")


# -- made from the code ------------------------------------------------------------------------------------------------


def test_plan_format_is_fresh() -> None:
    assert (DOCS / "plan_format.md").read_text("utf-8") == plan_format.page(), (
        "run python docs/scripts/plan_format.py --write"
    )


def test_pictures_are_fresh_and_small() -> None:
    files = {path.stem: path for path in (DOCS / "pictures").glob("*.png")}
    assert set(files) == set(pictures.PICTURES), "run python docs/scripts/pictures.py"
    for stem, path in files.items():
        drawn = np.asarray(pictures.draw(stem).convert("RGB"))
        with Image.open(path) as kept:
            assert np.array_equal(np.asarray(kept.convert("RGB")), drawn), (
                f"{stem}: run python docs/scripts/pictures.py"
            )
        assert path.stat().st_size < 10_000
        assert len(np.unique(drawn.reshape(-1, 3), axis=0)) == 2, f"{stem} shows nothing"


def test_docstrings_become_markdown() -> None:
    pytest.importorskip("griffe", reason="the extra 'docs' is not installed")
    import docstrings

    text = (
        "What it is: a thing.\n\n``a``, b: the first,\n  and more. :class:`~x.Y` raises. ``name``: the second\n\n"
        "Args:\n    q: as is."
    )
    assert docstrings.to_markdown(text).split("\n") == [
        "What it is: a thing.",
        "",
        "",
        "- `a`, `b`: the first,",
        "  and more. `x.Y` raises.",
        "- `name`: the second",
        "",
        "Args:",
        "    q: as is.",
    ]


# -- public names ------------------------------------------------------------------------------------------------------


def public_names() -> list[tuple[str, str]]:
    return [
        (package, public)
        for package in PACKAGES
        for public in importlib.import_module(package).__all__
        if public != "__version__"
    ]


def names_of_the_search() -> list[tuple[str, str]]:
    """What the reference shows of the search, which has no public names of its own."""
    text = (DOCS / "api" / "search.md").read_text("utf-8")
    return re.findall(r"^::: ([\w.]+)\.(\w+)$", text, re.MULTILINE)


@pytest.mark.parametrize(("package", "public"), public_names() + names_of_the_search())
def test_public_names_are_documented(package: str, public: str) -> None:
    value = getattr(importlib.import_module(package), public)
    if not callable(value):
        return
    # dataclasses write a docstring of their own where there is none
    doc = (value.__dict__.get("__doc__") if inspect.isclass(value) else value.__doc__) or ""
    assert doc.strip() and not doc.startswith(f"{public}("), f"{package}.{public} has no docstring"
    if inspect.isclass(value):
        for attribute, member in vars(value).items():
            inner = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            is_field = attribute in getattr(value, "__dataclass_fields__", ())  # a default that is a function
            if attribute.startswith("_") or not inspect.isfunction(inner) or is_field:
                continue
            inherited = any(getattr(getattr(base, attribute, None), "__doc__", None) for base in value.__mro__[1:])
            assert inner.__doc__ or inherited, f"{package}.{public}.{attribute} has no docstring"


def test_public_names_are_in_the_reference() -> None:
    text = "".join(path.read_text("utf-8") for path in (DOCS / "api").glob("*.md"))
    shown = set(re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE))
    missing = [
        f"{package}.{public}"
        for package, public in public_names()
        if not {f"{home}.{public}" for home in PACKAGES} & shown
    ]
    assert not missing
    for path in shown:
        module, _, public = path.rpartition(".")
        assert hasattr(importlib.import_module(module), public), path


# -- quotations --------------------------------------------------------------------------------------------------------


def literals() -> list[str]:
    """Every string in the sources, docstrings apart; what is put in at run time is a NUL."""
    found = []
    for package in SOURCES:
        for path in source_files(package):
            nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
            docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
            for node in nodes:
                if id(node) in docstrings:
                    continue
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
                elif isinstance(node, ast.JoinedStr):
                    found.append("".join(p.value if isinstance(p, ast.Constant) else "\0" for p in node.values))
    return found


def quoted() -> list[str]:
    headings = re.findall(r"^### (`+)(.+?)\1$", (DOCS / "troubleshooting.md").read_text("utf-8"), re.MULTILINE)
    return [text.strip() for _, text in headings]


def is_in(message: str, texts: list[str]) -> bool:
    """Whether one of the texts has the message, with something put in (or more text) for every ``…``."""
    pattern = re.compile(".+?".join(re.escape(part) for part in message.split("…")), re.DOTALL)
    # Messages that start or end with "…" have something put in there, so they are no match without.
    return any(pattern.search(text) for text in texts)


@pytest.fixture(scope="module")
def sources() -> list[str]:
    return literals()


@pytest.mark.parametrize("message", quoted())
def test_quoted_messages_are_in_the_code(message: str, sources: list[str]) -> None:
    assert is_in(message, sources)


def test_a_message_that_is_not_there_is_found(sources: list[str]) -> None:
    assert len(quoted()) > 40
    assert not is_in("the plan is not for that model (…)", sources)
    assert not is_in("q has … tokens, the layout is for …, the grid is …", sources)


def test_figures_are_those_that_were_measured() -> None:
    """README's table is that of the committed result; speeds may have been measured again."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "tiny_wan_cpu_20_steps.json").read_text("utf-8"))["rows"]
    wanted = [
        (f"{r['trajectory_density']:.3f}", f"{r['psnr']:.1f}", f"{min(r['psnrs']):.1f}", f"{r['ssim']:.3f}")
        for r in rows
    ]
    cells = r"^\| [^|]+ \| ([\d.]+) \| ([\d.]+) / ([\d.]+) dB \| ([\d.]+) \| [\d.]+x \| \d+ \|$"
    measured = readme.section("Measured")
    assert re.findall(cells, measured, re.MULTILINE) == wanted
    shown = readme.on_page_markdown((DOCS / "kernels.md").read_text("utf-8"))
    assert measured in shown and "README:" not in shown
    # what the quickstart takes from it
    quickstart = (DOCS / "quickstart.md").read_text("utf-8")
    figures = re.search(r"one window for all heads came to ([\d.]+) dB .*? came to ([\d.]+) ", quickstart)
    assert figures
    assert f"| {figures[1]} / " in measured and f"{figures[2]} dB" in measured


def test_a_section_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match="No such title"):
        readme.on_page_markdown("text\n\n<!-- README: No such title -->\n")


def test_the_share_of_tails_is_that_of_the_shipped_plan() -> None:
    plan = SparsityPlan.from_pretrained(ROOT / "examples" / "tiny_wan" / "sparse_plan")
    chosen = [plan.entries[i].execution for i in plan.index.reshape(-1)]
    with_tail = sum(e.mode == "exact" and e.tail != "none" for e in chosen)
    assert f"{with_tail} of {len(chosen)} entries of heads have a tail" in (DOCS / "methods.md").read_text("utf-8")


def test_the_shipped_plan_has_the_files_that_the_page_names() -> None:
    plan = ROOT / "examples" / "tiny_wan" / "sparse_plan"
    assert "`attention.safetensors`, which a search writes beside its plan (the small model's plan comes with it)" in (
        SEE.read_text("utf-8")
    )
    assert (plan / "attention.safetensors").is_file()


@pytest.mark.parametrize(
    ("command", "shown"),
    re.findall(r"^```bash\n(diffsparse [^\n]+)\n```\n+```text\n(.*?)\n```$", SEE.read_text("utf-8"), re.M | re.S),
)
def test_output_on_the_page_is_what_is_printed(
    command: str, shown: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the line that names the machine; in 80 columns, as wherever there is no terminal."""
    from diffsparse.search.cli import main

    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("COLUMNS", raising=False)
    with pytest.raises(SystemExit) as end:
        main([*shlex.split(command)[1:], "--device", "cpu"])
    assert not end.value.code
    printed, wanted = (
        [line.rstrip() for line in re.sub(r"^machine .*\n( {16}.*\n)*", "", text, flags=re.MULTILINE).splitlines()]
        for text in (capsys.readouterr().out, shown)
    )
    assert printed == wanted and len(wanted) > 15


def test_pages_show_output() -> None:
    assert SEE.read_text("utf-8").count("```text\n") == 2


# -- the whole ---------------------------------------------------------------------------------------------------------


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for path in documents():
        text = path.read_text("utf-8")
        spans = "\n".join([*re.findall(r"```\n(.*?)```", text, re.DOTALL), *re.findall(r"`([^`\n]+)`", text)])
        named = set(re.findall(r"\bmake (?:[A-Z]+=\S+ )*([a-z][a-z-]*)", spans))
        assert named <= targets, name(path)


def test_strict_build(tmp_path: Path) -> None:
    """What ``make docs`` does: no broken link, no page left out, no name that is not there."""
    pytest.importorskip("mkdocs", reason="the extra 'docs' is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    page = (tmp_path / "site" / "api" / "diffsparse.html").read_text("utf-8")
    assert 'id="diffsparse.Window"' in page and ":class:" not in page
    fetched = re.findall(r'(?:src|href)="(https?://[^"]+)"', (tmp_path / "site" / "index.html").read_text("utf-8"))
    assert not [url for url in fetched if re.search(r"\.(js|css|woff2?|png|svg)$|fonts\.", url)], fetched
