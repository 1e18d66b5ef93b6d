"""The table of supported models is true and fresh."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pkgutil import iter_modules

import pytest

from diffsparse.pipelines.families import FAMILIES, UNSUITABLE
from diffsparse.pipelines.families.sizes import USUAL_SIZES
from diffsparse.pipelines.families.tested import _LACKING, _MORE, COMMON, features_of, more
from diffsparse.pipelines.matrix import markdown, model_rows
from tests.helpers.process import ROOT
from tests.pipelines.claims import SHOWN
from tests.pipelines.models import CASES

CLASSES = {name for family in FAMILIES for name in family.classes}


def test_every_class_has_a_usual_size_and_none_is_left_over() -> None:
    assert set(USUAL_SIZES) == CLASSES
    assert not CLASSES & set(UNSUITABLE)


def test_every_class_has_a_case() -> None:
    tested = {cls.__name__ for case in CASES.values() for cls in type(case.build()).__mro__}
    assert not (missing := CLASSES - tested), f"no tiny model in the tests: {sorted(missing)}"


@pytest.mark.parametrize("name", sorted(CLASSES | set(UNSUITABLE)))
def test_every_class_is_in_diffusers(name: str) -> None:
    import diffusers
    from diffusers.models import transformers

    assert hasattr(diffusers, name) or hasattr(transformers, name)


def test_every_feature_that_is_listed_is_shown_by_a_test_and_no_other() -> None:
    for found in iter_modules([str(ROOT / "tests" / "pipelines")]):
        import_module(f"tests.pipelines.{found.name}")
    assert {(name, feature) for name in CLASSES for feature in more(name)} == SHOWN
    assert {
        name for feature in (*_LACKING, *_MORE) for name in (*_LACKING.get(feature, ()), *_MORE.get(feature, ()))
    } <= CLASSES
    assert set(_LACKING) <= set(COMMON) and not set(COMMON) & set(_MORE)
    assert features_of("FluxTransformer2DModel")[: len(COMMON)] == COMMON
    assert "compiled blocks" not in features_of("MochiTransformer3DModel")


def test_the_page_is_fresh() -> None:
    page = ROOT / "docs" / "models.md"
    assert page.read_text("utf-8") == markdown(), "run: diffsparse models --markdown > docs/models.md"
    assert len(list(model_rows())) == len(CLASSES)


def test_the_command() -> None:
    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "diffsparse.search", "models", *arguments]
        wide = {**os.environ, "COLUMNS": "200"}  # names are folded where they do not fit
        return subprocess.run(command, cwd=ROOT, env=wide, check=True, capture_output=True, text=True).stdout

    assert run("--markdown") == markdown()
    shown = run()
    assert all(name in shown for name in CLASSES)
    data = json.loads(run("--json"))
    assert {row["model_class"] for row in data["models"]} == CLASSES and data["unsuitable"] == UNSUITABLE
