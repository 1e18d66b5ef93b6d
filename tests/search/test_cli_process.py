"""The command line as a process of its own."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.helpers.process import run_python, run_script
from tests.search.tiny import SHAPE_OPTIONS


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_script("-m", "diffsparse.search", *arguments, timeout=300)


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from diffsparse.search.cli import main\n"
        "for arguments in (['--help'], ['search', '--help'], ['eval']):\n"
        "    try:\n        main(arguments)\n    except SystemExit:\n        pass\n"
        "loaded = {'torch', 'diffusers', 'transformers', 'numpy', 'scipy', 'PIL'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    run_python(code)


def test_a_mistake_is_one_line() -> None:
    done = run("show", "no/such/plan/anywhere")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "no plan at 'no/such/plan/anywhere'" in done.stderr and "Traceback" not in done.stderr


def test_eval_prints_one_json_object(model_folder: Path, prompts_file: Path) -> None:
    done = run("eval", model_folder, "window", "--prompts", prompts_file, "--seeds", 1, *SHAPE_OPTIONS, "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["plan"] == "window" and data["passed"] and len(data["clips"]) == 2
    assert "2 inputs x 1 seeds" in done.stderr


@pytest.mark.slow(reason="a search, an evaluation and a table, each in a process that loads the libraries")
def test_search_then_eval_then_show(model_folder: Path, prompts_file: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan"
    done = run(
        "search",
        model_folder,
        "--prompts",
        prompts_file,
        "--out",
        plan,
        "--density",
        "0.7",
        *SHAPE_OPTIONS[:-1],
        "4",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["architecture"]["heads"] == 2
    done = run("eval", model_folder, plan, "--prompts", prompts_file, "--seeds", 1, *SHAPE_OPTIONS[:-1], "4", "--json")
    assert done.returncode == 0, done.stderr
    assert 0 < json.loads(done.stdout)["trajectory_density"] <= 0.75
    done = run("show", plan, "--png", tmp_path / "plan.png")
    assert done.returncode == 0, done.stderr
    assert "blocks.1.attn1" in done.stdout and (tmp_path / "plan.png").is_file()
