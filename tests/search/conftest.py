"""Folders that several tests read: the tiny pipeline, its prompts, a plan of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffsparse.entry import Execution, HeadEntry
from diffsparse.order import RasterOrder, TileOrder
from diffsparse.patterns import Empty, Window
from diffsparse.plan import Architecture, SparsityPlan
from diffsparse.schedule import Schedule
from diffsparse.search import load
from diffsparse.search.cli import main
from tests.search.tiny import PROMPTS, build_pipeline

Cli = Callable[..., tuple[int, str, str]]


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


def make_plan(layers: int = 2, heads: int = 2, head_dim: int = 32) -> SparsityPlan:
    """Two phases; windows with and without a tail, a dense and a skipped head."""
    names = tuple(f"blocks.{i}.attn1" for i in range(layers))
    tile = TileOrder(1, 8, 8)
    entries = [
        HeadEntry(tile, Window(size=(1.0, 0.4, 0.4)), execution=Execution(tail="moments")),
        HeadEntry(),
        HeadEntry(RasterOrder(), Window(size=(2, None, None))),
        HeadEntry(tile, Empty(), execution=Execution(mode="skip")),
    ]
    table = {
        name: [[entries[(i + p + h) % len(entries)] for h in range(heads)] for p in range(2)]
        for i, name in enumerate(names)
    }
    return SparsityPlan.from_table(
        table,
        schedule=Schedule(sparse_below=0.9, phase_bounds=(0.5,)),
        architecture=Architecture("WanTransformer3DModel", names, heads, head_dim, (1, 1, 1)),
        record={
            "calibration": {
                "grid": "3x12x12", "steps": 3, "guidance_scale": 3.0, "height": 48, "width": 48, "num_frames": 9,
            }
        },
    )  # fmt: skip


@pytest.fixture(scope="session")
def plan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan that was made for the tiny pipeline."""
    return make_plan().save_pretrained(tmp_path_factory.mktemp("plans") / "plan")


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
