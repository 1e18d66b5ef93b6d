"""Importing diffsparse is cheap, and every optional dependency is optional."""

from __future__ import annotations

import pytest

from tests.helpers.process import run_python

OPTIONAL = (
    "triton",
    "xformers",
    "lpips",
    "matplotlib",
    "imageio",
    "imageio_ffmpeg",
    "gradio",
    "torchmetrics",
    "kernels",
    "peft",
    "hypothesis",
)
BLOCK = "import sys\nfor name in {names!r}: sys.modules[name] = None\n"


def test_import_loads_neither_diffusers_nor_triton() -> None:
    code = (
        "import sys, diffsparse\n"
        "diffsparse.TokenGrid, diffsparse.Execution, diffsparse.SparsityPlan\n"
        "print(*sorted({'diffusers', 'triton', 'transformers', 'matplotlib', 'gradio'} & set(sys.modules)))"
    )
    assert run_python(code) == ""


def test_import_takes_less_than_a_second_more_than_torch() -> None:
    code = "import time, torch\nstart = time.perf_counter()\nimport diffsparse\nprint(time.perf_counter() - start)"
    assert min(float(run_python(code)) for _ in range(2)) < 1


CHANGES_NOTHING = """
import os, random, torch

def state():
    flags = torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()
    return dict(os.environ), flags, torch.random.get_rng_state().tolist(), random.getstate()

before = state()
import diffsparse, diffsparse.kernels
assert state() == before
"""


def test_import_changes_nothing_else() -> None:
    run_python(CHANGES_NOTHING)


@pytest.mark.parametrize("name", OPTIONAL)
def test_imports_without(name: str) -> None:
    run_python(BLOCK.format(names=(name,)) + "import diffsparse, diffsparse.kernels, diffsparse.search.cli")


def test_every_public_name_without_any_optional_dependency() -> None:
    run_python(
        BLOCK.format(names=OPTIONAL) + "import diffsparse\nfor name in diffsparse.__all__: getattr(diffsparse, name)"
    )
