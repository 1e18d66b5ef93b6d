"""Folders that several tests read: the tiny pipeline, its prompts, a plan of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffsparse.search import load
from diffsparse.search.cli import main
from tests.search.plans import make_plan
from tests.search.tiny import PROMPTS, Cli, build_pipeline


@pytest.fixture(scope="session")
def pipe() -> Any:
    """The tiny pipeline; tests leave it dense."""
    return build_pipeline()


@pytest.fixture(scope="session")
def model_folder(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("# two prompts\n" + "\n\n".join(PROMPTS) + "\n", "utf-8")
    return file


@pytest.fixture(scope="session")
def plan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan that was made for the tiny pipeline."""
    return make_plan().save_pretrained(tmp_path_factory.mktemp("plans") / "plan")


@pytest.fixture(scope="session")
def comparison(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder of a whole comparison, which nobody changes, and what it found."""
    from tests.search.comparisons import compare

    folder = tmp_path_factory.mktemp("comparisons") / "out"
    return folder, compare(pipe, folder)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs a command and gives exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return run


@pytest.fixture
def once_loaded(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny pipeline in memory in the place of loading it anew."""
    monkeypatch.setattr(load, "load_pipeline", lambda *args, **kwargs: pipe)
